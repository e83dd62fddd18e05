//! Weights on their way to where the model runs, and codes on their way back. Both ways pass while the device computes what else was asked.

use super::values;
use crate::numerics::{Grid, QuantizedWeight};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, WithDType, bail};
use half::{bf16, f16};

#[cfg(feature = "cuda")]
use {super::cuda, super::pinned, candle_core::CudaStorage, std::rc::Rc, std::sync::Arc};

/// The values `bytes`, of `dtype`, on `device`. A CUDA device copies them while it computes what was asked of it before.
///
/// # Errors
/// The device has no memory left.
pub fn upload(bytes: &[u8], dtype: DType, shape: &[usize], device: &Device) -> Result<Tensor> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let storage = candle_core::Storage::Cuda(pinned::upload(device, bytes, dtype)?);
            Ok(Tensor::from_storage(
                storage,
                shape,
                candle_core::op::BackpropOp::none(),
                false,
            ))
        }
        device => Tensor::from_raw_buffer(bytes, dtype, shape, device),
    }
}

/// A point in what was asked of a device.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    #[cfg(feature = "cuda")]
    event: Option<Arc<pinned::Event>>,
}

impl Mark {
    /// After all that was asked so far.
    pub(super) fn new(device: &Device) -> Result<Self> {
        Ok(match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Self {
                event: Some(Arc::new(pinned::record(device)?)),
            },
            _ => Self {
                #[cfg(feature = "cuda")]
                event: None,
            },
        })
    }
}

/// The values of a contiguous tensor, row-major. They are copied as soon as the device is at `mark`, before which it has made them, whatever
/// was asked of it since.
pub(super) fn download<T: WithDType + bytemuck::Pod>(tensor: &Tensor, mark: &Mark) -> Result<Vec<T>> {
    #[cfg(feature = "cuda")]
    if let Some(event) = &mark.event {
        let (storage, layout) = tensor.storage_and_layout();
        return match &*storage {
            candle_core::Storage::Cuda(storage) => pinned::download(storage, layout, event),
            _ => bail!("a tensor is not on the device"),
        };
    }
    let _ = mark;
    values(tensor)
}

/// Parked tensors that are on their way to the host, and still on the device, at a time.
pub(crate) const LEAVING: usize = 2;
/// Parked tensors that come back before they are used: those of two batches, while the one before them is computed.
pub(crate) const AHEAD: usize = 4;

/// Memory of the host for tensors that a device has no room for. The device copies them there and back itself, while it computes. On a CUDA
/// device it is page-locked, and kept for the next.
#[derive(Debug)]
pub struct Parking {
    device: Device,
    most: usize,
    taken: usize,
    #[cfg(feature = "cuda")]
    free: Vec<pinned::HostBuffer>,
    #[cfg(feature = "cuda")]
    traffic: Option<Rc<pinned::Traffic>>,
}

/// A tensor in a [`Parking`].
#[derive(Debug)]
pub struct Parked {
    bytes: usize,
    #[cfg(feature = "cuda")]
    shape: candle_core::Shape,
    #[cfg(feature = "cuda")]
    dtype: DType,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// On the CPU, memory is where tensors are.
    Cpu(Tensor),
    #[cfg(feature = "cuda")]
    Host(pinned::HostBuffer),
}

impl Parking {
    /// Room for `most` bytes of tensors on `device`.
    pub fn new(device: &Device, most: usize) -> Self {
        Self {
            device: device.clone(),
            most,
            taken: 0,
            #[cfg(feature = "cuda")]
            free: Vec::new(),
            #[cfg(feature = "cuda")]
            traffic: None,
        }
    }

    /// Takes a copy of `tensor`; `None` where there is no room.
    ///
    /// # Errors
    /// The device fails.
    pub fn park(&mut self, tensor: &Tensor) -> Result<Option<Parked>> {
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        match &self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let device = device.clone();
                let Some(buffer) = self.buffer(&device, bytes)? else {
                    return Ok(None);
                };
                buffer.fill(tensor.contiguous()?)?;
                Ok(Some(Parked {
                    bytes,
                    shape: tensor.shape().clone(),
                    dtype: tensor.dtype(),
                    place: Place::Host(buffer),
                }))
            }
            _ if self.taken + bytes > self.most => Ok(None),
            _ => {
                self.taken += bytes;
                Ok(Some(Parked {
                    bytes,
                    #[cfg(feature = "cuda")]
                    shape: tensor.shape().clone(),
                    #[cfg(feature = "cuda")]
                    dtype: tensor.dtype(),
                    place: Place::Cpu(tensor.force_contiguous()?),
                }))
            }
        }
    }

    /// A free buffer, or a new one. One that is too large, and would be missed where what fills it comes, is taken only where there is no room left.
    #[cfg(feature = "cuda")]
    fn buffer(
        &mut self,
        device: &candle_core::CudaDevice,
        bytes: usize,
    ) -> Result<Option<pinned::HostBuffer>> {
        let smallest = (self.free.iter().enumerate())
            .filter(|(_, buffer)| buffer.len() >= bytes)
            .min_by_key(|(_, buffer)| buffer.len());
        if let Some((at, buffer)) = smallest
            && (buffer.len() == bytes || self.taken + bytes > self.most)
        {
            return Ok(Some(self.free.swap_remove(at)));
        }
        if self.taken + bytes > self.most {
            self.taken -= self.free.iter().map(pinned::HostBuffer::len).sum::<usize>();
            self.free.clear();
        }
        if self.taken + bytes > self.most {
            return Ok(None);
        }
        let traffic = match &self.traffic {
            Some(traffic) => traffic,
            None => self.traffic.insert(Rc::new(pinned::Traffic::new(device)?)),
        };
        self.taken += bytes;
        pinned::HostBuffer::new(traffic, bytes).map(Some)
    }

    /// Gives the room of `parked` back.
    pub fn leave(&mut self, parked: Parked) {
        match parked.place {
            Place::Cpu(_) => self.taken -= parked.bytes,
            // Who takes it next waits for what is still copied to it, or from it.
            #[cfg(feature = "cuda")]
            Place::Host(buffer) => self.free.push(buffer),
        }
    }
}

