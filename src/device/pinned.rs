//! Page-locked memory, through which values pass between the host and a device: weights and codes beside what it computes, activations that it
//! has no room for in the order of what it is asked.

use super::cuda::{address, floats, start};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, PinnedHostSlice, result as driver,
};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, bail};
use half::{bf16, f16};
use std::cell::RefCell;
use std::sync::Arc;

/// Bytes of a buffer that the device copies from.
const UPLOAD_BYTES: usize = 32 << 20;

/// Two page-locked buffers and a stream of their own: while the device copies from one, the other is filled, and what it computes goes on.
struct Uploads {
    stream: Arc<CudaStream>,
    buffers: [(PinnedHostSlice<u8>, Option<CudaEvent>); 2],
}

impl Uploads {
    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream().context().new_stream().w()?;
        let buffer = || -> Result<_> {
            // SAFETY: a part of it is read after it has been written.
            let buffer = unsafe { stream.context().alloc_pinned::<u8>(UPLOAD_BYTES) };
            Ok((buffer.w()?, None))
        };
        let buffers = [buffer()?, buffer()?];
        Ok(Self { stream, buffers })
    }

    fn upload(&mut self, bytes: &[u8]) -> Result<CudaSlice<u8>> {
        // SAFETY: all of it is written below.
        let mut out = unsafe { self.stream.alloc::<u8>(bytes.len()) }.w()?;
        let parts = bytes.chunks(UPLOAD_BYTES).enumerate();
        for (i, part) in parts {
            let (buffer, copied) = &mut self.buffers[i % 2];
            if let Some(event) = copied.take() {
                event.synchronize().w()?;
            }
            let buffer = &mut buffer.as_mut_slice().w()?[..part.len()];
            buffer.copy_from_slice(part);
            let mut place = out.slice_mut(i * UPLOAD_BYTES..i * UPLOAD_BYTES + part.len());
            self.stream.memcpy_htod(&*buffer, &mut place).w()?;
            *copied = Some(self.stream.record_event(None).w()?);
        }
        Ok(out)
    }
}

/// `bytes`, values of `dtype`, on the device. What is asked of the device afterwards waits for them, what was asked before does not.
pub(crate) fn upload(device: &CudaDevice, bytes: &[u8], dtype: DType) -> Result<CudaStorage> {
    thread_local! {
        static UPLOADS: RefCell<Option<Uploads>> = const { RefCell::new(None) };
    }
    let stream = device.cuda_stream();
    let out = UPLOADS.with_borrow_mut(|kept| {
        let uploads = match kept {
            Some(uploads) if Arc::ptr_eq(uploads.stream.context(), stream.context()) => uploads,
            other => other.insert(Uploads::new(device)?),
        };
        let out = uploads.upload(bytes)?;
        let complete = uploads.stream.record_event(None).w()?;
        stream.wait(&complete).w()?;
        Ok::<_, candle_core::Error>(out)
    })?;
    let (count, address) = (bytes.len() / dtype.size_in_bytes(), out.leak());
    // SAFETY: the memory holds so many values of this dtype and has no other owner. It is freed in the stream in which it is used.
    unsafe {
        match dtype {
            DType::BF16 => Ok(adopt::<bf16>(device, address, count)),
            DType::F16 => Ok(adopt::<f16>(device, address, count)),
            DType::F32 => Ok(adopt::<f32>(device, address, count)),
            other => bail!("no upload of {other:?}"),
        }
    }
}

/// The owner of `count` values at `address`, from now on.
///
/// # Safety
/// They are there, and nobody else owns them.
unsafe fn adopt<T: CudaDType>(device: &CudaDevice, address: u64, count: usize) -> CudaStorage {
    // SAFETY: as above.
    let slice = unsafe { device.cuda_stream().upgrade_device_ptr::<T>(address, count) };
    CudaStorage::wrap_cuda_slice(slice, device.clone())
}

/// A point in the work of a device.
pub(crate) type Event = CudaEvent;

/// The point after all that was asked of the device so far.
pub(crate) fn record(device: &CudaDevice) -> Result<Event> {
    device.cuda_stream().record_event(None).w()
}

/// Bytes that come to the host at a time.
const DOWNLOAD_BYTES: usize = 32 << 20;

/// A page-locked buffer and a stream of its own: what is copied to the host does not wait for what was asked of the device later.
struct Downloads {
    stream: Arc<CudaStream>,
    buffer: PinnedHostSlice<u8>,
}

