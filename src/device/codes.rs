//! Codes where the model runs: packed as [`bits`] says, and the values that they mean.

use super::transfer::{Mark, download};
use super::values;
use crate::numerics::{Grid, QuantizedWeight, bits};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, bail};
use half::{bf16, f16};
use std::ops::Range;

#[cfg(feature = "cuda")]
use {super::cuda, candle_core::CudaStorage};

/// A quantized weight where the model runs: see [`QuantizedWeight`].
#[derive(Clone, Debug)]
pub(super) struct Codes {
    grid: Grid,
    /// `[rows, words]` u32
    codes: Tensor,
    /// `[rows, groups]` f32
    scales: Tensor,
    /// `[rows, groups]` u8
    zeros: Tensor,
}

impl Codes {
    fn new(weight: &QuantizedWeight, device: &Device) -> Result<Self> {
        let groups = (weight.rows, weight.groups());
        let words = (weight.rows, bits::words(weight.columns, weight.grid.bits));
        Ok(Self {
            grid: weight.grid,
            codes: Tensor::from_slice(&weight.codes, words, device)?,
            scales: Tensor::from_slice(&weight.scales, groups, device)?,
            zeros: Tensor::from_slice(&weight.zeros, groups, device)?,
        })
    }

    /// Rows and columns.
    fn sides(&self) -> Result<(usize, usize)> {
        let (rows, groups) = self.scales.dims2()?;
        Ok((rows, groups * self.grid.group_size))
    }

    /// Of codes `[columns, rows]` and scales, then zero points, `[2 * groups, rows]`, in f64, as the solver has them.
    pub(super) fn from_lanes(grid: Grid, codes: &Tensor, scales: &Tensor) -> Result<Self> {
        let (columns, rows) = codes.dims2()?;
        let groups = columns / grid.group_size;
        let shape = (rows, bits::words(columns, grid.bits));
        let packed = Tensor::zeros(shape, DType::U32, codes.device())?;
        packed.inplace_op1(&Pack {
            codes,
            bits: grid.bits,
        })?;
        let by_row = |first, dtype| {
            scales
                .narrow(0, first, groups)?
                .t()?
                .to_dtype(dtype)?
                .contiguous()
        };
        Ok(Self {
            grid,
            codes: packed,
            scales: by_row(0, DType::F32)?,
            zeros: by_row(groups, DType::U8)?,
        })
    }

    /// Some of its rows, where they are.
    pub(super) fn rows(&self, rows: &Range<usize>) -> Result<Self> {
        let of = |values: &Tensor| values.narrow(0, rows.start, rows.len());
        Ok(Self {
            grid: self.grid,
            codes: of(&self.codes)?,
            scales: of(&self.scales)?,
            zeros: of(&self.zeros)?,
        })
    }

    /// On the host: see [`download`].
    pub(super) fn to_host(&self, made: &Mark) -> Result<QuantizedWeight> {
        let (rows, columns) = self.sides()?;
        Ok(QuantizedWeight {
            grid: self.grid,
            rows,
            columns,
            codes: download(&self.codes, made)?,
            scales: download(&self.scales, made)?,
            zeros: download(&self.zeros, made)?,
        })
    }

    /// The values that the codes mean, `[rows, columns]` of `dtype`.
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

/// Fills words, `[rows, words]` u32, with codes, `[columns, rows]` f64.
struct Pack<'a> {
    codes: &'a Tensor,
    bits: u32,
}

impl InplaceOp1 for Pack<'_> {
    fn name(&self) -> &'static str {
        "pack"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        let codes: Vec<u8> = values(&self.codes.t()?.to_dtype(DType::U8)?)?;
        *storage = CpuStorage::U32(bits::pack_rows(&codes, self.codes.dim(0)?, self.bits));
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        use cuda::{Arg, CODES, Threads, launch, pointer, pointer_at, u32_arg};
        let (rows, words) = layout.shape().dims2()?;
        let args = [
            pointer_at(storage, layout)?,
            pointer(self.codes)?,
            u32_arg(words)?,
            Arg::U32(self.bits),
            u32_arg(self.codes.dim(0)?)?,
            u32_arg(rows)?,
        ];
        launch(&storage.device, CODES, "pack", Threads::over(rows, words), &args)
    }
}

/// Fills the values of codes.
struct Dequantize<'a>(&'a Codes);

impl InplaceOp1 for Dequantize<'_> {
    fn name(&self) -> &'static str {
        "dequantize"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        let weight = self.0.to_host(&Mark::new(self.0.codes.device())?)?;
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
        use cuda::{Arg, CODES, Threads, kind, launch, pointer, pointer_at, u32_arg};
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
            CODES,
            "dequantize",
            Threads::by_row(columns, rows),
            &args,
        )
    }
}
