//! One description of a decoder for all supported families: pure data, read from `config.json` by
//! [`super::families`]. The forward pass ([`super::block`]) reads this and nothing else of the config.

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
    /// Inner width of the MLP.
    pub intermediate_size: usize,
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
}

/// Nonlinearity of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x)
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

/// RMS norm: x / sqrt(mean(x^2) + eps) * weight, or * (1 + weight).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Added under the root.
    pub eps: f32,
    /// Gemma stores weight - 1.
    pub unit_offset: bool,
}

/// One rotary table, "rotate half" layout: pairs are (i, i + rotary_dim / 2).
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Inverse frequencies, `rotary_dim / 2` of them, with every scaling (linear, llama3, yarn, longrope) applied.
    pub inverse_frequencies: Vec<f32>,
    /// cos and sin are multiplied by this (yarn, longrope); 1 otherwise.
    pub attention_factor: f32,
    /// Channels of a head that rotate, from the first; the rest pass through.
    pub rotary_dim: usize,
}
