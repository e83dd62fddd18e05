//! The solvers: pure functions from a chunk of weight rows (and a [`Factor`]) to codes and their error.
//!
//! Rows do not interact, so any split into chunks gives the same codes; chunks are the unit of parallel work. Everything
//! is f64: on a CPU the solve is a few percent of a run, and codes then do not depend on rounding luck.

use super::factor::Factor;
use super::gemm::{View, ViewMut, product};
use super::refine::refine;
use super::scales::{Scales, assemble, search};
use super::simd::vectorized;
use super::{Grid, QuantizedWeight};
use serde::{Deserialize, Serialize};

/// Columns between two GEMMs of the sweep.
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
/// The weights' width is not the factor's.
pub fn gptq(weights: &[f32], factor: &Factor, grid: Grid, options: GptqOptions) -> SolvedRows {
    let width = factor.width;
    let lanes = weights.len() / width;
    let target = factor.target(&transposed(weights, width), options.match_original);
    let mut importance = vec![0.0; width];
    for (i, &column) in factor.order.iter().enumerate() {
        importance[column] = factor.r[i * width + i].powi(2);
    }
    let mut scales = search(&target, lanes, &importance, grid);
    let mut swept = sweep(&target, lanes, factor, &scales, grid);
    if options.refine_rounds > 0 {
        swept.error = refine(
            &target,
            &mut swept.codes,
            &mut scales,
            factor,
            grid,
            options.refine_rounds,
        );
    }
    SolvedRows {
        weight: assemble(&swept.codes, lanes, &scales, grid),
        error: swept.error,
        energy: swept.energy,
        clipped: swept.clipped,
    }
}

/// `(tr((W − Q) H (W − Q)ᵀ), tr(W H Wᵀ))` for `weights` and `quantized`, `[rows, width]`, and `hessian`, `[width, width]`: the squared
/// error of the outputs over the tokens of `hessian`, and their energy.
pub fn output_error(weights: &[f32], quantized: &[f32], hessian: &[f64]) -> (f64, f64) {
    let width = hessian.len().isqrt();
    let rows = weights.len() / width;
    let energy = |values: &[f64]| {
        let mut moved = vec![0.0; values.len()];
        product(
            ViewMut::rows(&mut moved, rows, width, width),
            0.0,
            View::rows(values, rows, width, width),
            View::rows(hessian, width, width, width),
            1.0,
        );
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

/// Error feedback, blocked and left-looking: one GEMM brings the errors of all earlier columns to a block of columns, of which only
/// that panel of R is needed at a time.
fn sweep(target: &[f64], lanes: usize, factor: &Factor, scales: &Scales, grid: Grid) -> Swept {
    let width = factor.width;
    let mut codes = vec![0.0; target.len()];
    // In the factor's order.
    let ordered: Vec<f64> = factor
        .order
        .iter()
        .flat_map(|&c| &target[c * lanes..][..lanes])
        .copied()
        .collect();
    let mut errors = vec![0.0; target.len()];
    let mut carried = vec![0.0; SWEEP_BLOCK * lanes];
    let (mut error, mut energy, mut clipped) = (0.0, 0.0, 0);
    for begin in (0..width).step_by(SWEEP_BLOCK) {
        let block = SWEEP_BLOCK.min(width - begin);
        let panel = |rows: usize| View::rows(&factor.r[begin..], rows, block, width).transposed();
        let carry = |out: &mut [f64], rows: usize, of: &[f64]| {
            product(
                ViewMut::rows(out, block, lanes, lanes),
                0.0,
                panel(rows),
                View::rows(of, rows, lanes, lanes),
                1.0,
            );
        };
        // (W* R) of these columns, for the energy; then the errors that they inherit.
        carry(&mut carried, begin + block, &ordered);
        energy += carried[..block * lanes].iter().map(|v| v * v).sum::<f64>();
        carry(&mut carried, begin, &errors);
        if begin == 0 {
            carried.fill(0.0);
        }
        for i in 0..block {
            let row = &factor.r[(begin + i) * width + begin..][..block];
            let column = factor.order[begin + i];
            let group = column / grid.group_size;
            let (mine, later) = carried[i * lanes..block * lanes].split_at_mut(lanes);
            let step = Column {
                target: &ordered[(begin + i) * lanes..][..lanes],
                carried: mine,
                scale: &scales.scale[group * lanes..][..lanes],
                zero: &scales.zero[group * lanes..][..lanes],
                max_code: f64::from(grid.max_code()),
                pivot: row[i],
            };
            let e = &mut errors[(begin + i) * lanes..][..lanes];
            let (squares, clips) = step.round(&mut codes[column * lanes..][..lanes], e);
            error += squares;
            clipped += clips;
            feed(later, &row[i + 1..], e);
        }
    }
    Swept {
        codes,
        error,
        energy,
        clipped,
    }
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
fn transposed(weights: &[f32], columns: usize) -> Vec<f64> {
    let rows = weights.len() / columns;
    let mut out = vec![0.0; weights.len()];
    for (row, values) in weights.chunks_exact(columns).enumerate() {
        for (column, &value) in values.iter().enumerate() {
            out[column * rows + row] = f64::from(value);
        }
    }
    out
}
