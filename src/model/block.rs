//! One decoder block, driven by [`BlockSpec`]: a chain of stages cut at its sites, so that a linear can be quantized as
//! soon as its input is at hand and runs once, with its quantized weight.
//!
//! ```text
//! residual ─enter─► [qkv] ─attend─► [o] ─join_attention─► residual ─mlp_input─► [gate_up] ─gate─► [down] ─join_mlp─► residual
//! ```
//! Latent attention ([`super::mla`]) has two sites more between `qkv` and `o`; a mixture of experts ([`super::mixture`]) has a `down` for
//! each expert.
//!
//! Activations are `[tokens, width]` in f32; tokens are those of whole sequences of one length.

use super::linear::{Linear, precision};
use super::mixture::MixtureWeights;
use super::ops;
use super::rotary::Rotary;
use super::sites::{LinearSpec, SiteKind};
use super::spec::{BlockSpec, LayerSpec};
use crate::error;
use crate::numerics::attention::AttentionShape;
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// RMS norm weights of a block; the unit offset, where a family has one, is already added.
#[derive(Clone, Debug)]
pub struct Norms {
    /// Before the attention.
    pub input: Tensor,
    /// Before the MLP.
    pub mlp: Tensor,
    /// On the attention's and the MLP's output (sandwich norms).
    pub outputs: Option<(Tensor, Tensor)>,
    /// On each query and key head.
    pub query_key: Option<(Tensor, Tensor)>,
    /// On the queries' latent, where there is one, and on that of keys and values (latent attention).
    pub latents: Option<(Option<Tensor>, Tensor)>,
}

/// A block without its linears: those are passed to each stage, original or quantized.
#[derive(Clone, Debug)]
pub struct Block {
    /// What is the same in every block.
    pub spec: Arc<BlockSpec>,
    /// What is this layer's own.
    pub layer: LayerSpec,
    /// The layer's rotary table.
    pub rotary: Option<Arc<Rotary>>,
    /// Norm weights.
    pub norms: Norms,
    /// One a head.
    pub sinks: Option<Vec<f32>>,
    /// The router and its like, where the MLP is a mixture.
    pub mixture: Option<MixtureWeights>,
}

