//! From exact sums to the factor that the solver works with: damping, column order, one Cholesky factorization.

use super::gemm::{View, ViewMut, product};
use super::panels::{PANEL_ROWS, PANELS_TOGETHER, Panels, Shape};
use crate::error::{Error, Result};
use crate::memory::Room;
use faer::linalg::cholesky::llt;
use faer::linalg::triangular_solve;
use faer::{MatMut, MatRef, Par};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

/// Damping grows by this factor after a failed factorization …
const DAMP_GROWTH: f64 = 10.0;
/// … at most so many times.
const DAMP_RETRIES_MAX: u32 = 4;
/// Rows of a panel that a thread works on: half a panel, for two threads. More would make the products too flat.
const SLICE_ROWS: usize = PANEL_ROWS / 2;

/// In which order columns are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ColumnOrder {
    /// By descending diagonal of the Hessian ("act-order"), with groups and scales fixed in original order first, so that
    /// nothing of the order reaches the file.
    Static,
    /// As they come.
    None,
}

/// The damped Hessian of a site and its factor: `H_d = H + λI`, permuted `H_d[order, order] = R Rᵀ`, R upper.
///
/// What is kept is L, the lower factor of the same matrix in reversed order, in which R is `R_ij = L[n-1-i, n-1-j]`. One
/// factorization and no inverse: see Frantar et al., "GPTQ" (2022), for the inverse-Cholesky form and Chen et al., "The
/// Geometry of LLM Quantization" (2025), for its equality with Babai's nearest plane algorithm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Factor {
    /// `order[i]` is the original column that is quantized i-th.
    pub order: Vec<usize>,
    /// L: row and column `r` are original column `order[n - 1 - r]`.
    pub lower: Panels,
    /// XᵀX, full panels in original order, where it was asked for.
    pub gram: Option<Arc<Panels>>,
    /// What damping adds to the diagonal of XᵀX, in original order.
    pub damping: Vec<f64>,
    /// `X̃ᵀX − XᵀX`, original order, where the original model is matched.
    pub shift: Option<Arc<Panels>>,
    /// λ as a share of the mean diagonal, after retries.
    pub damp_percent: f64,
    /// Factorizations that failed before this one.
    pub retries: u32,
    /// Channels that no token woke: their columns are rounded plainly.
    pub dead: usize,
}

/// `M − H` in the place of `cross`, M = X̃ᵀX, for H in `gram`.
///
/// # Panics
/// The widths differ.
pub fn shift(mut cross: Panels, gram: &Panels) -> Panels {
    assert_eq!(cross.width(), gram.width());
    let mut subtrahend = vec![0.0; gram.width()];
    for panel in 0..cross.count() {
        let rows = cross.rows(panel);
        let mut values = cross.panel_mut(panel);
        for (row, values) in rows.zip(values.chunks_exact_mut(gram.width())) {
            gram.copy_row(row, &mut subtrahend);
            values.iter_mut().zip(&subtrahend).for_each(|(m, h)| *m -= h);
        }
    }
    cross
}

/// Panels of matrices in files that the factorization holds at a time: its own, and one that it reads.
pub const PANELS_HELD: u64 = PANELS_TOGETHER as u64 + 1;

/// How a Hessian is to be factored.
#[derive(Clone, Copy, Debug)]
pub struct Factoring<'a> {
    /// λ as a share of the mean diagonal.
    pub damp_percent: f64,
    /// Order of the columns.
    pub column_order: ColumnOrder,
    /// Where the factor is made.
    pub room: &'a Room,
    /// Threads; their number changes no bit.
    pub threads: usize,
}

/// A factor of a damped matrix, and what led to it.
#[derive(Debug)]
pub(crate) struct Damped<L> {
    /// As [`Factor::order`].
    pub(crate) order: Vec<usize>,
    /// As [`Factor::lower`], or its transpose.
    pub(crate) triangle: L,
    /// As [`Factor::damping`].
    pub(crate) damping: Vec<f64>,
    /// As [`Factor::damp_percent`].
    pub(crate) damp_percent: f64,
    /// As [`Factor::retries`].
    pub(crate) retries: u32,
    /// As [`Factor::dead`].
    pub(crate) dead: usize,
}

