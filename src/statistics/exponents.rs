//! The fixed-point exponent of each channel, from a probe.

use serde::{Deserialize, Serialize};

/// `E[x_i²] · 2^(2 s_i)` is about `2^PROBE_ENERGY_BITS` for the probe's tokens: each token adds about 2^22 to a diagonal sum,
/// which leaves room for 2^28 tokens and for energies 8,000 times the probe's before 2^63.
const PROBE_ENERGY_BITS: f64 = 22.0;
/// A channel quieter than this share of the mean energy gets the exponent of that share: a channel that the probe
/// leaves silent must still have room when a text wakes it.
const ENERGY_SHARE_MIN: f64 = 1.0 / (1u64 << 20) as f64;
/// Keeps `2^(s_i + s_j)` a normal f64.
const EXPONENT_MAX: f64 = 400.0;

/// One exponent a channel: sums hold `round(P_ij · 2^(s_i + s_j))`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exponents(Vec<i32>);

impl Exponents {
    /// From the probe's input of a site, `[tokens, width]` row-major.
    ///
    /// # Panics
    /// `width` is zero.
    pub fn from_probe(x: &[f32], width: usize) -> Self {
        let mut energy = vec![0f64; width];
        for row in x.chunks_exact(width) {
            for (sum, &v) in energy.iter_mut().zip(row) {
                *sum += f64::from(v) * f64::from(v);
            }
        }
        let tokens = (x.len() / width).max(1) as f64;
        let mean = energy.iter().sum::<f64>() / (tokens * width as f64);
        let floor = (mean * ENERGY_SHARE_MIN).max(f64::MIN_POSITIVE);
        let exponent = |sum: &f64| {
            let bits = (PROBE_ENERGY_BITS - (sum / tokens).max(floor).log2()) / 2.0;
            bits.round().clamp(-EXPONENT_MAX, EXPONENT_MAX) as i32
        };
        Self(energy.iter().map(exponent).collect())
    }

    /// Exponents that were kept.
    pub fn from_values(values: Vec<i32>) -> Self {
        Self(values)
    }

    /// One a channel.
    pub fn values(&self) -> &[i32] {
        &self.0
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.0.len()
    }

    /// `2^s_i`
    pub fn scales(&self) -> Vec<f64> {
        self.0.iter().map(|&s| f64::from(s).exp2()).collect()
    }
}
