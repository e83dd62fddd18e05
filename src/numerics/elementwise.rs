//! Element-wise kernels in f32. Loops are written for the auto-vectoriser and run through [`vectorized!`],
//! which picks the widest instructions of the machine at run time.

use super::simd::vectorized;

/// e^x in f32: Cody–Waite reduction and a degree-6 polynomial, within 2 ulp over the range where the result is normal;
/// below -87.3 the result is 0 to within the smallest normal number, above 88.3 it saturates near the largest finite one.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    // Coefficients of Cephes' expf (S. L. Moshier).
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let value = p * (r * r) + r + 1.0;
    // The low bits of `shifted` hold n.
    let exponent = (shifted.to_bits() << 23).wrapping_add(127 << 23);
    value * f32::from_bits(exponent)
}

/// `gate[i] = silu(gate[i]) * up[i]`
///
/// # Panics
/// The lengths differ.
pub fn silu_gate(gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    vectorized!({
        for (g, &u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp(-*g)) * u;
        }
    });
}

/// `gate[i] = gelu_tanh(gate[i]) * up[i]`, with tanh(y) = 1 - 2 / (1 + e^2y)
///
/// # Panics
/// The lengths differ.
pub fn gelu_tanh_gate(gate: &mut [f32], up: &[f32]) {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    assert_eq!(gate.len(), up.len());
    vectorized!({
        for (g, &u) in gate.iter_mut().zip(up) {
            let x = *g;
            let inner = SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x);
            // 0.5 * (1 + tanh(y)) = 1 / (1 + e^-2y)
            *g = x / (1.0 + exp(-2.0 * inner)) * u;
        }
    });
}

/// `gate[i] = g * sigmoid(alpha * g) * (u + 1)` with g = min(gate\[i\], limit) and u = up\[i\] clamped to ±limit (gpt-oss).
///
/// # Panics
/// The lengths differ.
pub fn clamped_swiglu_gate(gate: &mut [f32], up: &[f32], alpha: f32, limit: f32) {
    assert_eq!(gate.len(), up.len());
    vectorized!({
        for (g, &u) in gate.iter_mut().zip(up) {
            let x = if *g > limit { limit } else { *g };
            let u = u.clamp(-limit, limit);
            *g = x / (1.0 + exp(-alpha * x)) * (u + 1.0);
        }
    });
}

/// In place: `row = softmax(row)` after `row *= scale` and an optional soft cap. A `sink` takes part as one more entry, which is not
/// scaled and not returned: the row then sums to less than 1.
pub fn softmax(row: &mut [f32], scale: f32, softcap: Option<f32>, sink: Option<f32>) {
    vectorized!({
        match softcap {
            None => row.iter_mut().for_each(|v| *v *= scale),
            Some(cap) => {
                for v in row.iter_mut() {
                    *v = cap * tanh(*v * scale / cap);
                }
            }
        }
        // Eight running maxima and sums: a fixed order that vectorises.
        let mut lanes = [f32::NEG_INFINITY; 8];
        for chunk in row.chunks(8) {
            for (lane, &v) in lanes.iter_mut().zip(chunk) {
                *lane = if v > *lane { v } else { *lane };
            }
        }
        let max = lanes
            .iter()
            .fold(sink.unwrap_or(f32::NEG_INFINITY), |a, &b| a.max(b));
        for v in row.iter_mut() {
            *v = exp(*v - max);
        }
        let mut sums = [0f32; 8];
        for chunk in row.chunks(8) {
            for (sum, &v) in sums.iter_mut().zip(chunk) {
                *sum += v;
            }
        }
        let sink = sink.map_or(0.0, |sink| exp(sink - max));
        let inverse = 1.0 / (sums.iter().sum::<f32>() + sink);
        row.iter_mut().for_each(|v| *v *= inverse);
    });
}

/// tanh through [`exp`].
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (1.0 + exp(2.0 * x))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two units in the last place of f32, and one for the reference's own rounding.
    const EXP_RELATIVE_ERROR_MAX: f64 = 3.0 * f32::EPSILON as f64;

    #[test]
    fn exp_matches_f64() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(
                (ours - exact).abs() <= EXP_RELATIVE_ERROR_MAX * exact,
                "exp({x}) = {ours}, not {exact}"
            );
        }
        assert!(exp(-1e9) < 1e-37 && exp(f32::NEG_INFINITY) < 1e-37 && exp(1e9).is_finite());
    }

    #[test]
    fn gates_match_f64() {
        let x: Vec<f32> = (-400..400).map(|i| i as f32 / 37.0).collect();
        let up: Vec<f32> = x.iter().map(|v| 1.0 - v / 3.0).collect();
        let check = |kernel: fn(&mut [f32], &[f32]), exact: fn(f64) -> f64| {
            let mut ours = x.clone();
            kernel(&mut ours, &up);
            for ((&x, &u), &o) in x.iter().zip(&up).zip(&ours) {
                let want = exact(f64::from(x)) * f64::from(u);
                assert!(
                    (f64::from(o) - want).abs() < 2e-6 * want.abs().max(1.0),
                    "{x}: {o} != {want}"
                );
            }
        };
        check(silu_gate, |x| x / (1.0 + (-x).exp()));
        check(gelu_tanh_gate, |x| {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        });
    }

    #[test]
    fn clamped_swiglu_matches_f64() {
        let (alpha, limit) = (1.702f32, 2.5f32);
        let x: Vec<f32> = (-400..400).map(|i| i as f32 / 37.0).collect();
        let up: Vec<f32> = x.iter().map(|v| 1.0 - v / 3.0).collect();
        let mut ours = x.clone();
        clamped_swiglu_gate(&mut ours, &up, alpha, limit);
        for ((&x, &u), &o) in x.iter().zip(&up).zip(&ours) {
            let g = f64::from(x).min(f64::from(limit));
            let u = f64::from(u).clamp(-f64::from(limit), f64::from(limit));
            let want = g / (1.0 + (-g * f64::from(alpha)).exp()) * (u + 1.0);
            assert!(
                (f64::from(o) - want).abs() < 2e-6 * want.abs().max(1.0),
                "{x}: {o} != {want}"
            );
        }
    }
}