/// Chooses order and damping by the diagonal of XᵀX, `energies`, and factors with more damping until it goes. `factor` is given the order from
/// the last column to the first and the damped diagonal, in original order; it returns L, or its transpose, or the row of the pivot that is not positive.
///
/// # Errors
/// See [`Factor::new`]; those of `factor`.
pub(crate) fn damped<L>(
    site: &str,
    energies: &[f64],
    damp_percent: f64,
    column_order: ColumnOrder,
    mut factor: impl FnMut(&[usize], &[f64]) -> Result<Result<L, usize>>,
) -> Result<Damped<L>> {
    let width = energies.len();
    let failed = |pivot| Error::Factor {
        site: site.into(),
        pivot,
    };
    let mean = energies.iter().sum::<f64>() / width as f64;
    if !(mean.is_finite() && mean >= 0.0) {
        return Err(failed(0));
    }
    // With no token at all every column is plain rounding.
    let mean = if mean > 0.0 { mean } else { 1.0 };
    let mut order: Vec<usize> = (0..width).collect();
    if column_order == ColumnOrder::Static {
        order.sort_by(|&a, &b| energies[b].total_cmp(&energies[a]));
    }
    let reversed: Vec<usize> = order.iter().rev().copied().collect();
    let alive = |energy: f64| if energy <= 0.0 { mean } else { energy };
    let mut damp_percent = damp_percent;
    let mut retries = 0;
    loop {
        let diagonal: Vec<f64> = (energies.iter())
            .map(|&energy| alive(energy) + damp_percent * mean)
            .collect();
        match factor(&reversed, &diagonal)? {
            Ok(triangle) => {
                return Ok(Damped {
                    order,
                    triangle,
                    damping: diagonal.iter().zip(energies).map(|(d, e)| d - e).collect(),
                    damp_percent,
                    retries,
                    dead: energies.iter().filter(|energy| **energy <= 0.0).count(),
                });
            }
            Err(pivot) if retries == DAMP_RETRIES_MAX => return Err(failed(reversed[pivot])),
            Err(_) => damp_percent = damp_percent.max(1e-4) * DAMP_GROWTH,
        }
        retries += 1;
    }
}

impl Factor {
    /// Factors `gram = XᵀX`, upper or full panels; `shift` is kept along. `site` is for the error alone.
    ///
    /// A dead channel (zero diagonal) gets the mean diagonal and no cross terms: plain rounding of its column, whose
    /// weights may well live at run time.
    ///
    /// # Errors
    /// The matrix is not finite, or stays indefinite after four tenfold increases of the damping; the room has none left.
    pub fn new(site: &str, gram: &Panels, shift: Option<Arc<Panels>>, how: Factoring<'_>) -> Result<Self> {
        let width = gram.width();
        let mut row_of_gram = vec![0.0; width];
        let energies = gram.diagonal();
        let damped = damped(
            site,
            &energies,
            how.damp_percent,
            how.column_order,
            |reversed, diagonal| {
                let mut lower = Panels::from_rows(width, Shape::Lower, how.room, |row, values| {
                    gram.copy_row(reversed[row], &mut row_of_gram);
                    for (value, &column) in values[..row].iter_mut().zip(reversed) {
                        *value = row_of_gram[column];
                    }
                    values[row] = diagonal[reversed[row]];
                })?;
                Ok(cholesky(&mut lower, how.threads).map(|()| lower))
            },
        )?;
        Ok(Self {
            damping: damped.damping,
            order: damped.order,
            lower: damped.triangle,
            gram: None,
            shift,
            damp_percent: damped.damp_percent,
            retries: damped.retries,
            dead: damped.dead,
        })
    }

    /// Keeps XᵀX, full panels: refinement needs it.
    pub fn with_gram(mut self, gram: Arc<Panels>) -> Self {
        self.gram = Some(gram);
        self
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.order.len()
    }

    /// The original column of row `row` of [`Self::lower`].
    pub fn column(&self, row: usize) -> usize {
        self.order[self.width() - 1 - row]
    }

    /// `R_ii²` by original column: the variance of each given the later ones.
    pub fn importance(&self) -> Vec<f64> {
        let mut importance = vec![0.0; self.width()];
        for (row, pivot) in self.lower.diagonal().into_iter().enumerate() {
            importance[self.column(row)] = pivot * pivot;
        }
        importance
    }

