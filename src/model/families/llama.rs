//! Llama 2 and 3, and what is published under the same architecture (SmolLM2, Yi, Vicuna, …). Attention and MLP
//! biases are found by the tensors, so the config's flags for them are not read.

use super::dense::{self, Defaults};
use super::keys::Keys;
use super::rope;
use crate::error::Result;
use crate::model::spec::ModelSpec;

const DEFAULTS: Defaults = Defaults {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    head_dim: None,
    activation_key: "hidden_act",
    activation: "silu",
    max_positions: 2048,
    eps: 1e-6,
    theta: 10_000.0,
    tied: false,
};

/// Reads a Llama config.
pub(super) fn parse(keys: &Keys) -> Result<ModelSpec> {
    let dense = dense::read(keys, &DEFAULTS)?;
    dense::all_alike(keys, None)?;
    let table = rope::shared(keys, dense.rope)?;
    Ok(dense.with_rope(table))
}
