//! Activations that a device has no room for, in the host's memory.

use candle_core::{Device, Result, Tensor};

#[cfg(feature = "cuda")]
use {super::pinned, candle_core::DType, std::rc::Rc};

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
