//! Qwen1.5-MoE and Qwen2-MoE (a shared expert with a sigmoid gate), Qwen3-MoE, and the text tower of Qwen3-VL-MoE, whose experts lie in
//! one tensor a layer. Biases are found by the tensors.

use super::dense::{self, Defaults, Dense};
use super::keys::{Keys, MAX_LAYERS, MAX_POSITIONS, MAX_WIDTH};
use super::mixture::{self, Counts};
use super::rope;
use crate::error::Result;
use crate::model::spec::{FusedLayout, MixtureNames, ModelSpec, SharedExpertSpec};

const QWEN2: Defaults = Defaults {
    vocab_size: 151_936,
    hidden_size: 2048,
    intermediate_size: 5632,
    layers: 24,
    heads: 16,
    kv_heads: Some(16),
    head_dim: None,
    activation_key: "hidden_act",
    activation: "silu",
    max_positions: 32_768,
    eps: 1e-6,
    theta: 10_000.0,
    tied: false,
};
const QWEN3: Defaults = Defaults {
    intermediate_size: 6144,
    heads: 32,
    kv_heads: Some(4),
    ..QWEN2
};
const QWEN3_VL: Defaults = Defaults {
    max_positions: 128_000,
    theta: 500_000.0,
    ..QWEN2
};
const QWEN2_COUNTS: Counts = Counts {
    experts_keys: &["num_experts"],
    experts: 60,
    per_token: Some(4),
    width_key: "moe_intermediate_size",
    width: 1408,
};
/// Published configs have `num_experts`, those that transformers 5 writes `num_local_experts`.
const QWEN3_COUNTS: Counts = Counts {
    experts_keys: &["num_experts", "num_local_experts"],
    experts: 128,
    per_token: Some(8),
    width_key: "moe_intermediate_size",
    width: 768,
};
const QWEN3_VL_COUNTS: Counts = Counts {
    experts_keys: QWEN3_COUNTS.experts_keys,
    ..QWEN2_COUNTS
};
/// Published with `[experts, in, out]`.
const QWEN3_VL_NAMES: MixtureNames = MixtureNames {
    fused: FusedLayout {
        input_first: true,
        interleaved: false,
    },
    ..mixture::NAMES
};
const SHARED_WIDTH: usize = 5632;
const WINDOW: usize = 4096;
/// `max_window_layers` of Qwen2-MoE: every second layer below this one has the window.
const WINDOWED: usize = 28;

/// Reads a Qwen2-MoE config.
pub(super) fn parse_qwen2(keys: &Keys) -> Result<ModelSpec> {
    let mut dense = dense::dimensions(keys, &QWEN2)?;
    let window = window(keys)?;
    let below = keys.count("max_window_layers", WINDOWED, MAX_LAYERS)?;
    dense::set_windows(keys, &mut dense.spec, window, |i| {
        window.is_some() && i % 2 == 0 && i < below
    })?;
    let mut experts = mixture::read(keys, &QWEN2_COUNTS, &[mixture::NAMES])?;
    experts.routing.normalize = keys.flag("norm_topk_prob", false)?;
    experts.shared = Some(SharedExpertSpec {
        intermediate_size: keys.size("shared_expert_intermediate_size", SHARED_WIDTH, MAX_WIDTH)?,
        gated: true,
    });
    dense.spec.block.mixture = Some(experts);
    finish(keys, dense)
}

/// Reads a Qwen3-MoE config.
pub(super) fn parse_qwen3(keys: &Keys) -> Result<ModelSpec> {
    let mut dense = dense::dimensions(keys, &QWEN3)?;
    let window = window(keys)?;
    dense::all_alike(keys, window)?;
    for layer in &mut dense.spec.layers {
        layer.window = window;
    }
    let mut experts = mixture::read(keys, &QWEN3_COUNTS, &[mixture::NAMES])?;
    experts.routing.normalize = keys.flag("norm_topk_prob", false)?;
    dense.spec.block.mixture = Some(experts);
    dense.spec.block.qk_norm = true;
    finish(keys, dense)
}

/// Reads the text tower of Qwen3-VL-MoE, which has no windows and always normalizes its gates.
pub(super) fn parse_qwen3_vl(keys: &Keys) -> Result<ModelSpec> {
    let mut dense = dense::dimensions(keys, &QWEN3_VL)?;
    dense::all_alike(keys, None)?;
    let mut experts = mixture::read(keys, &QWEN3_VL_COUNTS, &[QWEN3_VL_NAMES])?;
    if !keys.flag("norm_topk_prob", true)? {
        return Err(keys.error(
            "norm_topk_prob",
            "is false, but this architecture normalizes its gates",
        ));
    }
    experts.routing.normalize = true;
    dense.spec.block.mixture = Some(experts);
    dense.spec.block.qk_norm = true;
    finish(keys, dense)
}

fn window(keys: &Keys) -> Result<Option<usize>> {
    let in_use = keys.flag("use_sliding_window", false)?;
    if !in_use {
        // Transformers writes 0 for "none" in Qwen2-MoE's configs.
        return Ok(None);
    }
    keys.size_or_null("sliding_window", Some(WINDOW), MAX_POSITIONS)
}

fn finish(keys: &Keys, mut dense: Dense) -> Result<ModelSpec> {
    mixture::place_by_step(keys, &mut dense.spec.layers)?;
    let table = rope::shared(keys, dense.rope)?;
    Ok(dense.with_rope(table))
}
