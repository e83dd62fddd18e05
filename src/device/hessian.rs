//! From a site's sums to matrices in f64.

use super::matrix::{matrix_mut, product};
use super::panels::Panels;
use super::{doubles, values};
use crate::error::Result;
use crate::numerics::panels::Shape;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Storage, Tensor, bail};
use std::ops::{Deref, Range};

/// H = XᵀX as its sums have it, by the upper half: each in original order. Rows in f64 are made when they are read, so that it is never whole.
#[derive(Clone, Debug)]
pub struct Symmetric {
    sums: Panels,
    /// What a sum is multiplied by for its row, and for its column, f64.
    inverse: Tensor,
}

impl Symmetric {
    pub(super) fn new(sums: Panels, inverse: Tensor) -> Self {
        Self { sums, inverse }
    }

    /// The diagonal, on the host.
    pub(super) fn diagonal(&self) -> Result<Vec<f64>> {
        let sums = self.sums.values().index_select(&self.sums.diagonal()?, 0)?;
        let of_rows = values::<i64>(&sums)?.into_iter().zip(doubles(&self.inverse)?);
        Ok(of_rows
            .map(|(sum, inverse)| sum as f64 * inverse * inverse)
            .collect())
    }

    /// Some rows, `[rows, width]`.
    pub(super) fn rows(&self, rows: Range<usize>) -> Result<Tensor> {
        self.fill_rows(rows, With::Nothing)
    }

    /// `H · values + damping · values`, for `[width, lanes]` and a diagonal `[width]`.
    pub(super) fn damped_times(&self, values: &Tensor, damping: &Tensor) -> Result<Tensor> {
        let damping = damping.unsqueeze(1)?;
        let out = values.zeros_like()?;
        for rows in self.sums.panel_rows() {
            let (first, count) = (rows.start, rows.len());
            let damped = values
                .narrow(0, first, count)?
                .broadcast_mul(&damping.narrow(0, first, count)?)?;
            let part = (product(&self.rows(rows)?, values)? + damped)?;
            out.slice_set(&part, 0, first)?;
        }
        Ok(out)
    }

    /// The upper half of `H[order, order]`, `order` u32, with another diagonal, which is by original column.
    pub(super) fn ordered(&self, order: Tensor, diagonal: Tensor) -> Result<Panels> {
        let device = self.sums.values().device();
        let out = Panels::zeros(self.sums.width(), Some(Shape::Upper), DType::F64, device)?;
        out.values().inplace_op1(&Fill {
            of: self,
            rows: 0..self.sums.width(),
            with: With::Order { order, diagonal },
        })?;
        Ok(out)
    }

    fn fill_rows(&self, rows: Range<usize>, with: With<'_>) -> Result<Tensor> {
        let size = (rows.len(), self.sums.width());
        let out = Tensor::zeros(size, DType::F64, self.sums.values().device())?;
        out.inplace_op1(&Fill { of: self, rows, with })?;
        Ok(out)
    }
}

/// `X̃ᵀX − XᵀX`, made by rows as [`Symmetric`].
#[derive(Clone, Debug)]
pub(super) struct Shift {
    gram: Symmetric,
    cross: Panels,
}

impl Shift {
    /// For the sums of `X̃ᵀX` and `XᵀX`.
    pub(super) fn new(cross: Panels, gram: Symmetric) -> Self {
        Self { gram, cross }
    }

    /// Its transpose times `values`, `[width, lanes]`.
    pub(super) fn transposed_times(&self, values: &Tensor) -> Result<Tensor> {
        let mut out = values.zeros_like()?;
        for rows in self.gram.sums.panel_rows() {
            let values = values.narrow(0, rows.start, rows.len())?;
            let rows = self.gram.fill_rows(rows, With::Cross(&self.cross))?;
            out = (out + product(&rows.t()?, &values)?)?;
        }
        Ok(out)
    }
}

/// What is made of H.
enum With<'a> {
    Nothing,
    Cross(&'a Panels),
    Order { order: Tensor, diagonal: Tensor },
}

/// Fills zeros: see the methods of [`Symmetric`] and [`Shift`].
struct Fill<'a> {
    of: &'a Symmetric,
    rows: Range<usize>,
    with: With<'a>,
}

impl InplaceOp1 for Fill<'_> {
    fn name(&self) -> &'static str {
        match self.with {
            With::Nothing => "whole_rows",
            With::Cross(_) => "shift_rows",
            With::Order { .. } => "ordered",
        }
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (sums, width) = (&self.of.sums, self.of.sums.width());
        let read = sums.values().storage_and_layout();
        let hessian = Values {
            sums,
            values: on_cpu(&read)?,
            inverse: doubles(&self.of.inverse)?,
        };
        let places = |i: usize| (self.rows.start + i / width, i % width);
        match &self.with {
            With::Nothing => {
                for (i, out) in matrix_mut(storage, layout)?.iter_mut().enumerate() {
                    let (row, column) = places(i);
                    *out = hessian.at(row, column);
                }
            }
            With::Cross(cross) => {
                let read = cross.values().storage_and_layout();
                let cross = on_cpu(&read)?;
                for (i, out) in matrix_mut(storage, layout)?.iter_mut().enumerate() {
                    let (row, column) = places(i);
                    *out = hessian.scaled(cross[row * width + column], row, column) - hessian.at(row, column);
                }
            }
            With::Order { order, diagonal } => {
                let (order, diagonal) = (order.to_vec1::<u32>()?, doubles(diagonal)?);
                let CpuStorage::F64(out) = storage else {
                    bail!("panels are filled with f64");
                };
                let out = &mut out[layout.start_offset()..];
                for row in 0..width {
                    let a = order[row] as usize;
                    out[sums.place(row, row)] = diagonal[a];
                    for column in row + 1..width {
                        out[sums.place(row, column)] = hessian.at(a, order[column] as usize);
                    }
                }
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        use super::cuda::{MATRICES, Threads, launch, pointer, pointer_at, u32_arg};
        let (sums, width) = (&self.of.sums, self.of.sums.width());
        let mut args = vec![
            pointer_at(storage, layout)?,
            pointer(sums.values())?,
            pointer(&self.of.inverse)?,
        ];
        match &self.with {
            With::Nothing => args.push(u32_arg(self.rows.start)?),
            With::Cross(cross) => args.extend([pointer(cross.values())?, u32_arg(self.rows.start)?]),
            With::Order { order, diagonal } => args.extend([pointer(order)?, pointer(diagonal)?]),
        }
        args.extend([u32_arg(width)?, u32_arg(super::panels::PANEL_ROWS)?]);
        let threads = Threads::over(width, self.rows.len());
        launch(&storage.device, MATRICES, self.name(), threads, &args)
    }
}

/// H on the CPU.
struct Values<'a> {
    sums: &'a Panels,
    values: &'a [i64],
    inverse: Vec<f64>,
}

impl Values<'_> {
    fn at(&self, a: usize, b: usize) -> f64 {
        let (row, column) = (a.min(b), a.max(b));
        self.scaled(self.values[self.sums.place(row, column)], row, column)
    }

    fn scaled(&self, sum: i64, row: usize, column: usize) -> f64 {
        sum as f64 * self.inverse[row] * self.inverse[column]
    }
}

/// The sums in a tensor's storage.
fn on_cpu<'a>(
    (storage, layout): &'a (impl Deref<Target = Storage>, &Layout),
) -> candle_core::Result<&'a [i64]> {
    match &**storage {
        Storage::Cpu(CpuStorage::I64(values)) => Ok(&values[layout.start_offset()..]),
        _ => bail!("sums are i64 values on the CPU"),
    }
}
