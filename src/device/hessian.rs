//! From a site's sums to matrices in f64.

use super::matrix::matrix_mut;
use super::panels::Panels;
use super::{doubles, values};
use crate::error::Result;
use crate::numerics::panels::Shape;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Tensor, bail};
use std::cmp::Ordering;

/// H = XᵀX as its sums have it, by the upper half: each in original order.
pub(super) struct Symmetric<'a> {
    sums: &'a Panels,
    /// What a sum is multiplied by for its row, and for its column, f64.
    inverse: Tensor,
}

impl<'a> Symmetric<'a> {
    pub(super) fn new(sums: &'a Panels, inverse: Tensor) -> Self {
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

    /// All of it, `[width, width]`.
    pub(super) fn whole(&self) -> Result<Tensor> {
        self.square(With::Nothing)
    }

    /// `M − H`, `[width, width]`, for the sums of M in `cross`.
    pub(super) fn subtracted_from(&self, cross: &Panels) -> Result<Tensor> {
        self.square(With::Cross(cross))
    }

    /// The upper half of `H[order, order]`, `order` u32, with another diagonal, which is by original column.
    pub(super) fn ordered(&self, order: Tensor, diagonal: Tensor) -> Result<Panels> {
        let device = self.sums.values().device();
        let out = Panels::zeros(self.sums.width(), Some(Shape::Upper), DType::F64, device)?;
        let with = With::Order { order, diagonal };
        out.values().inplace_op1(&Fill { of: self, with })?;
        Ok(out)
    }

    fn square(&self, with: With<'_>) -> Result<Tensor> {
        let (width, device) = (self.sums.width(), self.sums.values().device());
        let out = Tensor::zeros((width, width), DType::F64, device)?;
        out.inplace_op1(&Fill { of: self, with })?;
        Ok(out)
    }
}

/// What is made of H.
enum With<'a> {
    Nothing,
    Cross(&'a Panels),
    Order { order: Tensor, diagonal: Tensor },
}

/// Fills zeros: see the methods of [`Symmetric`].
struct Fill<'a> {
    of: &'a Symmetric<'a>,
    with: With<'a>,
}

impl InplaceOp1 for Fill<'_> {
    fn name(&self) -> &'static str {
        match self.with {
            With::Nothing => "whole",
            With::Cross(_) => "shift",
            With::Order { .. } => "ordered",
        }
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (sums, width) = (self.of.sums, self.of.sums.width());
        let hessian = Values::new(self.of)?;
        match &self.with {
            With::Nothing => {
                for (i, out) in matrix_mut(storage, layout)?.iter_mut().enumerate() {
                    *out = hessian.at(i / width, i % width);
                }
            }
            With::Cross(cross) => {
                let cross = values::<i64>(cross.values())?;
                for (i, out) in matrix_mut(storage, layout)?.iter_mut().enumerate() {
                    let (row, column) = (i / width, i % width);
                    *out = hessian.scaled(cross[i], row, column) - hessian.at(row, column);
                }
            }
            With::Order { order, diagonal } => {
                let (order, diagonal) = (order.to_vec1::<u32>()?, doubles(diagonal)?);
                let CpuStorage::F64(out) = storage else {
                    bail!("panels are filled with f64");
                };
                let places = sums.panel_rows().flat_map(|rows| {
                    let columns = sums.columns(&rows);
                    rows.flat_map(move |row| columns.clone().map(move |column| (row, column)))
                });
                for ((row, column), out) in places.zip(&mut out[layout.start_offset()..]) {
                    let (a, b) = (order[row] as usize, order[column] as usize);
                    match row.cmp(&column) {
                        Ordering::Less => *out = hessian.at(a, b),
                        Ordering::Equal => *out = diagonal[a],
                        Ordering::Greater => {}
                    }
                }
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        use super::cuda::{MATRICES, Threads, launch, pointer, pointer_at, u32_arg};
        let (sums, width) = (self.of.sums, self.of.sums.width());
        let mut args = vec![
            pointer_at(storage, layout)?,
            pointer(sums.values())?,
            pointer(&self.of.inverse)?,
        ];
        match &self.with {
            With::Nothing => {}
            With::Cross(cross) => args.push(pointer(cross.values())?),
            With::Order { order, diagonal } => args.extend([pointer(order)?, pointer(diagonal)?]),
        }
        args.extend([u32_arg(width)?, u32_arg(super::panels::PANEL_ROWS)?]);
        let threads = Threads::over(width, width);
        launch(&storage.device, MATRICES, self.name(), threads, &args)
    }
}

/// H on the CPU.
struct Values {
    inverse: Vec<f64>,
    /// The sums from the diagonal on, row after row.
    rows: Vec<Vec<i64>>,
}

impl Values {
    fn new(of: &Symmetric<'_>) -> candle_core::Result<Self> {
        let mut rows = Vec::with_capacity(of.sums.width());
        for panel in of.sums.panel_rows() {
            let columns = of.sums.columns(&panel).len();
            let values = values::<i64>(&of.sums.panel(&panel).map_err(candle_core::Error::wrap)?)?;
            let by_row = values.chunks_exact(columns).enumerate();
            rows.extend(by_row.map(|(row, values)| values[row..].to_vec()));
        }
        Ok(Self {
            inverse: doubles(&of.inverse)?,
            rows,
        })
    }

    fn at(&self, a: usize, b: usize) -> f64 {
        let (row, column) = (a.min(b), a.max(b));
        self.scaled(self.rows[row][column - row], row, column)
    }

    fn scaled(&self, sum: i64, row: usize, column: usize) -> f64 {
        sum as f64 * self.inverse[row] * self.inverse[column]
    }
}
