//! A site's damped Hessian and its factor where the sums are: as [`crate::numerics::factor`], with U = Lᵀ in the place of L, whose panels are
//! the same as those of the sums.

use super::hessian::{Shift, Symmetric};
use super::matrix::{matrix_mut, product, select_rows, subtract_product};
use super::panels::{PANEL_ROWS, Panels};
use super::sums::Sums;
use super::{doubles, row_stride, vector};
use crate::error::{Error, Result};
use crate::numerics::factor::{ColumnOrder, Damped, damped, factor_block};
use crate::statistics::Product;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Tensor, bail};
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{MatMut, MatRef, Par};
use std::cell::Cell;
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
    /// XᵀX in original order, where it was asked for.
    pub(super) gram: Option<Symmetric>,
    /// `X̃ᵀX − XᵀX` in original order, where the original model is matched.
    shift: Option<Shift>,
}

impl Factor {
    /// Factors `XᵀX` with each of these shares of damping; keeps its sums where `with_gram` asks for them. What the factors share is there once.
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
        let hessian = Symmetric::new(sum.clone(), sums.inverse_scales()?);
        let like = sum.values();
        let energies = hessian.diagonal()?;
        let cross = sums.product(Product::Cross).cloned();
        let shift = cross.map(|cross| Shift::new(cross, hessian.clone()));
        let factors = damp_percents.into_iter().map(|damp_percent| {
            let damped = damped(
                site,
                &energies,
                damp_percent,
                column_order,
                |reversed, diagonal| {
                    let order = vector(&indices(reversed.iter()), like)?;
                    let upper = hessian.ordered(order, vector(diagonal, like)?)?;
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
                columns: vector(&columns, like)?,
                rows: vector(&rows, like)?,
                gram: with_gram.then(|| hessian.clone()),
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
        let upper = &self.damped.triangle;
        let pivots = select_rows(&upper.values().reshape(((), 1))?, &upper.diagonal()?)?;
        Ok(select_rows(&pivots.sqr()?, &self.rows)?.squeeze(1)?)
    }

    /// As [`crate::numerics::factor::Factor::target`], for `weights` `[width, lanes]` f64; `None` where the target is the weights.
    pub(super) fn target(&self, weights: &Tensor, alpha: f64) -> Result<Option<Tensor>> {
        let Some(shift) = self.shift.as_ref().filter(|_| alpha != 0.0) else {
            return Ok(None);
        };
        let moved = select_rows(&shift.transposed_times(weights)?, &self.columns)?;
        self.solve(&moved)?;
        Ok(Some((weights + (select_rows(&moved, &self.rows)? * alpha)?)?))
    }

    /// In place: `H_d⁻¹ values`, for `[width, lanes]` in the order of U's rows.
    fn solve(&self, values: &Tensor) -> Result<()> {
        let upper = &self.damped.triangle;
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

/// XᵀX over held-out tokens, where it was summed.
///
/// # Errors
/// The device has no memory left.
pub fn held_out(sums: &Sums) -> Result<Option<Symmetric>> {
    let held_out = sums.product(Product::HeldOut);
    held_out
        .map(|sum| Ok(Symmetric::new(sum.clone(), sums.inverse_scales()?)))
        .transpose()
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
