//! Scales and zero points of a chunk of rows, by search.
//!
//! Layout: weights of a chunk are transposed, `[columns, lanes]`, a weight row a lane, so that the loops run along lanes.

use super::simd::vectorized;
use super::{Grid, QuantizedWeight, bits};

/// Shrink factors tried of the min–max scale: from 1 down to [`SHRINK_MIN`].
const SHRINKS: usize = 40;
/// Smallest shrink factor tried.
const SHRINK_MIN: f64 = 0.35;

/// Scales and zero points, `[groups, lanes]` each.
#[derive(Clone, Debug, PartialEq)]
pub struct Scales {
    /// Exactly representable in the grid's storage dtype.
    pub scale: Vec<f64>,
    /// Integers in `0..=max_code`.
    pub zero: Vec<f64>,
}

/// Picks, per lane and group, the shrink of the min–max range that minimises `Σ importance[c] (w − Q(w))²` over the group.
///
/// `weights` is `[columns, lanes]`; `importance` has an entry a column (R_ii², the conditional variance, for GPTQ; ones for
/// plain rounding). Scales are rounded to their storage dtype before they are judged.
///
/// # Panics
/// The lengths do not fit, or the group size does not divide the columns.
pub fn search(weights: &[f64], lanes: usize, importance: &[f64], grid: Grid) -> Scales {
    let columns = importance.len();
    let group = grid.group_size;
    assert!(weights.len() == columns * lanes && columns.is_multiple_of(group));
    let groups = columns / group;
    let mut found = Scales {
        scale: vec![0.0; groups * lanes],
        zero: vec![0.0; groups * lanes],
    };
    let mut lane = Lanes::new(lanes);
    for g in 0..groups {
        let weights = &weights[g * group * lanes..][..group * lanes];
        let importance = &importance[g * group..][..group];
        lane.range(weights, grid.symmetric);
        lane.best_error.fill(f64::INFINITY);
        let (scale, zero) = (
            &mut found.scale[g * lanes..][..lanes],
            &mut found.zero[g * lanes..][..lanes],
        );
        for step in 0..SHRINKS {
            let shrink = 1.0 - (1.0 - SHRINK_MIN) * step as f64 / (SHRINKS - 1) as f64;
            lane.candidate(grid, shrink);
            lane.judge(weights, importance, f64::from(grid.max_code()));
            lane.keep_better(scale, zero);
        }
    }
    found
}

/// Working memory, an entry a lane.
struct Lanes {
    low: Vec<f64>,
    high: Vec<f64>,
    scale: Vec<f64>,
    inverse: Vec<f64>,
    zero: Vec<f64>,
    error: Vec<f64>,
    best_error: Vec<f64>,
}

impl Lanes {
    fn new(lanes: usize) -> Self {
        let zeros = || vec![0.0; lanes];
        Self {
            low: zeros(),
            high: zeros(),
            scale: zeros(),
            inverse: zeros(),
            zero: zeros(),
            error: zeros(),
            best_error: zeros(),
        }
    }

    /// The range that the unshrunk grid covers; it always contains 0.
    fn range(&mut self, weights: &[f64], symmetric: bool) {
        self.low.fill(0.0);
        self.high.fill(0.0);
        for row in weights.chunks_exact(self.low.len()) {
            for ((low, high), &w) in self.low.iter_mut().zip(&mut self.high).zip(row) {
                *low = low.min(w);
                *high = high.max(w);
            }
        }
        if symmetric {
            for (low, high) in self.low.iter_mut().zip(&mut self.high) {
                *high = high.max(-*low);
                *low = -*high;
            }
        }
    }

    fn candidate(&mut self, grid: Grid, shrink: f64) {
        let steps = f64::from(grid.max_code());
        for i in 0..self.scale.len() {
            let scale = grid
                .scale_dtype
                .round((self.high[i] - self.low[i]) * shrink / steps);
            self.scale[i] = scale;
            self.inverse[i] = scale.recip();
            self.zero[i] = if grid.symmetric {
                f64::from(grid.symmetric_zero())
            } else {
                (-self.low[i] * shrink / scale)
                    .round_ties_even()
                    .clamp(0.0, steps)
            };
        }
    }

    fn judge(&mut self, weights: &[f64], importance: &[f64], max_code: f64) {
        let lanes = self.scale.len();
        self.error.fill(0.0);
        let (scale, inverse, zero, error) = (
            &self.scale[..],
            &self.inverse[..],
            &self.zero[..],
            &mut self.error[..],
        );
        vectorized!({
            for (row, &importance) in weights.chunks_exact(lanes).zip(importance) {
                for i in 0..lanes {
                    let code = (row[i] * inverse[i] + zero[i])
                        .round_ties_even()
                        .max(0.0)
                        .min(max_code);
                    let miss = row[i] - (code - zero[i]) * scale[i];
                    error[i] += importance * miss * miss;
                }
            }
        });
    }

    fn keep_better(&mut self, scale: &mut [f64], zero: &mut [f64]) {
        for i in 0..scale.len() {
            if self.error[i] < self.best_error[i] {
                self.best_error[i] = self.error[i];
                scale[i] = self.scale[i];
                zero[i] = self.zero[i];
            }
        }
    }
}

/// The codes of a chunk `[columns, lanes]` in original order, with their scales, as a row-major [`QuantizedWeight`].
pub fn assemble(codes: &[f64], lanes: usize, scales: &Scales, grid: Grid) -> QuantizedWeight {
    let columns = codes.len() / lanes;
    let width = bits::words(columns, grid.bits);
    let mut packed = vec![0; lanes * width];
    for (lane, words) in packed.chunks_exact_mut(width).enumerate() {
        let codes = codes[lane..].iter().step_by(lanes).map(|&code| code as u8);
        bits::pack_row(codes, grid.bits, words);
    }
    QuantizedWeight {
        grid,
        rows: lanes,
        columns,
        codes: packed,
        scales: transposed(&scales.scale, lanes, |scale| scale as f32),
        zeros: transposed(&scales.zero, lanes, |zero| zero as u8),
    }
}

/// `[rows, lanes]` → `[lanes, rows]`
fn transposed<T>(values: &[f64], lanes: usize, narrow: impl Fn(f64) -> T) -> Vec<T> {
    let mut out = Vec::with_capacity(values.len());
    for lane in 0..lanes {
        out.extend(values[lane..].iter().step_by(lanes).map(|&value| narrow(value)));
    }
    out
}
