//! A linear of a block, and the forms in which its weight is held: on the CPU no wider than it is stored, since the weights of a step are
//! often the largest part of its memory. Values in f32 are made a panel of rows at a time, where a product needs them; beside the product
//! that costs little, as each is used for every token of a batch.

use crate::device::{
    self,
    matrix::{product, product_to},
};
use crate::numerics::QuantizedWeight;
use crate::numerics::fp8::Float8Matrix;
use crate::numerics::gemm::{self, View, ViewMut};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use std::ops::Range;
use std::sync::Arc;

/// Elements of a weight that are in f32 at a time. A product packs its input once a panel, so smaller ones cost time.
const PANEL_ELEMENTS: usize = 1 << 20;
/// As many rows are, however wide.
const PANEL_ROWS_MIN: usize = 128;

/// Rows of a weight of so many columns that are in f32 at a time.
pub fn panel_rows(columns: usize) -> usize {
    (PANEL_ELEMENTS / columns.max(1)).max(PANEL_ROWS_MIN)
}

/// A weight, `[rows, columns]`.
#[derive(Clone, Debug)]
pub enum Weight {
    /// As products take it: in f32, or on a device in the model's own 16 bits.
    Whole(Tensor),
    /// bf16 or f16 in the CPU's memory, contiguous.
    Halves(Tensor),
    /// Codes in the CPU's memory.
    Codes(Arc<QuantizedWeight>),
    /// 8-bit floats in the CPU's memory.
    Floats(Arc<Float8Matrix>),
}

/// Weight and an optional bias `[rows]` in f32.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[rows, columns]`
    pub weight: Weight,
    /// `[rows]`
    pub bias: Option<Tensor>,
}

impl Weight {
    /// The dtype of its products.
    fn precision(&self) -> DType {
        match self {
            Self::Whole(weight) => weight.dtype(),
            Self::Halves(_) | Self::Codes(_) | Self::Floats(_) => DType::F32,
        }
    }

    /// Rows and columns.
    pub(super) fn sides(&self) -> Result<(usize, usize)> {
        match self {
            Self::Whole(weight) | Self::Halves(weight) => weight.dims2(),
            Self::Codes(weight) => Ok((weight.rows, weight.columns)),
            Self::Floats(weight) => Ok((weight.codes.len() / weight.columns, weight.columns)),
        }
    }

    /// Some rows in f32, row-major.
    ///
    /// # Errors
    /// There are no such rows.
    pub fn rows(&self, rows: Range<usize>) -> Result<Vec<f32>> {
        if let Self::Whole(weight) = self {
            let rows = weight.narrow(0, rows.start, rows.len())?;
            return device::values(&rows.to_dtype(DType::F32)?);
        }
        let mut values = vec![0.0; rows.len() * self.sides()?.1];
        self.widen(rows, &mut values)?;
        Ok(values)
    }

    /// Writes some rows in f32 to `values`, row-major, of a weight in the CPU's memory.
    fn widen(&self, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        let halves = match self {
            Self::Whole(_) => candle_core::bail!("this weight is not narrow"),
            Self::Codes(weight) => {
                weight.dequantize_rows_to(rows, values);
                return Ok(());
            }
            Self::Floats(weight) => {
                weight.dequantize_rows_to(rows, values);
                return Ok(());
            }
            Self::Halves(halves) => halves.narrow(0, rows.start, rows.len())?,
        };
        let (storage, layout) = halves.storage_and_layout();
        let Some((begin, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("weights are not contiguous");
        };
        match &*storage {
            Storage::Cpu(CpuStorage::BF16(all)) => all[begin..end].convert_to_f32_slice(values),
            Storage::Cpu(CpuStorage::F16(all)) => all[begin..end].convert_to_f32_slice(values),
            _ => candle_core::bail!("weights are not 16-bit floats in the CPU's memory"),
        }
        Ok(())
    }
}

impl Linear {
    /// The dtype of its products.
    pub(super) fn precision(&self) -> DType {
        self.weight.precision()
    }

    /// x Wᵀ + b, in f32. On a device a 16-bit weight takes its input in 16 bits, as the model does at run time, and sums in f32.
    ///
    /// # Errors
    /// `x` is not `[tokens, columns]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = match &self.weight {
            Weight::Whole(weight) => match weight.dtype() {
                DType::F32 => x.matmul(&weight.t()?)?,
                precision => product(&x.to_dtype(precision)?, &weight.t()?)?,
            },
            narrow => x.contiguous()?.apply_op1_no_bwd(&ByPanels(narrow))?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// [`Self::forward`], written to `out`, `[tokens, rows]` f32, which may be a part of a tensor.
    ///
    /// # Errors
    /// `x` is not `[tokens, columns]`, or `out` has another shape.
    pub fn forward_to(&self, x: &Tensor, out: &Tensor) -> Result<()> {
        match (&self.weight, &self.bias) {
            (Weight::Whole(weight), None) if weight.dtype() != DType::F32 => {
                product_to(out, &x.to_dtype(weight.dtype())?, &weight.t()?)
            }
            _ => out.slice_set(&self.forward(x)?, 0, 0),
        }
    }
}

/// The dtype of the linears' products.
pub(super) fn precision(linears: &[Linear]) -> DType {
    linears.first().map_or(DType::F32, Linear::precision)
}

/// x Wᵀ with a weight that is widened by panels.
struct ByPanels<'a>(&'a Weight);

impl CustomOp1 for ByPanels<'_> {
    fn name(&self) -> &'static str {
        "product by panels"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, width) = layout.shape().dims2()?;
        let (rows, columns) = self.0.sides()?;
        let (Some((begin, end)), true) = (layout.contiguous_offsets(), width == columns) else {
            candle_core::bail!("an input of {width} channels for a weight of {columns} columns");
        };
        let x = View::rows(&storage.as_slice::<f32>()?[begin..end], tokens, columns, columns);
        let mut y = vec![0.0f32; tokens * rows];
        let mut panel = vec![0.0f32; panel_rows(columns).min(rows) * columns];
        for begin in (0..rows).step_by(panel_rows(columns)) {
            let end = rows.min(begin + panel_rows(columns));
            let height = end - begin;
            let panel = &mut panel[..height * columns];
            self.0.widen(begin..end, panel)?;
            gemm::product(
                ViewMut::rows(&mut y[begin..], tokens, height, rows),
                0.0,
                x,
                View::rows(panel, height, columns, columns).transposed(),
                1.0,
            );
        }
        Ok((CpuStorage::F32(y), Shape::from((tokens, rows))))
    }
}
