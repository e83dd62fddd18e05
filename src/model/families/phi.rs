//! Phi-3, Phi-3.5 and Phi-4 mini: q, k, v and gate, up come fused; longrope; part of a head may rotate.

use super::dense::{self, Defaults};
use super::keys::{Keys, MAX_POSITIONS};
use super::rope;
use crate::error::Result;
use crate::model::spec::ModelSpec;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 32_064,
    hidden_size: 3072,
    intermediate_size: 8192,
    layers: 32,
    heads: 32,
    kv_heads: None,
    head_dim: None,
    activation_key: "hidden_act",
    activation: "silu",
    max_positions: 4096,
    eps: 1e-5,
    theta: 10_000.0,
    tied: false,
};
const ORIGINAL_POSITIONS: usize = 4096;

/// Reads a Phi-3 config.
pub(super) fn parse(keys: &Keys) -> Result<ModelSpec> {
    let mut dense = dense::read(keys, &DEFAULTS)?;
    let window = keys.size_or_null("sliding_window", None, MAX_POSITIONS)?;
    dense::all_alike(keys, window)?;
    for layer in &mut dense.spec.layers {
        layer.window = window;
    }
    dense.spec.block.fused_qkv = true;
    dense.spec.block.fused_gate_up = true;
    dense.rope.original_positions = Some(ORIGINAL_POSITIONS);
    dense.rope.partial = true;
    dense.rope.longrope_aliases = true;
    let table = rope::shared(keys, dense.rope)?;
    Ok(dense.with_rope(table))
}
