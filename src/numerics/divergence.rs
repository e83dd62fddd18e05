//! How far one model's next-token distribution is from another's.

use super::elementwise::exp;
use super::simd::vectorized;

/// Independent partial sums: a fixed order that vectorises.
const LANES: usize = 8;

/// One position's comparison, natural logarithms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergence {
    /// KL(reference ‖ model)
    pub kl: f64,
    /// −log p(target) of the reference.
    pub reference_nll: f64,
    /// −log p(target) of the model.
    pub nll: f64,
    /// Both have the same most likely token.
    pub top1_equal: bool,
}

/// Compares logits of one position over the vocabulary.
///
/// # Panics
/// The slices differ in length, are empty, or `target` is outside.
pub fn compare(reference: &[f32], model: &[f32], target: usize) -> Divergence {
    assert!(reference.len() == model.len() && target < model.len());
    let (r_top, r_max) = top(reference);
    let (m_top, m_max) = top(model);
    let mut sums = [[0f64; LANES]; 3];
    vectorized!({
        for (r, m) in reference.chunks(LANES).zip(model.chunks(LANES)) {
            for (lane, (&r, &m)) in r.iter().zip(m).enumerate() {
                let p = exp(r - r_max);
                sums[0][lane] += f64::from(p);
                sums[1][lane] += f64::from(exp(m - m_max));
                sums[2][lane] += f64::from(p) * (f64::from(r) - f64::from(m));
            }
        }
    });
    let [r_sum, m_sum, dot] = sums.map(|lanes| lanes.iter().sum::<f64>());
    let r_log = f64::from(r_max) + r_sum.ln();
    let m_log = f64::from(m_max) + m_sum.ln();
    Divergence {
        kl: (dot / r_sum - r_log + m_log).max(0.0),
        reference_nll: r_log - f64::from(reference[target]),
        nll: m_log - f64::from(model[target]),
        top1_equal: r_top == m_top,
    }
}

fn top(logits: &[f32]) -> (usize, f32) {
    let first = (0, f32::NEG_INFINITY);
    logits
        .iter()
        .enumerate()
        .fold(first, |best, (i, &v)| if v > best.1 { (i, v) } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_definition() {
        let logits = |seed: u32| -> Vec<f32> {
            (0..1003u32)
                .map(|i| ((i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97)) % 1000) as f32 / 90.0)
                .collect()
        };
        for seed in 0..20 {
            let (r, m) = (logits(seed), logits(seed + 1));
            let log_softmax = |x: &[f32]| -> Vec<f64> {
                let sum: f64 = x.iter().map(|&v| f64::from(v).exp()).sum();
                x.iter().map(|&v| f64::from(v) - sum.ln()).collect()
            };
            let (lr, lm) = (log_softmax(&r), log_softmax(&m));
            let kl: f64 = lr.iter().zip(&lm).map(|(a, b)| a.exp() * (a - b)).sum();
            let ours = compare(&r, &m, 17);
            assert!((ours.kl - kl).abs() < 1e-5, "{} {kl}", ours.kl);
            assert!((ours.nll + lm[17]).abs() < 1e-5 && (ours.reference_nll + lr[17]).abs() < 1e-5);
        }
        let same = compare(&logits(3), &logits(3), 0);
        assert!(same.top1_equal && same.kl < 1e-6);
    }
}
