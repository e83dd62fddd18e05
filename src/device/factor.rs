//! A site's damped Hessian and its factor where the sums are: as [`crate::numerics::factor`], with U = Lᵀ in the place of L, whose panels are
//! the same as those of the sums.

use super::matrix::{product, select_rows, subtract_product};
use super::panels::{PANEL_ROWS, Panels};
use super::sums::Sums;
use super::{doubles, row_stride, values, vector};
use crate::error::{Error, Result};
use crate::numerics::factor::{ColumnOrder, Damped, damped, factor_block};
use crate::numerics::panels::Shape;
use crate::statistics::Product;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Tensor, bail};
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{MatMut, MatRef, Par};
use std::cell::Cell;
use std::cmp::Ordering;
use std::ops::Range;

/// As [`crate::numerics::factor::Factor`]. Matrices are f64.
#[derive(Debug)]
pub struct Factor {
    /// Order of the columns and damping, and U, whose diagonal blocks have their zeros.
    pub(crate) damped: Damped<Panels>,
    /// The original column of each row of U, u32.
    pub(super) columns: Tensor,
    /// The row of U of each original column, u32.
    pub(super) rows: Tensor,
    /// XᵀX `[width, width]` in original order, where it was asked for.
    pub(super) gram: Option<Tensor>,
    /// `X̃ᵀX − XᵀX` `[width, width]` in original order, where the original model is matched.
    pub(super) shift: Option<Tensor>,
}

impl Factor {
    /// Factors `XᵀX` with each of these shares of damping; keeps it whole where `with_gram` asks for it. What the factors share is made once.
    /// `site` is for the error alone.
    ///
    /// # Errors
    /// As [`crate::numerics::factor::Factor::new`].
    pub fn by_damping(
        site: &str,
        sums: &Sums,
        damp_percents: impl IntoIterator<Item = f64>,
        column_order: ColumnOrder,
        with_gram: bool,
    ) -> Result<Vec<Self>> {
        let sum = sums
            .product(Product::Gram)
            .ok_or_else(|| Error::Worker("no XᵀX was summed".into()))?;
        let inverse = sums.inverse_scales()?;
        let diagonal = sum.values().index_select(&sum.diagonal()?, 0)?;
        let energies = values::<i64>(&diagonal)?.into_iter().zip(doubles(&inverse)?);
        let energies: Vec<f64> = energies
            .map(|(sum, inverse)| sum as f64 * inverse * inverse)
            .collect();
        let gram = with_gram.then(|| whole(sum, &inverse)).transpose()?;
        let shift = sums
            .product(Product::Cross)
            .map(|cross| {
                let fill = FillShift {
                    cross,
                    sums: sum,
                    inverse: &inverse,
                };
                square(sum, &fill)
            })
            .transpose()?;
        let factors = damp_percents.into_iter().map(|damp_percent| {
            let damped = damped(
                site,
                &energies,
                damp_percent,
                column_order,
                |reversed, diagonal| {
                    let upper = Panels::zeros(sum.width(), Some(Shape::Upper), DType::F64, inverse.device())?;
                    upper.values().inplace_op1(&FillDamped {
                        sums: sum,
                        inverse: &inverse,
                        order: vector(&indices(reversed.iter()), &inverse)?,
                        diagonal: vector(diagonal, &inverse)?,
                    })?;
                    Ok(cholesky(&upper)?.map(|()| upper))
                },
            )?;
            let columns = indices(damped.order.iter().rev());
            let mut rows = vec![0u32; columns.len()];
            columns
                .iter()
                .zip(0..)
                .for_each(|(&column, row)| rows[column as usize] = row);
            Ok(Self {
                columns: vector(&columns, &inverse)?,
                rows: vector(&rows, &inverse)?,
                gram: gram.clone(),
                shift: shift.clone(),
                damped,
            })
        });
        factors.collect()
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.damped.order.len()
    }

