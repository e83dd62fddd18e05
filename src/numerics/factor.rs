//! From exact sums to the factor that the solver works with: damping, column order, one Cholesky factorization.

use super::gemm::{View, ViewMut, product};
use crate::error::{Error, Result};
use faer::linalg::cholesky::llt;
use faer::linalg::triangular_solve;
use faer::{MatMut, MatRef, Par};
use serde::{Deserialize, Serialize};

/// Damping grows by this factor after a failed factorization …
const DAMP_GROWTH: f64 = 10.0;
/// … at most so many times.
const DAMP_RETRIES_MAX: u32 = 4;

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
/// One factorization and no inverse: see Frantar et al., "GPTQ" (2022), for the inverse-Cholesky form and Chen et al., "The
/// Geometry of LLM Quantization" (2025), for its equality with Babai's nearest plane algorithm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Factor {
    /// Channels.
    pub width: usize,
    /// `order[i]` is the original column that is quantized i-th.
    pub order: Vec<usize>,
    /// R, `[width, width]` row-major, zero below the diagonal, in `order`.
    pub r: Vec<f64>,
    /// `H_d`, `[width, width]`, in original order.
    pub hessian: Vec<f64>,
    /// `X̃ᵀX − XᵀX`, original order, where the original model is matched.
    pub shift: Option<Vec<f64>>,
    /// λ as a share of the mean diagonal, after retries.
    pub damp_percent: f64,
    /// Factorizations that failed before this one.
    pub retries: u32,
    /// Channels that no token woke: their columns are rounded plainly.
    pub dead: usize,
}

impl Factor {
    /// Factors `gram = XᵀX`, `[width, width]`; `cross = X̃ᵀX` likewise. `site` is for the error alone.
    ///
    /// A dead channel (zero diagonal) gets the mean diagonal and no cross terms: plain rounding of its column, whose
    /// weights may well live at run time.
    ///
    /// # Errors
    /// The matrix is not finite, or stays indefinite after four tenfold increases of the damping.
    pub fn new(
        site: &str,
        mut gram: Vec<f64>,
        cross: Option<Vec<f64>>,
        damp_percent: f64,
        column_order: ColumnOrder,
    ) -> Result<Self> {
        let width = gram.len().isqrt();
        let diagonal: Vec<f64> = (0..width).map(|i| gram[i * width + i]).collect();
        let mean = diagonal.iter().sum::<f64>() / width as f64;
        if !(mean.is_finite() && mean >= 0.0) {
            return Err(Error::Factor {
                site: site.into(),
                pivot: 0,
            });
        }
        // With no token at all every column is plain rounding.
        let mean = if mean > 0.0 { mean } else { 1.0 };
        let shift = cross.map(|cross| cross.iter().zip(&gram).map(|(m, h)| m - h).collect());
        let mut order: Vec<usize> = (0..width).collect();
        if column_order == ColumnOrder::Static {
            order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
        }
        let mut dead = 0;
        for (i, &energy) in diagonal.iter().enumerate() {
            if energy <= 0.0 {
                dead += 1;
                gram[i * width + i] = mean;
            }
        }
        let mut damp = damp_percent;
        for retries in 0..=DAMP_RETRIES_MAX {
            let lambda = damp * mean;
            match factor(&gram, width, &order, lambda) {
                Ok(r) => {
                    (0..width).for_each(|i| gram[i * width + i] += lambda);
                    return Ok(Self {
                        width,
                        order,
                        r,
                        hessian: gram,
                        shift,
                        damp_percent: damp,
                        retries,
                        dead,
                    });
                }
                Err(pivot) if retries == DAMP_RETRIES_MAX => {
                    return Err(Error::Factor {
                        site: site.into(),
                        pivot: order[pivot],
                    });
                }
                Err(_) => damp = damp.max(1e-4) * DAMP_GROWTH,
            }
        }
        unreachable!("the last retry returns")
    }

    /// `y = H_d⁻¹ y` for `y [width, lanes]`, row-major, in original column order.
    pub fn solve(&self, y: &mut [f64]) {
        let lanes = y.len() / self.width;
        let mut ordered: Vec<f64> = Vec::with_capacity(y.len());
        for &column in &self.order {
            ordered.extend_from_slice(&y[column * lanes..][..lanes]);
        }
        let r = MatRef::from_row_major_slice(&self.r, self.width, self.width);
        let mut rhs = MatMut::from_row_major_slice_mut(&mut ordered, self.width, lanes);
        triangular_solve::solve_upper_triangular_in_place(r, rhs.as_mut(), Par::Seq);
        triangular_solve::solve_lower_triangular_in_place(r.transpose(), rhs, Par::Seq);
        for (row, &column) in ordered.chunks_exact(lanes).zip(&self.order) {
            y[column * lanes..][..lanes].copy_from_slice(row);
        }
    }

    /// The target that pulls a layer toward the original model's activations: `W* = W + α W (M − H) H_d⁻¹`, M = X̃ᵀX, for
    /// `weights [width, lanes]` (a weight row a lane). At α = 1 it minimises ‖W X̃ − W* X‖² + λ‖W − W*‖².
    pub fn target(&self, weights: &[f64], alpha: f64) -> Vec<f64> {
        let lanes = weights.len() / self.width;
        let Some(shift) = self.shift.as_ref().filter(|_| alpha != 0.0) else {
            return weights.to_vec();
        };
        let mut moved = vec![0.0; weights.len()];
        product(
            ViewMut::rows(&mut moved, self.width, lanes, lanes),
            0.0,
            View::rows(shift, self.width, self.width, self.width).transposed(),
            View::rows(weights, self.width, lanes, lanes),
            alpha,
        );
        self.solve(&mut moved);
        moved.iter_mut().zip(weights).for_each(|(m, w)| *m += w);
        moved
    }
}

/// R with `(gram + λI)[order, order] = R Rᵀ`, or the position of the pivot that is not positive.
fn factor(gram: &[f64], width: usize, order: &[usize], lambda: f64) -> Result<Vec<f64>, usize> {
    // J H J = L Lᵀ with J the reversal gives R = J L J, upper.
    let at = |i: usize| order[width - 1 - i];
    let mut a = vec![0.0; width * width];
    for i in 0..width {
        let source = &gram[at(i) * width..][..width];
        for (j, value) in a[i * width..][..=i].iter_mut().enumerate() {
            *value = source[at(j)];
        }
        a[i * width + i] += lambda;
    }
    let mut lower = MatMut::from_row_major_slice_mut(&mut a, width, width);
    let scratch = llt::factor::cholesky_in_place_scratch::<f64>(width, Par::Seq, Default::default());
    let mut memory = faer::dyn_stack::MemBuffer::new(scratch);
    llt::factor::cholesky_in_place(
        lower.as_mut(),
        Default::default(),
        Par::Seq,
        faer::dyn_stack::MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|error| match error {
        llt::factor::LltError::NonPositivePivot { index } => width - 1 - index,
    })?;
    // Reversing both rows and columns of a row-major matrix is reversing the slice.
    a.reverse();
    for i in 1..width {
        a[i * width..][..i].fill(0.0);
    }
    let finite = (0..width).find(|i| !(a[i * width + i] > 0.0 && a[i * width + i].is_finite()));
    match finite {
        Some(pivot) => Err(pivot),
        None => Ok(a),
    }
}
