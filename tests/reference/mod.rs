//! Slow, obvious textbook versions of what the library does fast, in f64.

use quantflow::numerics::Grid;

/// Numbers between -1 and 1, the same for the same seed (xorshift).
pub(crate) fn random(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// GPTQ as in the paper: Cholesky of the inverse Hessian, column by column, the remaining weights updated at once.
///
/// `weights` is `[rows, width]`; `hessian` is the damped H; columns go in `order`; `scale` and `zero` give each row and column its grid.
pub(crate) fn gptq(
    weights: &[f64],
    hessian: &[f64],
    order: &[usize],
    max_code: f64,
    grid: impl Fn(usize, usize) -> (f64, f64),
) -> Vec<f64> {
    let n = order.len();
    let rows = weights.len() / n;
    let permuted: Vec<f64> = order
        .iter()
        .flat_map(|&i| order.iter().map(move |&j| hessian[i * n + j]))
        .collect();
    // Upper Cholesky factor of the inverse: inverse = Uᵀ U.
    let inverse = invert(&permuted, n);
    let lower = cholesky(&inverse, n);
    let upper = |i: usize, j: usize| lower[j * n + i];
    let mut codes = vec![0.0; weights.len()];
    for row in 0..rows {
        let mut w: Vec<f64> = order.iter().map(|&column| weights[row * n + column]).collect();
        for i in 0..n {
            let (scale, zero) = grid(row, order[i]);
            let code = (w[i] / scale + zero).round_ties_even().clamp(0.0, max_code);
            codes[row * n + order[i]] = code;
            let error = (w[i] - (code - zero) * scale) / upper(i, i);
            for (j, w) in w.iter_mut().enumerate().skip(i) {
                *w -= error * upper(i, j);
            }
        }
    }
    codes
}

/// Lower triangular L with L Lᵀ = a.
pub(crate) fn cholesky(a: &[f64], n: usize) -> Vec<f64> {
    let mut l = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| l[i * n + k] * l[j * n + k]).sum();
            l[i * n + j] = match i == j {
                true => (a[i * n + i] - dot).sqrt(),
                false => (a[i * n + j] - dot) / l[j * n + j],
            };
        }
    }
    l
}

/// Gauss–Jordan with partial pivoting.
pub(crate) fn invert(a: &[f64], n: usize) -> Vec<f64> {
    let mut a = a.to_vec();
    let mut inverse: Vec<f64> = (0..n * n).map(|k| f64::from(u8::from(k / n == k % n))).collect();
    for i in 0..n {
        let pivot = (i..n)
            .max_by(|&p, &q| a[p * n + i].abs().total_cmp(&a[q * n + i].abs()))
            .unwrap();
        for k in 0..n {
            a.swap(i * n + k, pivot * n + k);
            inverse.swap(i * n + k, pivot * n + k);
        }
        let scale = a[i * n + i];
        for k in 0..n {
            a[i * n + k] /= scale;
            inverse[i * n + k] /= scale;
        }
        for row in (0..n).filter(|&row| row != i) {
            let factor = a[row * n + i];
            for k in 0..n {
                a[row * n + k] -= factor * a[i * n + k];
                inverse[row * n + k] -= factor * inverse[i * n + k];
            }
        }
    }
    inverse
}

/// tr(E H Eᵀ) for `errors [rows, n]`.
pub(crate) fn loss(errors: &[f64], hessian: &[f64], n: usize) -> f64 {
    errors
        .chunks_exact(n)
        .map(|e| {
            (0..n)
                .map(|i| (0..n).map(|j| e[i] * hessian[i * n + j] * e[j]).sum::<f64>())
                .sum::<f64>()
        })
        .sum()
}

/// Σ importance (w − Q(w))² on the best of 40 shrunk min–max scales for each row and group, row by row.
pub(crate) fn predicted_loss(weights: &[f32], importance: &[f64], grid: Grid) -> f64 {
    let steps = f64::from(grid.max_code());
    let mut total = 0.0;
    for row in weights.chunks_exact(importance.len()) {
        for (row, importance) in row
            .chunks(grid.group_size)
            .zip(importance.chunks(grid.group_size))
        {
            let row: Vec<f64> = row.iter().map(|&w| f64::from(w)).collect();
            let (mut low, mut high) = row
                .iter()
                .fold((0f64, 0f64), |(low, high), &w| (low.min(w), high.max(w)));
            if grid.symmetric {
                high = high.max(-low);
                low = -high;
            }
            let error = |step: usize| -> f64 {
                let shrink = 1.0 - 0.65 * step as f64 / 39.0;
                let scale = grid.scale_dtype.round((high - low) * shrink / steps);
                let zero = match grid.symmetric {
                    true => f64::from(grid.symmetric_zero()),
                    false => (-low * shrink / scale).round_ties_even().clamp(0.0, steps),
                };
                let miss =
                    |w: f64| w - ((w / scale + zero).round_ties_even().clamp(0.0, steps) - zero) * scale;
                row.iter()
                    .zip(importance)
                    .map(|(&w, i)| i * miss(w).powi(2))
                    .sum()
            };
            total += (0..40).map(error).fold(f64::INFINITY, f64::min);
        }
    }
    total
}

/// KL(p ‖ q) of two rows of logits.
pub(crate) fn kl(p: &[f32], q: &[f32]) -> f64 {
    let log_softmax = |logits: &[f32]| -> Vec<f64> {
        let top = logits
            .iter()
            .fold(f64::NEG_INFINITY, |top, &v| top.max(f64::from(v)));
        let sum: f64 = logits.iter().map(|&v| (f64::from(v) - top).exp()).sum();
        logits.iter().map(|&v| f64::from(v) - top - sum.ln()).collect()
    };
    let (p, q) = (log_softmax(p), log_softmax(q));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}
