//! The solvers: pure functions from a chunk of weight rows (and a [`Factor`]) to codes and their error.
//!
//! Rows do not interact, so any split into chunks gives the same codes; chunks are the unit of parallel work. Everything
//! is f64: on a CPU the solve is a few percent of a run, and codes then do not depend on rounding luck.

use super::factor::Factor;
use super::gemm::{Real, View, ViewMut, product};
use super::panels::{PANEL_ROWS, Panels};
use super::refine::{Hessian, refine};
use super::scales::{Scales, assemble, search};
use super::simd::vectorized;
use super::{Grid, QuantizedWeight};
use serde::{Deserialize, Serialize};

/// Columns between two GEMMs within a panel of the sweep.
const SWEEP_BLOCK: usize = 64;

/// Switches of the GPTQ solver.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptqOptions {
    /// α of the asymmetric target; 0 keeps the weights as they are.
    pub match_original: f64,
    /// Rounds of scale refit and coordinate descent after the sweep.
    pub refine_rounds: usize,
}

/// Some rows of a linear, solved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SolvedRows {
    /// Codes, scales and zero points of these rows.
    pub weight: QuantizedWeight,
    /// ‖(W* − Q) R‖²: the squared error of the outputs over the calibration tokens, damping included.
    pub error: f64,
    /// ‖W* R‖²: the same of a layer of zeros.
    pub energy: f64,
    /// Codes at either end of the grid that clip their target.
    pub clipped: u64,
}

/// Rounds `weights` (`[rows, columns]`, row-major) to nearest on searched scales; no statistics.
pub fn round_to_nearest(weights: &[f32], columns: usize, grid: Grid) -> SolvedRows {
    let lanes = weights.len() / columns;
    let target = transposed(weights, columns);
    let scales = search(&target, lanes, &vec![1.0; columns], grid);
    let mut codes = vec![0.0; target.len()];
    let (mut error, mut energy, mut clipped) = (0.0, 0.0, 0);
    for c in 0..columns {
        let g = c / grid.group_size;
        for lane in 0..lanes {
            let (w, scale, zero) = (
                target[c * lanes + lane],
                scales.scale[g * lanes + lane],
                scales.zero[g * lanes + lane],
            );
            let free = (w / scale + zero).round_ties_even();
            let code = free.clamp(0.0, f64::from(grid.max_code()));
            clipped += u64::from(code != free);
            codes[c * lanes + lane] = code;
            error += (w - (code - zero) * scale).powi(2);
            energy += w * w;
        }
    }
    SolvedRows {
        weight: assemble(&codes, lanes, &scales, grid),
        error,
        energy,
        clipped,
    }
}

/// GPTQ in Babai form with static groups, on `weights` (`[rows, columns]`, row-major).
///
/// Scales are fixed first, in original column order, by a search weighted with R_ii²; then columns are rounded in the
/// factor's order, each one's error fed to the later ones: `t_i = w_i + Σ_{j<i} e_j R_ji / R_ii`.
///
/// # Panics
/// The weights' width is not the factor's, or they are to be refined and the factor has no Hessian.
pub fn gptq(weights: &[f32], factor: &Factor, grid: Grid, options: GptqOptions) -> SolvedRows {
    let width = factor.width();
    let lanes = weights.len() / width;
    let target = factor.target(&transposed(weights, width), options.match_original);
    let mut scales = search(&target, lanes, &factor.importance(), grid);
    let mut swept = sweep(&target, lanes, factor, &scales, grid);
    if options.refine_rounds > 0 {
        let hessian = Hessian {
            gram: factor.gram.as_ref().expect("refinement needs the Hessian"),
            damping: &factor.damping,
        };
        let rounds = options.refine_rounds;
        swept.error = refine(&target, &mut swept.codes, &mut scales, hessian, grid, rounds);
    }
    SolvedRows {
        weight: assemble(&swept.codes, lanes, &scales, grid),
        error: swept.error,
        energy: swept.energy,
        clipped: swept.clipped,
    }
}

/// `(tr((W − Q) H (W − Q)ᵀ), tr(W H Wᵀ))` for `weights` and `quantized`, `[rows, width]`, and `hessian`, upper panels: the squared
/// error of the outputs over the tokens of `hessian`, and their energy.
pub fn output_error(weights: &[f32], quantized: &[f32], hessian: &Panels) -> (f64, f64) {
    let energy = |values: &[f64]| {
        let moved = hessian.symmetric_product(values);
        moved.iter().zip(values).map(|(m, v)| m * v).sum::<f64>()
    };
    let whole: Vec<f64> = weights.iter().map(|&w| f64::from(w)).collect();
    let pairs = weights.iter().zip(quantized);
    let left: Vec<f64> = pairs.map(|(&w, &q)| f64::from(w) - f64::from(q)).collect();
    (energy(&left), energy(&whole))
}

struct Swept {
    /// `[width, lanes]`, original column order.
    codes: Vec<f64>,
    error: f64,
    energy: f64,
    clipped: u64,
}