    /// `y = H_d⁻¹ y` for `y [width, lanes]`, row-major, in original column order.
    pub fn solve(&self, y: &mut [f64]) {
        let lanes = y.len() / self.width();
        let mut ordered: Vec<f64> = Vec::with_capacity(y.len());
        for row in 0..self.width() {
            ordered.extend_from_slice(&y[self.column(row) * lanes..][..lanes]);
        }
        let panels = 0..self.lower.count();
        for panel in panels.clone() {
            let (rows, stride) = (self.lower.rows(panel), self.lower.columns(panel).len());
            let lower = self.lower.panel(panel);
            let (before, from) = ordered.split_at_mut(rows.start * lanes);
            if !before.is_empty() {
                product(
                    ViewMut::rows(from, rows.len(), lanes, lanes),
                    1.0,
                    View::rows(&lower, rows.len(), rows.start, stride),
                    View::rows(before, rows.start, lanes, lanes),
                    -1.0,
                );
            }
            let own = MatMut::from_row_major_slice_mut(&mut from[..rows.len() * lanes], rows.len(), lanes);
            let triangle = diagonal_block(&lower, rows.start, rows.len(), stride);
            triangular_solve::solve_lower_triangular_in_place(triangle, own, Par::Seq);
        }
        for panel in panels.rev() {
            let (rows, stride) = (self.lower.rows(panel), self.lower.columns(panel).len());
            let lower = self.lower.panel(panel);
            let (before, from) = ordered.split_at_mut(rows.start * lanes);
            let own = &mut from[..rows.len() * lanes];
            let triangle = diagonal_block(&lower, rows.start, rows.len(), stride);
            triangular_solve::solve_upper_triangular_in_place(
                triangle.transpose(),
                MatMut::from_row_major_slice_mut(own, rows.len(), lanes),
                Par::Seq,
            );
            if !before.is_empty() {
                product(
                    ViewMut::rows(before, rows.start, lanes, lanes),
                    1.0,
                    View::rows(&lower, rows.len(), rows.start, stride).transposed(),
                    View::rows(own, rows.len(), lanes, lanes),
                    -1.0,
                );
            }
        }
        for (row, values) in ordered.chunks_exact(lanes).enumerate() {
            y[self.column(row) * lanes..][..lanes].copy_from_slice(values);
        }
    }

    /// The target that pulls a layer toward the original model's activations: `W* = W + α W (M − H) H_d⁻¹`, M = X̃ᵀX, for
    /// `weights [width, lanes]` (a weight row a lane). At α = 1 it minimises ‖W X̃ − W* X‖² + λ‖W − W*‖².
    pub fn target(&self, weights: &[f64], alpha: f64) -> Vec<f64> {
        let width = self.width();
        let lanes = weights.len() / width;
        let Some(shift) = self.shift.as_ref().filter(|_| alpha != 0.0) else {
            return weights.to_vec();
        };
        let mut moved = vec![0.0; weights.len()];
        for panel in 0..shift.count() {
            let rows = shift.rows(panel);
            product(
                ViewMut::rows(&mut moved, width, lanes, lanes),
                1.0,
                View::rows(&shift.panel(panel), rows.len(), width, width).transposed(),
                View::rows(&weights[rows.start * lanes..], rows.len(), lanes, lanes),
                alpha,
            );
        }
        self.solve(&mut moved);
        moved.iter_mut().zip(weights).for_each(|(m, w)| *m += w);
        moved
    }
}

/// The square on the diagonal of a lower panel.
fn diagonal_block(panel: &[f64], first: usize, rows: usize, stride: usize) -> MatRef<'_, f64> {
    MatRef::from_row_major_slice_with_stride(&panel[first..], rows, rows, stride)
}

/// The lower factor in the place of the matrix, or the row of the pivot that is not positive. Left-looking, some panels together: of
/// those before them one at a time is needed, once for all. `threads` share the rows; how they are cut does not depend on how many
/// there are.
fn cholesky(lower: &mut Panels, threads: usize) -> Result<(), usize> {
    for first in (0..lower.count()).step_by(PANELS_TOGETHER) {
        let together = first..lower.count().min(first + PANELS_TOGETHER);
        let rows: Vec<_> = together.clone().map(|panel| lower.rows(panel)).collect();
        let (before, mut own) = lower.before_and_at(together);
        for (earlier, panel) in before.iter().enumerate() {
            let slices = own.iter_mut().zip(&rows);
            let slices = slices.flat_map(|(own, rows)| slices_of(own, rows.end));
            eliminate(&panel.read(), earlier, slices.collect(), threads);
        }
        for (at, rows) in rows.iter().enumerate() {
            let (done, rest) = own.split_at_mut(at);
            let own = &mut rest[0];
            for (earlier, panel) in done.iter().enumerate() {
                eliminate(
                    panel,
                    first + earlier,
                    slices_of(own, rows.end).collect(),
                    threads,
                );
            }
            factor_diagonal(own, rows)?;
        }
    }
    Ok(())
}