    /// `R_ii²` by original column, f64.
    pub fn importance(&self) -> Result<Tensor> {
        let upper = &self.damped.lower;
        let pivots = select_rows(&upper.values().reshape(((), 1))?, &upper.diagonal()?)?;
        Ok(select_rows(&pivots.sqr()?, &self.rows)?.squeeze(1)?)
    }

    /// As [`crate::numerics::factor::Factor::target`], for `weights` `[width, lanes]` f64; `None` where the target is the weights.
    pub(super) fn target(&self, weights: &Tensor, alpha: f64) -> Result<Option<Tensor>> {
        let Some(shift) = self.shift.as_ref().filter(|_| alpha != 0.0) else {
            return Ok(None);
        };
        let moved = select_rows(&product(&shift.t()?, weights)?, &self.columns)?;
        self.solve(&moved)?;
        Ok(Some((weights + (select_rows(&moved, &self.rows)? * alpha)?)?))
    }

    /// In place: `H_d⁻¹ values`, for `[width, lanes]` in the order of U's rows.
    fn solve(&self, values: &Tensor) -> Result<()> {
        let upper = &self.damped.lower;
        let part = |rows: &Range<usize>| values.narrow(0, rows.start, rows.len());
        let solved = |rows: &Range<usize>, right: Tensor, transposed: bool| -> Result<()> {
            let lower = &lower_block(&upper.panel(rows)?)?;
            right.inplace_op1(&TriangularSolve { lower, transposed })?;
            Ok(values.slice_set(&right, 0, rows.start)?)
        };
        for rows in upper.panel_rows() {
            let mut right = part(&rows)?.force_contiguous()?;
            for earlier in upper.panel_rows().take_while(|earlier| *earlier != rows) {
                let beside = upper
                    .panel(&earlier)?
                    .narrow(1, rows.start - earlier.start, rows.len())?;
                right = (right - product(&beside.t()?, &part(&earlier)?)?)?;
            }
            solved(&rows, right, false)?;
        }
        for rows in upper.panel_rows().rev() {
            let mut right = part(&rows)?.force_contiguous()?;
            let later = rows.end..self.width();
            if !later.is_empty() {
                let beside = upper.panel(&rows)?.narrow(1, rows.len(), later.len())?;
                right = (right - product(&beside, &part(&later)?)?)?;
            }
            solved(&rows, right, true)?;
        }
        Ok(())
    }
}

/// XᵀX over held-out tokens, `[width, width]` f64, where it was summed.
///
/// # Errors
/// The device has no memory left.
pub fn held_out(sums: &Sums) -> Result<Option<Tensor>> {
    let held_out = sums.product(Product::HeldOut);
    held_out
        .map(|sum| whole(sum, &sums.inverse_scales()?))
        .transpose()
}

/// A symmetric product in f64, `[width, width]` in original order.
fn whole(sums: &Panels, inverse: &Tensor) -> Result<Tensor> {
    square(sums, &FillWhole { sums, inverse })
}

/// `[width, width]` f64, as `fill` fills it.
fn square(sums: &Panels, fill: &impl InplaceOp1) -> Result<Tensor> {
    let width = sums.width();
    let out = Tensor::zeros((width, width), DType::F64, sums.values().device())?;
    out.inplace_op1(fill)?;
    Ok(out)
}

/// As a kernel takes them.
fn indices<'a>(columns: impl Iterator<Item = &'a usize>) -> Vec<u32> {
    columns.map(|&column| column as u32).collect()
}