/// Error feedback. Columns go in the factor's order, so the rows of L from the last to the first; a GEMM brings the errors of a panel
/// of them to all later columns: each panel of L is read once.
fn sweep(target: &[f64], lanes: usize, factor: &Factor, scales: &Scales, grid: Grid) -> Swept {
    let lower = &factor.lower;
    let mut codes = vec![0.0; target.len()];
    // Both by row of L: Σ e_j R_ji of the columns before, and W* R.
    let mut carried = vec![0.0; target.len()];
    let mut outputs = vec![0f32; target.len()];
    let panel_rows = PANEL_ROWS.min(factor.width());
    let (mut wanted, mut errors) = (vec![0.0; panel_rows * lanes], vec![0.0; panel_rows * lanes]);
    let mut narrow = vec![0f32; panel_rows * factor.width()];
    let (mut error, mut clipped) = (0.0, 0);
    for panel in (0..lower.count()).rev() {
        let (rows, l) = (lower.rows(panel), lower.panel(panel));
        let stride = rows.end;
        for (row, wanted) in rows.clone().zip(wanted.chunks_exact_mut(lanes)) {
            wanted.copy_from_slice(&target[factor.column(row) * lanes..][..lanes]);
        }
        for begin in rows.clone().step_by(SWEEP_BLOCK).rev() {
            let block = begin..rows.end.min(begin + SWEEP_BLOCK);
            for row in block.clone().rev() {
                let at = row - rows.start;
                let column = factor.column(row);
                let group = column / grid.group_size;
                let (later, mine) = carried.split_at_mut(row * lanes);
                let step = Column {
                    target: &wanted[at * lanes..][..lanes],
                    carried: &mine[..lanes],
                    scale: &scales.scale[group * lanes..][..lanes],
                    zero: &scales.zero[group * lanes..][..lanes],
                    max_code: f64::from(grid.max_code()),
                    pivot: l[at * stride + row],
                };
                let e = &mut errors[at * lanes..][..lanes];
                let (squares, clips) = step.round(&mut codes[column * lanes..][..lanes], e);
                error += squares;
                clipped += clips;
                feed(&mut later[begin * lanes..], &l[at * stride..][begin..row], e);
            }
            // The rest of the panel.
            let first = (begin - rows.start) * stride + rows.start;
            spread(
                &mut carried[rows.start * lanes..begin * lanes],
                View::rows(&l[first..], block.len(), begin - rows.start, stride),
                View::rows(&errors[(begin - rows.start) * lanes..], block.len(), lanes, lanes),
            );
        }
        spread(
            &mut carried[..rows.start * lanes],
            View::rows(&l, rows.len(), rows.start, stride),
            View::rows(&errors, rows.len(), lanes, lanes),
        );
        // The energy is told and decides no code: single precision is enough, at half the time.
        let narrow = &mut narrow[..l.len()];
        narrow
            .iter_mut()
            .zip(&*l)
            .for_each(|(to, from)| *to = *from as f32);
        let wanted: Vec<f32> = wanted[..rows.len() * lanes].iter().map(|&w| w as f32).collect();
        spread(
            &mut outputs[..rows.end * lanes],
            View::rows(narrow, rows.len(), rows.end, stride),
            View::rows(&wanted, rows.len(), lanes, lanes),
        );
    }
    Swept {
        codes,
        error,
        energy: outputs.iter().map(|&v| f64::from(v).powi(2)).sum(),
        clipped,
    }
}

/// `out += lᵀ · values`
fn spread<T: Real>(out: &mut [T], l: View<'_, T>, values: View<'_, T>) {
    let lanes = values.columns();
    product(
        ViewMut::rows(out, l.columns(), lanes, lanes),
        T::ONE,
        l.transposed(),
        values,
        T::ONE,
    );
}

/// One column of the sweep, an entry a lane.
struct Column<'a> {
    target: &'a [f64],
    carried: &'a [f64],
    scale: &'a [f64],
    zero: &'a [f64],
    max_code: f64,
    pivot: f64,
}

impl Column<'_> {
    /// Rounds the column; returns the sum of squared residuals times R_ii², and the number of clipped codes.
    fn round(&self, codes: &mut [f64], errors: &mut [f64]) -> (f64, u64) {
        let inverse = self.pivot.recip();
        vectorized!({
            let (mut squares, mut clipped) = (0.0, 0.0);
            for lane in 0..codes.len() {
                let (w, scale, zero) = (self.target[lane], self.scale[lane], self.zero[lane]);
                let t = w + self.carried[lane] * inverse;
                let free = (t / scale + zero).round_ties_even();
                let code = free.max(0.0).min(self.max_code);
                let value = (code - zero) * scale;
                codes[lane] = code;
                errors[lane] = w - value;
                let residual = (t - value) * self.pivot;
                squares += residual * residual;
                clipped += if code == free { 0.0 } else { 1.0 };
            }
            (squares, clipped as u64)
        })
    }
}

/// `later[k] += errors * r[k]` for the columns left in the block.
fn feed(later: &mut [f64], r: &[f64], errors: &[f64]) {
    vectorized!({
        for (row, &r) in later.chunks_exact_mut(errors.len()).zip(r) {
            for (value, &e) in row.iter_mut().zip(errors) {
                *value += e * r;
            }
        }
    });
}

/// `[rows, columns]` f32 → `[columns, rows]` f64
pub(super) fn transposed(weights: &[f32], columns: usize) -> Vec<f64> {
    let rows = weights.len() / columns;
    let mut out = vec![0.0; weights.len()];
    for (row, values) in weights.chunks_exact(columns).enumerate() {
        for (column, &value) in values.iter().enumerate() {
            out[column * rows + row] = f64::from(value);
        }
    }
    out
}