impl Downloads {
    fn new(context: &Arc<CudaContext>) -> Result<Self> {
        // SAFETY: a part of it is read after it has been written. Not write-combined, as such memory is slow to read.
        let buffer = unsafe { context.alloc_pinned_with_flags::<u8>(DOWNLOAD_BYTES, 0) }.w()?;
        Ok(Self {
            stream: context.new_stream().w()?,
            buffer,
        })
    }

    /// Fills `out` with the bytes from `address` on.
    fn download(&mut self, address: u64, out: &mut [u8]) -> Result<()> {
        for (i, part) in out.chunks_mut(DOWNLOAD_BYTES).enumerate() {
            let buffer = &mut self.buffer.as_mut_slice().w()?[..part.len()];
            let from = address + (i * DOWNLOAD_BYTES) as u64;
            // SAFETY: so many bytes are there, in a tensor that the caller holds, and nobody touches the buffer until they have come.
            unsafe { driver::memcpy_dtoh_async(buffer, from, self.stream.cu_stream()) }.w()?;
            self.stream.synchronize().w()?;
            part.copy_from_slice(buffer);
        }
        Ok(())
    }
}

/// The values of a contiguous part of a storage, which the device has made before `event`.
pub(crate) fn download<T: bytemuck::Pod>(
    storage: &CudaStorage,
    layout: &Layout,
    event: &Event,
) -> Result<Vec<T>> {
    thread_local! {
        static DOWNLOADS: RefCell<Option<Downloads>> = const { RefCell::new(None) };
    }
    let address = address(storage, layout)?;
    let stream = storage.device.cuda_stream();
    let mut out = vec![T::zeroed(); layout.shape().elem_count()];
    DOWNLOADS.with_borrow_mut(|kept| {
        let downloads = match kept {
            Some(downloads) if Arc::ptr_eq(downloads.stream.context(), stream.context()) => downloads,
            other => other.insert(Downloads::new(stream.context())?),
        };
        downloads.stream.wait(event).w()?;
        downloads.download(address, bytemuck::cast_slice_mut(&mut out))
    })?;
    Ok(out)
}

/// Page-locked memory that the device reads and writes in the order of what it is asked.
#[derive(Debug)]
pub(crate) struct HostBuffer {
    device: CudaDevice,
    memory: PinnedHostSlice<u8>,
    start: usize,
}

impl HostBuffer {
    pub(crate) fn new(device: &CudaDevice, bytes: usize) -> Result<Self> {
        // SAFETY: it is read after it has been written. Not write-combined: the device alone uses it, but it may be much of the memory.
        let mut memory = unsafe {
            device
                .cuda_stream()
                .context()
                .alloc_pinned_with_flags::<u8>(bytes, 0)
        }
        .w()?;
        Ok(Self {
            device: device.clone(),
            start: memory.as_mut_ptr().w()? as usize,
            memory,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.memory.len()
    }

    /// Asks for a copy of a contiguous part of a storage.
    pub(crate) fn fill(&self, storage: &CudaStorage, layout: &Layout) -> Result<()> {
        let bytes = layout.shape().elem_count() * storage.dtype().size_in_bytes();
        let from = address(storage, layout)?;
        // SAFETY: the memory is as large, and nobody but the device touches it while this buffer lives.
        unsafe {
            let to = std::slice::from_raw_parts_mut(self.start as *mut u8, bytes);
            driver::memcpy_dtoh_async(to, from, self.device.cuda_stream().cu_stream()).w()
        }
    }

    /// Asks for a copy of its first bytes on the device, values of `dtype`.
    pub(crate) fn read(&self, bytes: usize, dtype: DType) -> Result<CudaStorage> {
        let out = floats(&self.device, dtype, bytes / dtype.size_in_bytes())?;
        let to = start(&out, &Layout::contiguous(bytes / dtype.size_in_bytes()))?;
        // SAFETY: as above; `out` has so many bytes, and is freed on the same stream.
        unsafe {
            let from = std::slice::from_raw_parts(self.start as *const u8, bytes);
            driver::memcpy_htod_async(to, from, self.device.cuda_stream().cu_stream()).w()?;
        }
        Ok(out)
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        // The device may still be asked to use it. Where it has failed, whoever asks it next is told.
        self.device.cuda_stream().synchronize().ok();
    }
}
