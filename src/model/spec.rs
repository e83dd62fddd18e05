//! One description of a decoder for all supported families: pure data, read from `config.json` by
//! [`super::families`]. The forward pass ([`super::block`]) reads this and nothing else of the config.

use super::sites::{LinearSpec, SiteKind};
use crate::numerics::routing::RoutingRule;

/// The text tower of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// First entry of `architectures`, or `model_type` where that is absent.
    pub architecture: String,
    /// Where the text tower's tensors lie, most specific first: the first whose embedding exists is used.
    pub names: Vec<TowerNames>,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Whether the head is the embedding (no head tensor in the checkpoint).
    pub tied_head: bool,
    /// The embedding is multiplied by this (Gemma), already rounded as the reference implementation rounds it.
    pub embedding_scale: Option<f32>,
    /// logits = cap * tanh(logits / cap)
    pub final_softcap: Option<f32>,
    /// Longest sequence that [`BlockSpec::ropes`] hold for, where longer ones need other frequencies (longrope, dynamic).
    pub max_sequence: Option<usize>,
    /// Shared by all blocks.
    pub block: BlockSpec,
    /// One entry a decoder layer.
    pub layers: Vec<LayerSpec>,
}

impl ModelSpec {
    /// The sites of a block: see [`BlockSpec::sites`].
    pub fn sites(&self, block: usize) -> Vec<SiteKind> {
        self.block.sites(&self.layers[block])
    }

    /// The linears of a site: see [`BlockSpec::linears`].
    pub fn linears(&self, block: usize, site: SiteKind) -> Vec<LinearSpec> {
        self.block.linears(&self.layers[block], site)
    }
}

/// Names of the text tower in a checkpoint: `{tower}embed_tokens.weight`, `{tower}layers.{i}.…`, `{tower}norm.weight`, `{head}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TowerNames {
    /// `model.`, `model.language_model.`, `language_model.model.`, …
    pub tower: String,
    /// `lm_head.weight`, `language_model.lm_head.weight`, …
    pub head: String,
}

/// What is the same in every block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSpec {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Multi-head latent attention. Then `kv_heads` is `heads`, and `head_dim` the width of a query and key head.
    pub mla: Option<MlaSpec>,
    /// Each head has a sink, `self_attn.sinks`: a key without a value (gpt-oss).
    pub sinks: bool,
    /// Inner width of the MLP, in the layers that are not mixtures.
    pub intermediate_size: usize,
    /// Mixture of experts of the layers that have one ([`LayerSpec::mixture`]).
    pub mixture: Option<MixtureSpec>,
    /// Nonlinearity of the gate.
    pub activation: Activation,
    /// Root-mean-square norms.
    pub norm: NormSpec,
    /// RMS norm over each query and key head (`self_attn.q_norm`, `self_attn.k_norm`).
    pub qk_norm: bool,
    /// q, k and v come from one tensor `self_attn.qkv_proj` (Phi-3).
    pub fused_qkv: bool,
    /// gate and up come from one tensor `mlp.gate_up_proj` (Phi-3).
    pub fused_gate_up: bool,
    /// Sandwich norms (Gemma 2 and 3): `post_attention_layernorm` on the attention's output, `pre_feedforward_layernorm` before the MLP,
    /// `post_feedforward_layernorm` on its output. Otherwise `post_attention_layernorm` stands before the MLP.
    pub sandwich_norms: bool,
    /// Factor on q·k, usually head_dim^-0.5.
    pub attention_scale: f32,
    /// scores = cap * tanh(scores / cap) (Gemma 2)
    pub attention_softcap: Option<f32>,
    /// Rotary tables; a layer names one by index.
    pub ropes: Vec<RopeSpec>,
}

/// What may differ from block to block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerSpec {
    /// Index into [`BlockSpec::ropes`]; `None` for layers without positions.
    pub rope: Option<usize>,
    /// Sliding window: a query sees itself and the `window - 1` tokens before it.
    pub window: Option<usize>,
    /// Whether the MLP is [`BlockSpec::mixture`].
    pub mixture: bool,
}

