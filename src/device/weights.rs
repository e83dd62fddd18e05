//! Weights on their way to where the model runs.

use crate::numerics::QuantizedWeight;
#[cfg(feature = "cuda")]
use candle_core::Layout;
use candle_core::{DType, Device, Result, Tensor};

/// The values `bytes`, of `dtype`, on `device`. A CUDA device copies them while it computes what was asked of it before.
///
/// # Errors
/// The device has no memory left.
pub fn upload(bytes: &[u8], dtype: DType, shape: &[usize], device: &Device) -> Result<Tensor> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            let storage = candle_core::Storage::Cuda(super::cuda::upload(cuda, bytes, dtype)?);
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

/// `weight` in `dtype` on `device`, `[rows, columns]`. To a CUDA device the codes travel, and values are made there.
///
/// # Errors
/// The device has no memory left.
pub fn dequantize(weight: &QuantizedWeight, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = (weight.rows, weight.columns);
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => {
            let values = Tensor::zeros(shape, dtype, device)?;
            values.inplace_op1(&Dequantize(weight))?;
            Ok(values)
        }
        device => Tensor::from_vec(weight.dequantize(), shape, device)?.to_dtype(dtype),
    }
}

#[cfg(feature = "cuda")]
struct Dequantize<'a>(&'a QuantizedWeight);

#[cfg(feature = "cuda")]
impl candle_core::InplaceOp1 for Dequantize<'_> {
    fn name(&self) -> &'static str {
        "dequantize"
    }

    fn cpu_fwd(&self, _: &mut candle_core::CpuStorage, _: &Layout) -> Result<()> {
        candle_core::bail!("on the CPU weights are dequantized as they are made")
    }

    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> Result<()> {
        use super::cuda::{FORWARD, Threads, kind, launch, pointer, pointer_at, u32_arg};
        use candle_core::backend::BackendStorage;
        let weight = self.0;
        let device = Device::Cuda(storage.device.clone());
        let codes = Tensor::from_slice(&weight.codes, weight.codes.len(), &device)?;
        let scales = Tensor::from_slice(&weight.scales, weight.scales.len(), &device)?;
        let zeros = Tensor::from_slice(&weight.zeros, weight.zeros.len(), &device)?;
        let args = [
            pointer_at(storage, layout)?,
            pointer(&codes)?,
            pointer(&scales)?,
            pointer(&zeros)?,
            u32_arg(weight.columns)?,
            u32_arg(weight.grid.group_size)?,
            kind(storage.dtype())?,
        ];
        let threads = Threads::over(weight.columns, weight.rows);
        launch(&storage.device, FORWARD, "dequantize", threads, &args)
    }
}