/// In the place of a symmetric matrix, which is given by its upper half: U of `UᵀU`, or the row of the pivot that is not positive. Left-looking, a
/// panel after the other.
fn cholesky(matrix: &Panels) -> Result<Result<(), usize>> {
    let below = Tensor::tril2(
        matrix.width().min(PANEL_ROWS),
        DType::F64,
        matrix.values().device(),
    )?;
    for rows in matrix.panel_rows() {
        let panel = matrix.panel(&rows)?;
        for earlier in matrix.panel_rows().take_while(|earlier| *earlier != rows) {
            let first = rows.start - earlier.start;
            let done = matrix.panel(&earlier)?;
            let (above, beside) = (
                done.narrow(1, first, rows.len())?,
                done.narrow(1, first, panel.dim(1)?)?,
            );
            subtract_product(&panel, &above.t()?, &beside)?;
        }
        let lower = lower_block(&panel)?;
        let cholesky = Cholesky(Cell::new(None));
        lower.inplace_op1(&cholesky)?;
        if let Some(pivot) = cholesky.0.get() {
            return Ok(Err(rows.start + pivot));
        }
        // What the products left in the other half is no part of the factor.
        let below = below.narrow(0, 0, rows.len())?.narrow(1, 0, rows.len())?;
        panel.slice_set(&(&lower * below)?.t()?.force_contiguous()?, 1, 0)?;
        let later = panel.dim(1)? - rows.len();
        if later > 0 {
            let (lower, transposed) = (&lower, false);
            let beside = panel.narrow(1, rows.len(), later)?;
            beside.inplace_op1(&TriangularSolve { lower, transposed })?;
        }
    }
    Ok(Ok(()))
}

/// The square on the diagonal of an upper panel, turned: a copy.
fn lower_block(panel: &Tensor) -> Result<Tensor> {
    Ok(panel.narrow(1, 0, panel.dim(0)?)?.t()?.force_contiguous()?)
}

/// The upper half of H in the order `order`, with another diagonal, which is by original column, in the values of panels of zeros.
struct FillDamped<'a> {
    sums: &'a Panels,
    inverse: &'a Tensor,
    order: Tensor,
    diagonal: Tensor,
}

impl InplaceOp1 for FillDamped<'_> {
    fn name(&self) -> &'static str {
        "fill_damped"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let sums = Symmetric::new(self.sums, self.inverse)?;
        let (order, diagonal) = (self.order.to_vec1::<u32>()?, doubles(&self.diagonal)?);
        let (CpuStorage::F64(out), Some((mut at, _))) = (storage, layout.contiguous_offsets()) else {
            bail!("fill_damped fills f64 panels");
        };
        for rows in self.sums.panel_rows() {
            for row in rows.clone() {
                for column in self.sums.columns(&rows) {
                    let (a, b) = (order[row] as usize, order[column] as usize);
                    match row.cmp(&column) {
                        Ordering::Less => out[at] = sums.at(a, b),
                        Ordering::Equal => out[at] = diagonal[a],
                        Ordering::Greater => {}
                    }
                    at += 1;
                }
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        use super::cuda::{FACTOR, Threads, launch, pointer, pointer_at, u32_arg};
        let width = self.sums.width();
        let args = [
            pointer_at(storage, layout)?,
            pointer(self.sums.values())?,
            pointer(self.inverse)?,
            pointer(&self.order)?,
            pointer(&self.diagonal)?,
            u32_arg(width)?,
            u32_arg(PANEL_ROWS)?,
        ];
        let threads = Threads::over(width, width);
        launch(&storage.device, FACTOR, "damped", threads, &args)
    }
}

/// All of H in original order.
struct FillWhole<'a> {
    sums: &'a Panels,
    inverse: &'a Tensor,
}

impl InplaceOp1 for FillWhole<'_> {
    fn name(&self) -> &'static str {
        "fill_whole"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (width, sums) = (self.sums.width(), Symmetric::new(self.sums, self.inverse)?);
        for (i, out) in matrix_mut(storage, layout)?.iter_mut().enumerate() {
            *out = sums.at(i / width, i % width);
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        use super::cuda::{FACTOR, Threads, launch, pointer, pointer_at, u32_arg};
        let width = self.sums.width();
        let args = [
            pointer_at(storage, layout)?,
            pointer(self.sums.values())?,
            pointer(self.inverse)?,
            u32_arg(width)?,
            u32_arg(PANEL_ROWS)?,
        ];
        let threads = Threads::over(width, width);
        launch(&storage.device, FACTOR, "whole", threads, &args)
    }
}

/// `M − H` in original order.
struct FillShift<'a> {
    cross: &'a Panels,
    sums: &'a Panels,
    inverse: &'a Tensor,
}

