//! Page-locked memory, through which values pass between the host and a device beside what it computes: weights, codes, activations that it has
//! no room for. Each way has a stream of its own, and events say what has to be there before what.

use super::cuda::{address, alloc_beside};
use super::{AHEAD, LEAVING};
use crate::system::side_by_side;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, PinnedHostSlice, result as driver, sys,
};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use memmap2::{Advice, MmapMut};
use rayon::prelude::*;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

/// Bytes of a buffer that the device copies from.
const UPLOAD_BYTES: usize = 32 << 20;

/// What a thread copies, or touches, at a time: whole huge pages.
const COPY_BYTES: usize = 4 << 20;

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

    fn upload(&mut self, device: &CudaDevice, bytes: &[u8]) -> Result<CudaSlice<u8>> {
        let mut out = alloc_beside(device, &self.stream, bytes.len())?;
        let parts = bytes.chunks(UPLOAD_BYTES).enumerate();
        for (i, part) in parts {
            let (buffer, copied) = &mut self.buffers[i % 2];
            if let Some(event) = copied.take() {
                event.synchronize().w()?;
            }
            let buffer = &mut buffer.as_mut_slice().w()?[..part.len()];
            copy(buffer, part);
            let mut place = out.slice_mut(i * UPLOAD_BYTES..i * UPLOAD_BYTES + part.len());
            self.stream.memcpy_htod(&*buffer, &mut place).w()?;
            *copied = Some(self.stream.record_event(None).w()?);
        }
        Ok(out)
    }
}

/// Copies on the host, side by side.
fn copy(to: &mut [u8], from: &[u8]) {
    side_by_side(|| {
        let parts = to.par_chunks_mut(COPY_BYTES).zip(from.par_chunks(COPY_BYTES));
        parts.for_each(|(to, from)| to.copy_from_slice(from));
    });
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
        let out = uploads.upload(device, bytes)?;
        let complete = uploads.stream.record_event(None).w()?;
        stream.wait(&complete).w()?;
        Ok::<_, candle_core::Error>(out)
    })?;
    adopt(device, out, dtype)
}

/// Memory of another stream as values of `dtype`, to be used and freed in the device's own.
fn adopt(device: &CudaDevice, memory: CudaSlice<u8>, dtype: DType) -> Result<CudaStorage> {
    /// # Safety
    /// So many values are at this address, and nobody else owns them.
    unsafe fn owned<T: CudaDType>(device: &CudaDevice, address: u64, count: usize) -> CudaStorage {
        // SAFETY: as above.
        let slice = unsafe { device.cuda_stream().upgrade_device_ptr::<T>(address, count) };
        CudaStorage::wrap_cuda_slice(slice, device.clone())
    }
    let count = memory.len() / dtype.size_in_bytes();
    // SAFETY: the memory holds so many values of this dtype and has no other owner.
    unsafe {
        match dtype {
            DType::BF16 => Ok(owned::<bf16>(device, memory.leak(), count)),
            DType::F16 => Ok(owned::<f16>(device, memory.leak(), count)),
            DType::F32 => Ok(owned::<f32>(device, memory.leak(), count)),
            other => bail!("no values of {other:?} are copied to a device"),
        }
    }
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
            copy(part, buffer);
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

/// Two streams beside the device's own, on which activations go to the host and come back while it computes.
#[derive(Debug)]
pub(crate) struct Traffic {
    device: CudaDevice,
    out: Arc<CudaStream>,
    back: Arc<CudaStream>,
    /// What is on its way out, and when it will be there.
    leaving: RefCell<VecDeque<(Tensor, Arc<Event>)>>,
    /// Where what comes back lands, the one used longest ago first, and when the device's own stream will have taken it from there.
    landings: RefCell<VecDeque<(CudaSlice<u8>, Event)>>,
}

impl Traffic {
    pub(crate) fn new(device: &CudaDevice) -> Result<Self> {
        let stream = || device.cuda_stream().context().new_stream().w();
        Ok(Self {
            out: stream()?,
            back: stream()?,
            device: device.clone(),
            leaving: RefCell::default(),
            landings: RefCell::default(),
        })
    }

    /// Lets go of all that is on its way out but the last `kept`. Its memory is the device's again when it is there.
    fn settle(&self, kept: usize) -> Result<()> {
        let mut leaving = self.leaving.borrow_mut();
        let gone = leaving.len().saturating_sub(kept);
        // Each is dropped behind its wait.
        leaving
            .drain(..gone)
            .try_for_each(|(_tensor, there)| self.device.cuda_stream().wait(&there).w())
    }

    /// Memory for what comes back next. Where so many are on their way as may be, waits until the first has been taken. All memory is taken and freed
    /// in the device's own stream: what one stream frees, the driver does not find for another in time, and would take ever more.
    fn landing(&self, bytes: usize) -> Result<CudaSlice<u8>> {
        let mut landings = self.landings.borrow_mut();
        if landings.len() == AHEAD
            && let Some((memory, taken)) = landings.pop_front()
        {
            taken.synchronize().w()?;
            if (bytes..=2 * bytes).contains(&memory.len()) {
                return Ok(memory);
            }
        }
        // SAFETY: it is read after it has been written.
        let memory = unsafe { self.device.cuda_stream().alloc::<u8>(bytes) }.w()?;
        self.back.wait(&record(&self.device)?).w()?;
        Ok(memory)
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        // Where the device has failed, whoever asks it next is told.
        self.settle(0).ok();
    }
}

/// Page-locked memory, in huge pages where the system has them: it is touched and locked in a fraction of the time that the driver takes to
/// make its own, of which there may be much.
#[derive(Debug)]
struct Locked {
    context: Arc<CudaContext>,
    memory: MmapMut,
}

impl Locked {
    fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        let mut memory = MmapMut::map_anon(bytes.max(1))?;
        // Where the system has neither, pages are small, and touched when they are locked.
        memory.advise(Advice::HugePage).ok();
        touch(&memory);
        context.bind_to_thread().w()?;
        // SAFETY: the memory is unlocked before it is unmapped.
        unsafe { sys::cuMemHostRegister_v2(memory.as_mut_ptr().cast(), memory.len(), 0) }
            .result()
            .w()?;
        let context = Arc::clone(context);
        Ok(Self { context, memory })
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn start(&self) -> *mut u8 {
        self.memory.as_ptr().cast_mut()
    }
}

/// Has the system give the pages of `memory`, side by side.
fn touch(memory: &MmapMut) {
    let part = |begin: usize| begin..memory.len().min(begin + COPY_BYTES);
    side_by_side(|| {
        let parts = (0..memory.len()).into_par_iter().step_by(COPY_BYTES).map(part);
        parts.for_each(|part| {
            memory
                .advise_range(Advice::PopulateWrite, part.start, part.len())
                .ok();
        });
    });
}

impl Drop for Locked {
    fn drop(&mut self) {
        // Where the device has failed, whoever asks it next is told.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: it was locked when it was made, and nobody copies to it or from it any more.
            unsafe { sys::cuMemHostUnregister(self.start().cast()) }
                .result()
                .ok();
        }
    }
}