/// Multi-head latent attention (DeepSeek-V2 and V3): keys and values, and mostly queries, come from narrow latents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlaSpec {
    /// Width of the queries' latent; `None` where queries come straight from the residual (`q_proj`).
    pub q_lora_rank: Option<usize>,
    /// Width of the latent of keys and values.
    pub kv_lora_rank: usize,
    /// Channels of a query or key head without positions; they come first.
    pub qk_nope_head_dim: usize,
    /// Channels of a query or key head that rotate; all heads share the key's.
    pub qk_rope_head_dim: usize,
    /// Width of a value head.
    pub v_head_dim: usize,
    /// Added under the root in the latents' norms. Not the config's `rms_norm_eps`.
    pub norm_eps: f32,
}

/// A mixture of experts: each expert is a gated MLP, and a router sends each token to some of them.
#[derive(Clone, Debug, PartialEq)]
pub struct MixtureSpec {
    /// Experts, experts per token, scores, normalization, scaling and group limits.
    pub routing: RoutingRule,
    /// Inner width of a routed expert.
    pub intermediate_size: usize,
    /// The expert of all tokens.
    pub shared: Option<SharedExpertSpec>,
    /// The router has `e_score_correction_bias`: one number an expert, for the choice and not for the gates (DeepSeek-V3).
    pub correction_bias: bool,
    /// The router's linear has a bias (gpt-oss).
    pub router_bias: bool,
    /// Names below `layers.{i}.`, most usual first: the first whose router exists is used. An opened tower keeps that one.
    pub names: Vec<MixtureNames>,
}

/// An MLP that sees every token, beside the routed experts. Several shared experts are stored as one wide one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedExpertSpec {
    /// Inner width.
    pub intermediate_size: usize,
    /// Its output is multiplied by the sigmoid of a linear of its own, `{shared}_gate` (Qwen2-MoE).
    pub gated: bool,
}

/// Names of a mixture's modules below `layers.{i}.`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MixtureNames {
    /// `mlp.gate`
    pub router: &'static str,
    /// `mlp.experts`: separate experts are `{experts}.{e}.{projection}`.
    pub experts: &'static str,
    /// Gate, up and down of an expert.
    pub projections: [&'static str; 3],
    /// `mlp.shared_expert`
    pub shared: &'static str,
    /// How `{experts}.gate_up_proj` and `{experts}.down_proj` hold all experts where there are no separate ones.
    pub fused: FusedLayout,
}

/// Layout of tensors that hold all experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FusedLayout {
    /// `[experts, in, out]` rather than `[experts, out, in]`. The other one is read, too, where the shape tells them apart.
    pub input_first: bool,
    /// Rows of gate and up take turns, rather than gate standing before up.
    pub interleaved: bool,
}

/// Nonlinearity of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// x * sigmoid(x)
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// g * sigmoid(alpha * g) * (u + 1), where the gate g is at most `limit` and u is clamped to ±`limit` (gpt-oss).
    ClampedSwiglu {
        /// Factor in the sigmoid.
        alpha: f32,
        /// Bound.
        limit: f32,
    },
}

/// RMS norm: x / sqrt(mean(x^2) + eps) * weight, or * (1 + weight).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Added under the root.
    pub eps: f32,
    /// Gemma stores weight - 1.
    pub unit_offset: bool,
}

/// One rotary table. Pairs are (i, i + rotary_dim / 2), the "rotate half" layout, or (2i, 2i + 1).
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Inverse frequencies, `rotary_dim / 2` of them, with every scaling (linear, llama3, yarn, longrope) applied.
    pub inverse_frequencies: Vec<f32>,
    /// cos and sin are multiplied by this (yarn, longrope); 1 otherwise.
    pub attention_factor: f32,
    /// Channels of a head that rotate, from the first; the rest pass through.
    pub rotary_dim: usize,
    /// Pairs are (2i, 2i + 1). Rotation then leaves them in the other layout, which products of queries and keys do not see.
    pub interleaved: bool,
}
