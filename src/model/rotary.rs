//! Rotary tables and their application.

use super::spec::RopeSpec;
use candle_core::{D, Device, Result, Tensor};

/// cos and sin, `[length, rotary_dim / 2]` each, for positions from 0.
#[derive(Debug)]
pub struct Rotary {
    cos: Tensor,
    sin: Tensor,
    rotary_dim: usize,
    interleaved: bool,
}

impl Rotary {
    /// Tables for `length` positions. Angles are formed in f32, as the reference implementations do.
    pub fn new(spec: &RopeSpec, length: usize, device: &Device) -> Result<Self> {
        let half = spec.inverse_frequencies.len();
        let angles: Vec<f32> = (0..length)
            .flat_map(|position| spec.inverse_frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        let table = |f: fn(f32) -> f32| {
            let values = angles.iter().map(|&a| f(a) * spec.attention_factor).collect();
            Tensor::from_vec(values, (length, half), device)
        };
        Ok(Self {
            cos: table(f32::cos)?,
            sin: table(f32::sin)?,
            rotary_dim: spec.rotary_dim,
            interleaved: spec.interleaved,
        })
    }

    /// Rotates `[sequences, length, heads, head_dim]`. Interleaved pairs fill the whole head.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (sequences, length, heads, head_dim) = x.dims4()?;
        let (cos, sin) = (self.cos.narrow(0, 0, length)?, self.sin.narrow(0, 0, length)?);
        if self.interleaved {
            // To the other layout: [.., pairs, 2] → [.., 2, pairs].
            let pairs = x.reshape((sequences, length, heads, head_dim / 2, 2))?;
            let halves = pairs.transpose(3, 4)?.contiguous()?;
            let halves = halves.reshape((sequences, length, heads, head_dim))?;
            return candle_nn::rotary_emb::rope_thd(&halves, &cos, &sin);
        }
        if self.rotary_dim == head_dim {
            return candle_nn::rotary_emb::rope_thd(x, &cos, &sin);
        }
        let turned = x.narrow(D::Minus1, 0, self.rotary_dim)?.contiguous()?;
        let kept = x.narrow(D::Minus1, self.rotary_dim, head_dim - self.rotary_dim)?;
        Tensor::cat(
            &[&candle_nn::rotary_emb::rope_thd(&turned, &cos, &sin)?, &kept],
            D::Minus1,
        )
    }
}
