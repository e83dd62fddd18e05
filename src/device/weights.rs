//! Weights on their way to where the model runs.

use crate::numerics::QuantizedWeight;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, bail};
use half::{bf16, f16};

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

/// `weight` in `dtype` on `device`, `[rows, columns]`: codes travel, values are made there.
///
/// # Errors
/// The device has no memory left.
pub fn dequantize(weight: &QuantizedWeight, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = (weight.rows, weight.columns);
    let values = Tensor::zeros(shape, dtype, device)?;
    values.inplace_op1(&Dequantize(weight))?;
    Ok(values)
}

struct Dequantize<'a>(&'a QuantizedWeight);

impl InplaceOp1 for Dequantize<'_> {
    fn name(&self) -> &'static str {
        "dequantize"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        let values = self.0.dequantize();
        *storage = match storage {
            CpuStorage::F32(_) => CpuStorage::F32(values),
            CpuStorage::BF16(_) => CpuStorage::BF16(values.into_iter().map(bf16::from_f32).collect()),
            CpuStorage::F16(_) => CpuStorage::F16(values.into_iter().map(f16::from_f32).collect()),
            _ => bail!("weights are floating-point numbers"),
        };
        Ok(())
    }

    #[cfg(feature = "cuda")]
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
