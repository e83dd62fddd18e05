//! Qwen2, Qwen2.5 and Qwen3 (dense), and the text towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL. Qwen2's biases on q, k
//! and v are found by the tensors; Qwen3 has norms over query and key heads instead.

use super::dense::{self, Defaults};
use super::keys::{Keys, MAX_LAYERS, MAX_POSITIONS};
use super::rope;
use crate::error::Result;
use crate::model::spec::ModelSpec;

const QWEN2: Defaults = Defaults {
    vocab_size: 151_936,
    hidden_size: 4096,
    intermediate_size: 22_016,
    layers: 32,
    heads: 32,
    kv_heads: Some(32),
    head_dim: None,
    activation_key: "hidden_act",
    activation: "silu",
    max_positions: 32_768,
    eps: 1e-6,
    theta: 10_000.0,
    tied: false,
};
const QWEN3: Defaults = Defaults {
    head_dim: Some(128),
    ..QWEN2
};
const QWEN2_VL: Defaults = Defaults {
    vocab_size: 152_064,
    hidden_size: 8192,
    intermediate_size: 29_568,
    layers: 80,
    heads: 64,
    kv_heads: Some(8),
    eps: 1e-5,
    theta: 1e6,
    ..QWEN2
};
const QWEN3_VL: Defaults = Defaults {
    max_positions: 128_000,
    theta: 500_000.0,
    ..QWEN3
};
const WINDOW: usize = 4096;
/// `max_window_layers`: the layers from this one on have the window.
const FIRST_WINDOWED: usize = 28;
const FIRST_WINDOWED_VL: usize = 80;

/// Reads a Qwen2 or Qwen2.5 config.
pub(super) fn parse_qwen2(keys: &Keys) -> Result<ModelSpec> {
    windowed(keys, &QWEN2, FIRST_WINDOWED)
}

/// Reads the text tower of Qwen2-VL or Qwen2.5-VL.
pub(super) fn parse_qwen2_vl(keys: &Keys) -> Result<ModelSpec> {
    windowed(keys, &QWEN2_VL, FIRST_WINDOWED_VL)
}

/// Reads a Qwen3 config.
pub(super) fn parse_qwen3(keys: &Keys) -> Result<ModelSpec> {
    let mut spec = windowed(keys, &QWEN3, FIRST_WINDOWED)?;
    spec.block.qk_norm = true;
    Ok(spec)
}

/// Reads the text tower of Qwen3-VL, which has no windows.
pub(super) fn parse_qwen3_vl(keys: &Keys) -> Result<ModelSpec> {
    let mut dense = dense::read(keys, &QWEN3_VL)?;
    dense::all_alike(keys, None)?;
    dense.spec.block.qk_norm = true;
    let table = rope::shared(keys, dense.rope)?;
    Ok(dense.with_rope(table))
}

fn windowed(keys: &Keys, defaults: &Defaults, first_windowed: usize) -> Result<ModelSpec> {
    let mut dense = dense::read(keys, defaults)?;
    let in_use = keys.flag("use_sliding_window", false)?;
    let window = keys
        .size_or_null("sliding_window", Some(WINDOW), MAX_POSITIONS)?
        .filter(|_| in_use);
    let first = keys.count("max_window_layers", first_windowed, MAX_LAYERS)?;
    dense::set_windows(keys, &mut dense.spec, window, |i| window.is_some() && i >= first)?;
    let table = rope::shared(keys, dense.rope)?;
    Ok(dense.with_rope(table))
}