/// Page-locked memory that the device copies to and from beside what it computes.
#[derive(Debug)]
pub(crate) struct HostBuffer {
    traffic: Rc<Traffic>,
    memory: Locked,
    /// After the last copy to or from it.
    used: RefCell<Option<Arc<Event>>>,
}

impl HostBuffer {
    pub(crate) fn new(traffic: &Rc<Traffic>, bytes: usize) -> Result<Self> {
        Ok(Self {
            memory: Locked::new(traffic.device.cuda_stream().context(), bytes)?,
            traffic: Rc::clone(traffic),
            used: RefCell::default(),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.memory.len()
    }

    /// Asks for a copy of a contiguous tensor, as soon as it is made.
    pub(crate) fn fill(&self, tensor: Tensor) -> Result<()> {
        let stream = &self.traffic.out;
        stream.wait(&record(&self.traffic.device)?).w()?;
        self.after_last_use(stream)?;
        {
            let (storage, layout) = tensor.storage_and_layout();
            let Storage::Cuda(storage) = &*storage else {
                bail!("a tensor is not on the device");
            };
            let bytes = layout.shape().elem_count() * storage.dtype().size_in_bytes();
            let from = address(storage, layout)?;
            // SAFETY: the memory is as large, and nobody but the device touches it while this buffer lives; the tensor is kept until the copy
            // is made.
            unsafe {
                let to = std::slice::from_raw_parts_mut(self.memory.start(), bytes);
                driver::memcpy_dtoh_async(to, from, stream.cu_stream()).w()?;
            }
        }
        let there = self.note_use(stream)?;
        self.traffic.leaving.borrow_mut().push_back((tensor, there));
        self.traffic.settle(LEAVING)
    }

    /// Asks for a copy of its first bytes on the device, values of `dtype`. What is asked of the device afterwards waits for it, what was asked
    /// before does not.
    pub(crate) fn read(&self, bytes: usize, dtype: DType) -> Result<CudaStorage> {
        let (device, back) = (&self.traffic.device, &self.traffic.back);
        let landing = self.traffic.landing(bytes)?;
        let landed = landing.device_ptr(back).0;
        self.after_last_use(back)?;
        // SAFETY: the landing has so many bytes, and so has the memory, which nobody but the device touches while this buffer lives.
        unsafe {
            let from = std::slice::from_raw_parts(self.memory.start(), bytes);
            driver::memcpy_htod_async(landed, from, back.cu_stream()).w()?;
        }
        let here = self.note_use(back)?;
        let stream = device.cuda_stream();
        stream.wait(&here).w()?;
        // SAFETY: all of it is written below.
        let out = unsafe { stream.alloc::<u8>(bytes) }.w()?;
        // SAFETY: both have so many bytes, and the landing is kept until they are taken.
        unsafe { driver::memcpy_dtod_async(out.device_ptr(&stream).0, landed, bytes, stream.cu_stream()) }
            .w()?;
        let taken = record(device)?;
        self.traffic.landings.borrow_mut().push_back((landing, taken));
        adopt(device, out, dtype)
    }

    /// Has `stream` wait for the last copy.
    fn after_last_use(&self, stream: &CudaStream) -> Result<()> {
        match &*self.used.borrow() {
            Some(used) => stream.wait(used).w(),
            None => Ok(()),
        }
    }

    /// The point after what `stream` was asked so far, which has this buffer.
    fn note_use(&self, stream: &CudaStream) -> Result<Arc<Event>> {
        let used = Arc::new(stream.record_event(None).w()?);
        self.used.replace(Some(Arc::clone(&used)));
        Ok(used)
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        // The device may still have to use it. Where it has failed, whoever asks it next is told.
        if let Some(used) = self.used.take() {
            used.synchronize().ok();
        }
    }
}
