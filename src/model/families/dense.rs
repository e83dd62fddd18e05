//! What all families share: the dimensions of a dense, gated, RMS-normed decoder, checked, as a [`ModelSpec`] that a
//! family then completes; and which layers have a sliding window.

use super::keys::{Keys, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH, shorten};
use super::rope::{Context, Table};
use crate::error::Result;
use crate::model::spec::{Activation, BlockSpec, LayerSpec, ModelSpec, NormSpec, TowerNames};

/// Keys that only mixtures of experts have.
const EXPERT_KEYS: [&str; 5] = [
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_experts_per_tok",
];
/// Largest epsilon that is believed.
const MAX_EPS: f64 = 1.0;

/// What transformers takes for keys that a config does not have.
pub(super) struct Defaults {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    /// `None`: as many as heads.
    pub(super) kv_heads: Option<usize>,
    /// `None`: hidden_size / heads.
    pub(super) head_dim: Option<usize>,
    /// The key of the activation's name.
    pub(super) activation_key: &'static str,
    pub(super) activation: &'static str,
    pub(super) max_positions: usize,
    pub(super) eps: f64,
    pub(super) theta: f64,
    pub(super) tied: bool,
}

/// A description under construction.
pub(super) struct Dense {
    /// Complete but for rotary tables; no layer has a window.
    pub(super) spec: ModelSpec,
    /// What rotary tables need to know.
    pub(super) rope: Context,
}

impl Dense {
    /// Puts one table into all layers.
    pub(super) fn with_rope(mut self, table: Table) -> ModelSpec {
        self.spec.block.ropes = vec![table.rope];
        self.spec.max_sequence = table.max_sequence;
        self.spec
    }
}

/// Reads and checks the dimensions of a family without mixtures.
pub(super) fn read(keys: &Keys, defaults: &Defaults) -> Result<Dense> {
    refuse_experts(keys)?;
    dimensions(keys, defaults)
}

fn refuse_experts(keys: &Keys) -> Result<()> {
    for key in EXPERT_KEYS {
        if keys.some(key).is_some_and(|v| !matches!(v.as_u64(), Some(0 | 1))) {
            return Err(keys.error(
                key,
                "belongs to a mixture of experts, which this architecture does not have",
            ));
        }
    }
    Ok(())
}

/// Reads and checks the dimensions; no layer is a mixture.
pub(super) fn dimensions(keys: &Keys, defaults: &Defaults) -> Result<Dense> {
    let head_dim = keys.size_or_null("head_dim", defaults.head_dim, MAX_HEAD_DIM)?;
    with_head_dim(keys, defaults, head_dim)
}

/// As [`dimensions`], with heads of this width whatever `head_dim` says; `None`: hidden_size / heads.
pub(super) fn with_head_dim(keys: &Keys, defaults: &Defaults, head_dim: Option<usize>) -> Result<Dense> {
    let hidden_size = keys.size("hidden_size", defaults.hidden_size, MAX_WIDTH)?;
    let heads = keys.size("num_attention_heads", defaults.heads, MAX_HEADS)?;
    let kv_heads = keys
        .size_or_null("num_key_value_heads", defaults.kv_heads, MAX_HEADS)?
        .unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(keys.error(
            "num_key_value_heads",
            format!("is {kv_heads}, which does not divide `num_attention_heads` = {heads}"),
        ));
    }
    let head_dim = match head_dim {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            return Err(keys.error(
                "num_attention_heads",
                format!("is {heads}, which does not divide `hidden_size` = {hidden_size}"),
            ));
        }
    };
    if head_dim % 2 == 1 || head_dim > MAX_HEAD_DIM || head_dim * heads > MAX_WIDTH {
        return Err(keys.error(
            "head_dim",
            format!(
                "is {head_dim} (times {heads} heads), expected an even number up to {MAX_HEAD_DIM}, and up to {MAX_WIDTH} for all heads"
            ),
        ));
    }
    let eps = keys.positive("rms_norm_eps")?.unwrap_or(defaults.eps);
    if eps > MAX_EPS {
        return Err(keys.error("rms_norm_eps", format!("is {eps}, expected at most {MAX_EPS}")));
    }
    let layers = keys.size("num_hidden_layers", defaults.layers, MAX_LAYERS)?;
    let plain = LayerSpec {
        rope: Some(0),
        window: None,
        mixture: false,
    };
    let spec = ModelSpec {
        architecture: String::new(),
        names: vec![tower("model.", "lm_head.weight")],
        vocab_size: keys.size("vocab_size", defaults.vocab_size, MAX_VOCAB)?,
        hidden_size,
        tied_head: keys.flag("tie_word_embeddings", defaults.tied)?,
        embedding_scale: None,
        final_softcap: None,
        max_sequence: None,
        block: BlockSpec {
            hidden_size,
            heads,
            kv_heads,
            head_dim,
            mla: None,
            sinks: false,
            intermediate_size: keys.size("intermediate_size", defaults.intermediate_size, MAX_WIDTH)?,
            mixture: None,
            activation: activation(keys, defaults)?,
            norm: NormSpec {
                eps: eps as f32,
                unit_offset: false,
            },
            qk_norm: false,
            fused_qkv: false,
            fused_gate_up: false,
            sandwich_norms: false,
            attention_scale: (head_dim as f64).powf(-0.5) as f32,
            attention_softcap: None,
            ropes: Vec::new(),
        },
        layers: vec![plain; layers],
    };
    let rope = Context {
        head_dim,
        max_positions: keys.size("max_position_embeddings", defaults.max_positions, MAX_POSITIONS)?,
        theta: defaults.theta,
        original_positions: None,
        partial: false,
        longrope_aliases: false,
    };
    Ok(Dense { spec, rope })
}

