//! Mistral 7B and its kin: Llama with a window in every layer (v0.1), or in none (from v0.2).

use super::dense::{self, Defaults};
use super::keys::{Keys, MAX_POSITIONS};
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
    eps: 1e-6,
    theta: 10_000.0,
    tied: false,
};
const WINDOW: usize = 4096;

/// Reads a Mistral config.
pub(super) fn parse(keys: &Keys) -> Result<ModelSpec> {
    let mut dense = dense::read(keys, &DEFAULTS)?;
    let window = keys.size_or_null("sliding_window", Some(WINDOW), MAX_POSITIONS)?;
    dense::all_alike(keys, window)?;
    for layer in &mut dense.spec.layers {
        layer.window = window;
    }
    let table = rope::shared(keys, dense.rope)?;
    Ok(dense.with_rope(table))
}
