//! Weights on their way to where the model runs, and results on their way back. Both ways pass while the device computes what else was asked.

use super::values;
use candle_core::{DType, Device, Result, Tensor, WithDType};

#[cfg(feature = "cuda")]
use {super::pinned, candle_core::bail, std::sync::Arc};

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
