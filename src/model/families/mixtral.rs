//! Mixtral: Mistral with a mixture in every layer; the gates of a token's two experts are a softmax over their logits.

use super::dense::{self, Defaults};
use super::keys::{Keys, MAX_POSITIONS};
use super::mixture::{self, Counts};
use super::rope;
use crate::error::Result;
use crate::model::spec::ModelSpec;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 14_336,
    layers: 32,
    heads: 32,
    kv_heads: Some(8),
    head_dim: None,
    activation_key: "hidden_act",
    activation: "silu",
    max_positions: 131_072,
    eps: 1e-5,
    theta: 10_000.0,
    tied: false,
};
const COUNTS: Counts = Counts {
    experts_keys: &["num_local_experts"],
    experts: 8,
    per_token: Some(2),
    width_key: "intermediate_size",
    width: DEFAULTS.intermediate_size,
};

/// Reads a Mixtral config.
pub(super) fn parse(keys: &Keys) -> Result<ModelSpec> {
    let mut dense = dense::dimensions(keys, &DEFAULTS)?;
    let window = keys.size_or_null("sliding_window", None, MAX_POSITIONS)?;
    dense::all_alike(keys, window)?;
    let mut experts = mixture::read(keys, &COUNTS, &[mixture::MIXTRAL, mixture::NAMES])?;
    experts.routing.normalize = true;
    dense.spec.block.mixture = Some(experts);
    for layer in &mut dense.spec.layers {
        layer.window = window;
        layer.mixture = true;
    }
    let table = rope::shared(keys, dense.rope)?;
    Ok(dense.with_rope(table))
}
