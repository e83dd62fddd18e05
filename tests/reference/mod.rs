//! Slow, obvious textbook versions of what the library does fast, in f64.

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