/// Some rows of a panel, and how many columns it has.
type Slice<'a> = (&'a mut [f64], usize);

fn slices_of(panel: &mut [f64], stride: usize) -> impl Iterator<Item = Slice<'_>> {
    let slices = panel.chunks_mut(SLICE_ROWS * stride);
    slices.map(move |slice| (slice, stride))
}

/// The columns of panel `earlier`, whose factor is `lower`, in rows below it: `X = A L⁻ᵀ`.
fn eliminate(lower: &[f64], earlier: usize, mut slices: Vec<Slice<'_>>, threads: usize) {
    let share = slices.len().div_ceil(threads.max(1));
    std::thread::scope(|scope| {
        let mut shares = slices.chunks_mut(share.max(1));
        let own = shares.next();
        let all = |slices: &mut [Slice<'_>]| {
            for (rows, stride) in slices {
                eliminate_slice(lower, earlier, rows, *stride);
            }
        };
        for others in shares {
            scope.spawn(move || all(others));
        }
        own.into_iter().for_each(all);
    });
}

fn eliminate_slice(lower: &[f64], earlier: usize, own: &mut [f64], stride: usize) {
    let rows = own.len() / stride;
    let columns = earlier * PANEL_ROWS..(earlier + 1) * PANEL_ROWS;
    let mut block = vec![0.0; rows * PANEL_ROWS];
    for (out, row) in block.chunks_exact_mut(PANEL_ROWS).zip(own.chunks_exact(stride)) {
        out.copy_from_slice(&row[columns.clone()]);
    }
    if columns.start > 0 {
        product(
            ViewMut::rows(&mut block, rows, PANEL_ROWS, PANEL_ROWS),
            1.0,
            View::rows(own, rows, columns.start, stride),
            View::rows(lower, PANEL_ROWS, columns.start, columns.end).transposed(),
            -1.0,
        );
    }
    let values = MatMut::from_row_major_slice_mut(&mut block, rows, PANEL_ROWS);
    triangular_solve::solve_lower_triangular_in_place(
        diagonal_block(lower, columns.start, PANEL_ROWS, columns.end),
        values.transpose_mut(),
        Par::Seq,
    );
    for (row, values) in own.chunks_exact_mut(stride).zip(block.chunks_exact(PANEL_ROWS)) {
        row[columns.clone()].copy_from_slice(values);
    }
}

/// The square on the diagonal of a panel whose columns before it are done.
fn factor_diagonal(panel: &mut [f64], rows: &Range<usize>) -> Result<(), usize> {
    let stride = rows.end;
    let mut block = vec![0.0; rows.len() * rows.len()];
    for (out, row) in block.chunks_exact_mut(rows.len()).zip(panel.chunks_exact(stride)) {
        out.copy_from_slice(&row[rows.clone()]);
    }
    if rows.start > 0 {
        let left = View::rows(panel, rows.len(), rows.start, stride);
        product(
            ViewMut::rows(&mut block, rows.len(), rows.len(), rows.len()),
            1.0,
            left,
            left.transposed(),
            -1.0,
        );
    }
    factor_block(MatMut::from_row_major_slice_mut(
        &mut block,
        rows.len(),
        rows.len(),
    ))
    .map_err(|pivot| rows.start + pivot)?;
    for (i, (row, values)) in (panel.chunks_exact_mut(stride))
        .zip(block.chunks_exact(rows.len()))
        .enumerate()
    {
        row[rows.start..][..=i].copy_from_slice(&values[..=i]);
    }
    Ok(())
}

/// Cholesky of a block in memory; the half above the diagonal is left as it was.
pub(crate) fn factor_block(mut block: MatMut<'_, f64>) -> Result<(), usize> {
    let width = block.nrows();
    let scratch = llt::factor::cholesky_in_place_scratch::<f64>(width, Par::Seq, Default::default());
    let mut memory = faer::dyn_stack::MemBuffer::new(scratch);
    llt::factor::cholesky_in_place(
        block.as_mut(),
        Default::default(),
        Par::Seq,
        faer::dyn_stack::MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|error| match error {
        llt::factor::LltError::NonPositivePivot { index } => index,
    })?;
    let usable = |i: &usize| block[(*i, *i)] > 0.0 && block[(*i, *i)].is_finite();
    match (0..width).find(|i| !usable(i)) {
        Some(pivot) => Err(pivot),
        None => Ok(()),
    }
}
