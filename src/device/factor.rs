//! A site's damped Hessian and its factor where the sums are: as [`crate::numerics::factor`], in whole matrices instead of panels.

use super::matrix::{product, select_rows};
use super::sums::Sums;
use super::{doubles, row_stride, values, vector};
use crate::error::{Error, Result};
use crate::numerics::factor::{ColumnOrder, Damped, damped, factor_block};
use crate::statistics::Product;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Tensor, bail};
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{MatMut, MatRef, Par};
use std::cell::Cell;

/// As [`crate::numerics::factor::Factor`]. Matrices are `[width, width]` f64.
#[derive(Debug)]
pub struct Factor {
    /// Order of the columns and damping.
    pub(crate) damped: Damped<Tensor>,
    /// The original column of each row of L, u32.
    pub(super) columns: Tensor,
    /// The row of L of each original column, u32.
    pub(super) rows: Tensor,
    /// XᵀX in original order, where it was asked for.
    pub(super) gram: Option<Tensor>,
    /// `X̃ᵀX − XᵀX` in original order, where the original model is matched.
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
        let diagonal = sum.flatten_all()?.index_select(&diagonal(sum)?, 0)?;
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
                filled(sum, &fill)
            })
            .transpose()?;
        let factors = damp_percents.into_iter().map(|damp_percent| {
            let damped = damped(
                site,
                &energies,
                damp_percent,
                column_order,
                |reversed, diagonal| {
                    let lower = hessian(sum, &inverse, &indices(reversed.iter()), Some(diagonal))?;
                    let cholesky = Cholesky(Cell::new(None));
                    lower.inplace_op1(&cholesky)?;
                    Ok(match cholesky.0.get() {
                        None => Ok(lower),
                        Some(pivot) => Err(pivot),
                    })
                },
            )?;
            let columns = indices(damped.order.iter().rev());
            let mut rows = vec![0u32; columns.len()];
            columns
                .iter()
                .zip(0..)
                .for_each(|(&column, row)| rows[column as usize] = row);
            Ok(Self {
                columns: vector(&columns, sum)?,
                rows: vector(&rows, sum)?,
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
        let lower = &self.damped.lower;
        let pivots = select_rows(&lower.reshape(((), 1))?, &diagonal(lower)?)?;
        Ok(select_rows(&pivots.sqr()?, &self.rows)?.squeeze(1)?)
    }

    /// As [`crate::numerics::factor::Factor::target`]: `weights` is `[width, lanes]` f64.
    pub(super) fn target(&self, weights: &Tensor, alpha: f64) -> Result<Tensor> {
        let Some(shift) = self.shift.as_ref().filter(|_| alpha != 0.0) else {
            return Ok(weights.clone());
        };
        let moved = select_rows(&product(&shift.t()?, weights)?, &self.columns)?;
        for transposed in [false, true] {
            let lower = &self.damped.lower;
            moved.inplace_op1(&TriangularSolve { lower, transposed })?;
        }
        Ok((weights + (select_rows(&moved, &self.rows)? * alpha)?)?)
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
fn whole(sums: &Tensor, inverse: &Tensor) -> Result<Tensor> {
    let order: Vec<u32> = (0..sums.dim(0)? as u32).collect();
    hessian(sums, inverse, &order, None)
}

/// See [`FillHessian`].
fn hessian(sums: &Tensor, inverse: &Tensor, order: &[u32], diagonal: Option<&[f64]>) -> Result<Tensor> {
    let fill = FillHessian {
        sums,
        inverse,
        order: vector(order, sums)?,
        diagonal: diagonal.map(|values| vector(values, sums)).transpose()?,
    };
    filled(sums, &fill)
}

/// A matrix as large as `like`, in f64, that `fill` has filled.
fn filled(like: &Tensor, fill: &impl InplaceOp1) -> Result<Tensor> {
    let out = Tensor::zeros(like.shape(), DType::F64, like.device())?;
    out.inplace_op1(fill)?;
    Ok(out)
}

/// As a kernel takes them.
fn indices<'a>(columns: impl Iterator<Item = &'a usize>) -> Vec<u32> {
    columns.map(|&column| column as u32).collect()
}

/// Where the diagonal of a square matrix is in its values.
fn diagonal(matrix: &Tensor) -> Result<Tensor> {
    let width = matrix.dim(0)? as u32;
    let places: Vec<u32> = (0..width).map(|i| i * (width + 1)).collect();
    Ok(vector(&places, matrix)?)
}

/// H of a symmetric product's sums in the order `order`: all of it, or its lower half with another diagonal, which is by original column.
struct FillHessian<'a> {
    sums: &'a Tensor,
    inverse: &'a Tensor,
    order: Tensor,
    diagonal: Option<Tensor>,
}

impl InplaceOp1 for FillHessian<'_> {
    fn name(&self) -> &'static str {
        "fill_hessian"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (width, _) = layout.shape().dims2()?;
        let out = matrix_mut(storage, layout)?;
        let (inverse, order) = (doubles(self.inverse)?, self.order.to_vec1::<u32>()?);
        let sums = values::<i64>(self.sums)?;
        let diagonal = self.diagonal.as_ref().map(doubles).transpose()?;
        for row in 0..width {
            let columns = if diagonal.is_some() { row + 1 } else { width };
            for column in 0..columns {
                let (a, b) = (order[row] as usize, order[column] as usize);
                out[row * width + column] = match &diagonal {
                    Some(diagonal) if row == column => diagonal[a],
                    _ => symmetric(&sums, &inverse, a, b),
                };
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        use super::cuda::{Arg, FACTOR, Threads, launch, pointer, pointer_at, u32_arg};
        let (width, _) = layout.shape().dims2()?;
        let diagonal = self.diagonal.as_ref().map_or(Ok(Arg::Pointer(0)), pointer)?;
        let args = [
            pointer_at(storage, layout)?,
            pointer(self.sums)?,
            pointer(self.inverse)?,
            pointer(&self.order)?,
            diagonal,
            u32_arg(width)?,
            Arg::U32(self.diagonal.is_none().into()),
        ];
        launch(
            &storage.device,
            FACTOR,
            "hessian",
            Threads::over(width, width),
            &args,
        )
    }
}

/// `M − H` in original order.
struct FillShift<'a> {
    cross: &'a Tensor,
    sums: &'a Tensor,
    inverse: &'a Tensor,
}

impl InplaceOp1 for FillShift<'_> {
    fn name(&self) -> &'static str {
        "fill_shift"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (width, _) = layout.shape().dims2()?;
        let out = matrix_mut(storage, layout)?;
        let inverse = doubles(self.inverse)?;
        let (cross, sums) = (values::<i64>(self.cross)?, values::<i64>(self.sums)?);
        for (i, out) in out.iter_mut().enumerate() {
            let (row, column) = (i / width, i % width);
            *out = cross[i] as f64 * inverse[row] * inverse[column] - symmetric(&sums, &inverse, row, column);
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        use super::cuda::{FACTOR, Threads, launch, pointer, pointer_at, u32_arg};
        let (width, _) = layout.shape().dims2()?;
        let args = [
            pointer_at(storage, layout)?,
            pointer(self.cross)?,
            pointer(self.sums)?,
            pointer(self.inverse)?,
            u32_arg(width)?,
        ];
        launch(
            &storage.device,
            FACTOR,
            "shift",
            Threads::over(width, width),
            &args,
        )
    }
}

fn symmetric(sums: &[i64], inverse: &[f64], a: usize, b: usize) -> f64 {
    let (row, column) = (a.min(b), a.max(b));
    sums[row * inverse.len() + column] as f64 * inverse[row] * inverse[column]
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

/// In place, for `[width, lanes]`: `L⁻¹ values`, or `L⁻ᵀ values`.
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
        let values = MatMut::from_row_major_slice_mut(matrix_mut(storage, layout)?, width, lanes);
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