/// Where a text tower lies.
pub(super) fn tower(tower: &str, head: &str) -> TowerNames {
    TowerNames {
        tower: tower.into(),
        head: head.into(),
    }
}

fn activation(keys: &Keys, defaults: &Defaults) -> Result<Activation> {
    let key = defaults.activation_key;
    match keys.text(key)?.unwrap_or(defaults.activation) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Ok(Activation::GeluTanh),
        other => Err(keys.error(
            key,
            format!("is {}, supported are silu and gelu_pytorch_tanh", shorten(other)),
        )),
    }
}

/// A softcap: positive, or `null` for none.
pub(super) fn softcap(keys: &Keys, key: &str, default: Option<f64>) -> Result<Option<f32>> {
    let cap = keys.positive_or_null(key, default)?;
    Ok(cap.map(|cap| cap as f32))
}

/// Gives the window `sliding_window` to the layers that `layer_types` calls sliding, or, without that list, to those that `pattern` names.
pub(super) fn set_windows(
    keys: &Keys,
    spec: &mut ModelSpec,
    window: Option<usize>,
    pattern: impl Fn(usize) -> bool,
) -> Result<()> {
    let layers = spec.layers.len();
    let sliding: Vec<bool> = match keys.texts("layer_types")? {
        None => (0..layers).map(pattern).collect(),
        Some(types) if types.len() == layers => types
            .into_iter()
            .map(|layer_type| match layer_type {
                "full_attention" => Ok(false),
                "sliding_attention" => Ok(true),
                other => Err(keys.error(
                    "layer_types",
                    format!(
                        "has {}, supported are full_attention and sliding_attention",
                        shorten(other)
                    ),
                )),
            })
            .collect::<Result<_>>()?,
        Some(types) => {
            return Err(keys.error(
                "layer_types",
                format!(
                    "has {} entries, expected `num_hidden_layers` = {layers}",
                    types.len()
                ),
            ));
        }
    };
    if window.is_none() && sliding.contains(&true) {
        return Err(keys.error(
            "layer_types",
            "has sliding layers, but there is no `sliding_window` in use",
        ));
    }
    for (layer, sliding) in spec.layers.iter_mut().zip(sliding) {
        layer.window = window.filter(|_| sliding);
    }
    Ok(())
}

/// Refuses `layer_types` where the family's layers are all alike and the reference implementation would not read the list.
pub(super) fn all_alike(keys: &Keys, window: Option<usize>) -> Result<()> {
    let expected = match window {
        Some(_) => "sliding_attention",
        None => "full_attention",
    };
    match keys.texts("layer_types")? {
        Some(types) if types.iter().any(|t| *t != expected) => Err(keys.error(
            "layer_types",
            format!("differs from {expected}, the only type this architecture has"),
        )),
        _ => Ok(()),
    }
}