impl InplaceOp1 for FillShift<'_> {
    fn name(&self) -> &'static str {
        "fill_shift"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (width, sums) = (self.sums.width(), Symmetric::new(self.sums, self.inverse)?);
        let cross = values::<i64>(self.cross.values())?;
        for (i, out) in matrix_mut(storage, layout)?.iter_mut().enumerate() {
            let (row, column) = (i / width, i % width);
            *out = sums.scaled(cross[i], row, column) - sums.at(row, column);
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        use super::cuda::{FACTOR, Threads, launch, pointer, pointer_at, u32_arg};
        let width = self.sums.width();
        let args = [
            pointer_at(storage, layout)?,
            pointer(self.cross.values())?,
            pointer(self.sums.values())?,
            pointer(self.inverse)?,
            u32_arg(width)?,
            u32_arg(PANEL_ROWS)?,
        ];
        let threads = Threads::over(width, width);
        launch(&storage.device, FACTOR, "shift", threads, &args)
    }
}

/// H in original order, on the CPU.
struct Symmetric {
    inverse: Vec<f64>,
    /// The sums from the diagonal on, row after row.
    rows: Vec<Vec<i64>>,
}

impl Symmetric {
    fn new(sums: &Panels, inverse: &Tensor) -> candle_core::Result<Self> {
        let mut rows = Vec::with_capacity(sums.width());
        for panel in sums.panel_rows() {
            let values = values::<i64>(&sums.panel(&panel).map_err(candle_core::Error::wrap)?)?;
            let from_first = values.chunks_exact(sums.width() - panel.start).enumerate();
            rows.extend(from_first.map(|(row, values)| values[row..].to_vec()));
        }
        Ok(Self {
            inverse: doubles(inverse)?,
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

/// In place: the lower Cholesky factor of a matrix that is given by its lower half, or the row of the pivot that is not positive.
struct Cholesky(Cell<Option<usize>>);

impl InplaceOp1 for Cholesky {
    fn name(&self) -> &'static str {
        "cholesky"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (width, _) = layout.shape().dims2()?;
        let matrix = matrix_mut(storage, layout)?;
        self.0
            .set(factor_block(MatMut::from_row_major_slice_mut(matrix, width, width)).err());
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        self.0.set(super::cuda::cholesky(storage, layout)?);
        Ok(())
    }
}

/// In place, for `[width, lanes]`, whose rows need not touch: `L⁻¹ values`, or `L⁻ᵀ values`.
struct TriangularSolve<'a> {
    lower: &'a Tensor,
    transposed: bool,
}

impl InplaceOp1 for TriangularSolve<'_> {
    fn name(&self) -> &'static str {
        "triangular_solve"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (width, lanes) = layout.shape().dims2()?;
        let lower = doubles(self.lower)?;
        let lower = MatRef::from_row_major_slice(&lower, width, width);
        let (CpuStorage::F64(values), stride) = (storage, row_stride(layout)?) else {
            bail!("triangular_solve takes f64 values");
        };
        let values = &mut values[layout.start_offset()..][..(width - 1) * stride + lanes];
        // faer 0.24 takes the strides of a row-major one, to be written, for each other.
        let values = MatMut::from_column_major_slice_with_stride_mut(values, lanes, width, stride);
        let values = values.transpose_mut();
        match self.transposed {
            false => solve_lower_triangular_in_place(lower, values, Par::Seq),
            true => solve_upper_triangular_in_place(lower.transpose(), values, Par::Seq),
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        super::cuda::triangular_solve((storage, layout), self.lower, self.transposed)
    }
}

/// The values of an f64 matrix on the CPU, to be written.
pub(super) fn matrix_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a mut [f64]> {
    let stride = row_stride(layout)?;
    let (rows, columns) = layout.shape().dims2()?;
    match storage {
        CpuStorage::F64(values) if stride == columns => {
            Ok(&mut values[layout.start_offset()..][..rows * columns])
        }
        _ => bail!("this operation needs a contiguous f64 matrix"),
    }
}