impl Block {
    fn norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        candle_nn::ops::rms_norm(x, weight, self.spec.norm.eps)
    }

    /// residual → input of qkv
    pub fn enter(&self, residual: &Tensor) -> Result<Tensor> {
        self.norm(residual, &self.norms.input)
    }

    /// input of qkv → input of o. `length` is that of one sequence.
    pub fn attend(&self, x: &Tensor, linears: &[Linear], length: usize) -> Result<Tensor> {
        let spec = &self.spec;
        let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let x = &x.to_dtype(precision(linears))?;
        let (q, k, v) = match linears {
            [fused] => {
                let y = fused.forward(x)?;
                (
                    y.narrow(1, 0, q_width)?.contiguous()?,
                    y.narrow(1, q_width, kv_width)?.contiguous()?,
                    y.narrow(1, q_width + kv_width, kv_width)?.contiguous()?,
                )
            }
            [q, k, v] => (q.forward(x)?, k.forward(x)?, v.forward(x)?),
            other => candle_core::bail!("attention takes 1 or 3 linears, not {}", other.len()),
        };
        let (q_norm, k_norm) = self.norms.query_key.as_ref().map(|(q, k)| (q, k)).unzip();
        let q = self.position(&q, spec.heads, q_norm, length)?;
        let k = self.position(&k, spec.kv_heads, k_norm, length)?;
        let shape = AttentionShape {
            length,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            value_dim: spec.head_dim,
            scale: spec.attention_scale,
            softcap: spec.attention_softcap,
            window: self.layer.window,
        };
        ops::attention([&q, &k, &v], self.sinks.as_deref(), shape, precision(linears))
    }

    /// Head norm and rotary embedding of `[tokens, heads * head_dim]`.
    fn position(&self, x: &Tensor, heads: usize, norm: Option<&Tensor>, length: usize) -> Result<Tensor> {
        let (tokens, width) = x.dims2()?;
        let head_dim = self.spec.head_dim;
        let mut x = x.reshape((tokens, heads, head_dim))?;
        if let Some(weight) = norm {
            x = self.norm(&x, weight)?;
        }
        if let Some(rotary) = &self.rotary {
            x = rotary.apply(&x.reshape((tokens / length, length, heads, head_dim))?)?;
        }
        x.reshape((tokens, width))
    }

    /// residual and input of o → residual after the attention
    pub fn join_attention(&self, residual: &Tensor, x: &Tensor, linears: &[Linear]) -> Result<Tensor> {
        let norm = self.norms.outputs.as_ref().map(|(attention, _)| attention);
        self.join(residual, x, linears, norm)
    }

    /// residual after the attention → input of gate and up
    pub fn mlp_input(&self, residual: &Tensor) -> Result<Tensor> {
        self.norm(residual, &self.norms.mlp)
    }

    /// input of gate and up → input of down
    pub fn gate(&self, x: &Tensor, linears: &[Linear]) -> Result<Tensor> {
        let x = &x.to_dtype(precision(linears))?;
        let (gate, up) = match linears {
            [fused] => {
                let y = fused.forward(x)?;
                let inner = self.spec.intermediate_size;
                (
                    y.narrow(1, 0, inner)?.contiguous()?,
                    y.narrow(1, inner, inner)?.contiguous()?,
                )
            }
            [gate, up] => (gate.forward(x)?, up.forward(x)?),
            other => candle_core::bail!("an MLP takes 1 or 2 linears before down, not {}", other.len()),
        };
        ops::multiply_gated(&gate, &up, self.spec.activation)?;
        Ok(gate)
    }

    /// residual after the attention and input of down → residual after the block
    pub fn join_mlp(&self, residual: &Tensor, x: &Tensor, linears: &[Linear]) -> Result<Tensor> {
        let norm = self.norms.outputs.as_ref().map(|(_, mlp)| mlp);
        self.join(residual, x, linears, norm)
    }

    /// residual after the attention and what a mixture makes of it → residual after the block
    pub fn join_mixture(&self, residual: &Tensor, y: Tensor) -> Result<Tensor> {
        let norm = self.norms.outputs.as_ref().map(|(_, mlp)| mlp);
        self.add(residual, y, norm)
    }

    fn join(
        &self,
        residual: &Tensor,
        x: &Tensor,
        linears: &[Linear],
        norm: Option<&Tensor>,
    ) -> Result<Tensor> {
        let [linear] = linears else {
            candle_core::bail!("an output projection is one linear, not {}", linears.len());
        };
        self.add(residual, linear.forward(x)?, norm)
    }

    fn add(&self, residual: &Tensor, mut y: Tensor, norm: Option<&Tensor>) -> Result<Tensor> {
        if let Some(weight) = norm {
            y = self.norm(&y, weight)?;
        }
        residual + y
    }

    /// The whole block. `linear` is asked for each linear when it is needed, and what it gives is dropped after use: of a mixture's experts,
    /// one is in memory at a time, and those without a token are not asked for.
    ///
    /// # Errors
    /// Those of `linear`, and of tensor operations.
    pub fn forward(
        &self,
        residual: &Tensor,
        length: usize,
        linear: &dyn Fn(&LinearSpec) -> error::Result<Linear>,
    ) -> error::Result<Tensor> {
        let site = |kind: SiteKind| -> error::Result<Vec<Linear>> {
            let specs = self.spec.linears(&self.layer, kind);
            specs.iter().map(linear).collect()
        };
        let x = self.enter(residual)?;
        let x = match self.spec.mla {
            None => self.attend(&x, &site(SiteKind::Qkv)?, length)?,
            Some(_) => {
                let latents = self.compress(&x, &site(SiteKind::Qkv)?)?;
                self.attend_latents(&latents, &site(SiteKind::QB)?, &site(SiteKind::KvB)?, length)?
            }
        };
        let residual = self.join_attention(residual, &x, &site(SiteKind::O)?)?;
        let x = self.mlp_input(&residual)?;
        if self.mixture.is_some() {
            return Ok(self.join_mixture(&residual, self.mix(&x, linear)?)?);
        }
        let x = self.gate(&x, &site(SiteKind::GateUp)?)?;
        Ok(self.join_mlp(&residual, &x, &site(SiteKind::Down)?)?)
    }
}
