//! Multi-head latent attention (DeepSeek-V2, section 2.1): queries, keys and values are projected down to narrow latents, normed, and
//! projected up again; positions are carried by channels of their own, which all heads of the key share.
//!
//! ```text
//! [qkv] ─compress─► [q_b], [kv_b], rotary key ─attend_latents─► [o]
//! ```

use super::block::Block;
use super::linear::Linear;
use super::ops;
use super::rotary::Rotary;
use super::spec::MlaSpec;
use crate::numerics::attention::AttentionShape;
use candle_core::{D, Result, Tensor};

/// What `q_b_proj` and `kv_b_proj` take, and the part of the keys that is ready.
#[derive(Clone, Debug)]
pub struct Latents {
    /// `[tokens, q_lora_rank]`, input of `q_b_proj`; where there is no such linear, the queries `[tokens, heads * head_dim]`.
    pub query: Tensor,
    /// `[tokens, kv_lora_rank]`, input of `kv_b_proj`.
    pub key_value: Tensor,
    /// `[tokens, qk_rope_head_dim]`, not yet rotated.
    pub rotary_key: Tensor,
}

impl Latents {
    /// All three side by side, to be kept.
    pub fn join(&self) -> Result<Tensor> {
        Tensor::cat(&[&self.query, &self.key_value, &self.rotary_key], 1)
    }
}

impl Block {
    /// What [`Latents::join`] put together.
    pub fn split_latents(&self, joined: &Tensor) -> Result<Latents> {
        let (mla, _) = self.mla()?;
        let (key_value, rotary) = (mla.kv_lora_rank, mla.qk_rope_head_dim);
        let query = joined.dim(1)? - key_value - rotary;
        let part = |begin, width| joined.narrow(1, begin, width)?.contiguous();
        Ok(Latents {
            query: part(0, query)?,
            key_value: part(query, key_value)?,
            rotary_key: part(query + key_value, rotary)?,
        })
    }

    fn mla(&self) -> Result<(MlaSpec, &Rotary)> {
        match (self.spec.mla, &self.rotary) {
            (Some(mla), Some(rotary)) => Ok((mla, rotary)),
            _ => candle_core::bail!("this block has no latent attention"),
        }
    }

    /// input of qkv → inputs of q_b and kv_b. `linears` are those of `qkv`.
    pub fn compress(&self, x: &Tensor, linears: &[Linear]) -> Result<Latents> {
        let (mla, _) = self.mla()?;
        let (Some((q_norm, kv_norm)), [query, key_value]) = (&self.norms.latents, linears) else {
            candle_core::bail!("latent attention takes 2 linears, not {}", linears.len());
        };
        let norm = |x: &Tensor, weight: &Tensor| candle_nn::ops::rms_norm(x, weight, mla.norm_eps);
        let query = query.forward(x)?;
        let compressed = key_value.forward(x)?;
        let latent = compressed.narrow(1, 0, mla.kv_lora_rank)?.contiguous()?;
        Ok(Latents {
            query: match q_norm {
                Some(weight) => norm(&query, weight)?,
                None => query,
            },
            key_value: norm(&latent, kv_norm)?,
            rotary_key: compressed
                .narrow(1, mla.kv_lora_rank, mla.qk_rope_head_dim)?
                .contiguous()?,
        })
    }

    /// inputs of q_b and kv_b → input of o. `query` are the linears of `q_b`, one or none; `key_value` is that of `kv_b`. `length` is that
    /// of one sequence.
    pub fn attend_latents(
        &self,
        latents: &Latents,
        query: &[Linear],
        key_value: &[Linear],
        length: usize,
    ) -> Result<Tensor> {
        let (mla, rotary) = self.mla()?;
        let (heads, head_dim) = (self.spec.heads, self.spec.head_dim);
        let (nope, rope) = (mla.qk_nope_head_dim, mla.qk_rope_head_dim);
        let [key_value] = key_value else {
            candle_core::bail!("kv_b is one linear, not {}", key_value.len());
        };
        let (tokens, _) = latents.key_value.dims2()?;
        let rotate = |x: Tensor, heads: usize| {
            let x = x.reshape((tokens / length, length, heads, rope))?;
            rotary.apply(&x)?.reshape((tokens, heads, rope))
        };
        let q = match query {
            [] => latents.query.clone(),
            [linear] => linear.forward(&latents.query)?,
            other => candle_core::bail!("q_b is one linear, not {}", other.len()),
        };
        let q = q.reshape((tokens, heads, head_dim))?;
        let turned = rotate(q.narrow(2, nope, rope)?.contiguous()?, heads)?;
        let q = Tensor::cat(&[&q.narrow(2, 0, nope)?, &turned], D::Minus1)?;

        let kv = key_value
            .forward(&latents.key_value)?
            .reshape((tokens, heads, nope + mla.v_head_dim))?;
        let turned = rotate(latents.rotary_key.clone(), 1)?.broadcast_as((tokens, heads, rope))?;
        let k = Tensor::cat(&[&kv.narrow(2, 0, nope)?, &turned], D::Minus1)?;
        let v = kv.narrow(2, nope, mla.v_head_dim)?.contiguous()?;
        let shape = AttentionShape {
            length,
            heads,
            kv_heads: heads,
            head_dim,
            value_dim: mla.v_head_dim,
            scale: self.spec.attention_scale,
            softcap: self.spec.attention_softcap,
            window: self.layer.window,
        };
        let flat = |x: Tensor| x.flatten_from(1)?.contiguous();
        let sinks = self.sinks.as_deref();
        ops::attention(
            [&flat(q)?, &flat(k)?, &flat(v)?],
            sinks,
            shape,
            key_value.precision(),
        )
    }
}