impl Parked {
    /// The tensor, on the device.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn tensor(&self) -> Result<Tensor> {
        match &self.place {
            Place::Cpu(tensor) => Ok(tensor.clone()),
            #[cfg(feature = "cuda")]
            Place::Host(buffer) => {
                let storage = candle_core::Storage::Cuda(buffer.read(self.bytes, self.dtype)?);
                let none = candle_core::op::BackpropOp::none();
                Ok(Tensor::from_storage(storage, self.shape.clone(), none, false))
            }
        }
    }
}

/// A quantized weight where the model runs: see [`QuantizedWeight`].
#[derive(Clone, Debug)]
pub(super) struct Codes {
    pub(super) grid: Grid,
    /// `[rows, words]` u32: see [`crate::numerics::bits`]
    pub(super) codes: Tensor,
    /// `[rows, groups]` f32
    pub(super) scales: Tensor,
    /// `[rows, groups]` u8
    pub(super) zeros: Tensor,
}

impl Codes {
    fn new(weight: &QuantizedWeight, device: &Device) -> Result<Self> {
        let groups = (weight.rows, weight.groups());
        Ok(Self {
            grid: weight.grid,
            codes: Tensor::from_slice(
                &weight.codes,
                (weight.rows, weight.codes.len() / weight.rows),
                device,
            )?,
            scales: Tensor::from_slice(&weight.scales, groups, device)?,
            zeros: Tensor::from_slice(&weight.zeros, groups, device)?,
        })
    }

    /// Rows and columns.
    pub(super) fn sides(&self) -> Result<(usize, usize)> {
        let (rows, groups) = self.scales.dims2()?;
        Ok((rows, groups * self.grid.group_size))
    }

    pub(super) fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        let out = Tensor::zeros(self.sides()?, dtype, self.codes.device())?;
        out.inplace_op1(&Dequantize(self))?;
        Ok(out)
    }
}

/// `weight` in `dtype` on `device`, `[rows, columns]`. The codes travel, and values are made there.
///
/// # Errors
/// The device has no memory left.
pub fn dequantize(weight: &QuantizedWeight, dtype: DType, device: &Device) -> Result<Tensor> {
    Codes::new(weight, device)?.dequantize(dtype)
}

/// Fills the values of codes.
struct Dequantize<'a>(&'a Codes);

impl InplaceOp1 for Dequantize<'_> {
    fn name(&self) -> &'static str {
        "dequantize"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (rows, columns) = layout.shape().dims2()?;
        let weight = QuantizedWeight {
            grid: self.0.grid,
            rows,
            columns,
            codes: values(&self.0.codes)?,
            scales: values(&self.0.scales)?,
            zeros: values(&self.0.zeros)?,
        };
        let dequantized = weight.dequantize().into_iter();
        *storage = match storage {
            CpuStorage::F32(_) => CpuStorage::F32(dequantized.collect()),
            CpuStorage::BF16(_) => CpuStorage::BF16(dequantized.map(bf16::from_f32).collect()),
            CpuStorage::F16(_) => CpuStorage::F16(dequantized.map(f16::from_f32).collect()),
            _ => bail!("weights are floats of at most 32 bits"),
        };
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        use candle_core::backend::BackendStorage;
        use cuda::{Arg, FORWARD, Threads, kind, launch, pointer, pointer_at, u32_arg};
        let (rows, columns) = layout.shape().dims2()?;
        let args = [
            pointer_at(storage, layout)?,
            pointer(&self.0.codes)?,
            pointer(&self.0.scales)?,
            pointer(&self.0.zeros)?,
            u32_arg(columns)?,
            u32_arg(self.0.grid.group_size)?,
            u32_arg(self.0.codes.dim(1)?)?,
            Arg::U32(self.0.grid.bits),
            kind(storage.dtype())?,
        ];
        launch(
            &storage.device,
            FORWARD,
            "dequantize",
            Threads::over(columns, rows),
            &args,
        )
    }
}
