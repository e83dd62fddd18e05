//! gpt-oss: attention sinks, biases, alternating windows, and a mixture in every layer whose experts lie in one tensor, gate and up
//! interleaved, with a clamped SwiGLU. Only checkpoints in bf16, f16 or f32: MXFP4 ones are refused where their tensors are read.

use super::dense::{self, Defaults};
use super::keys::{Keys, MAX_POSITIONS};
use super::mixture::{self, Counts};
use super::rope;
use crate::error::Result;
use crate::model::spec::{Activation, FusedLayout, MixtureNames, ModelSpec};
use serde_json::{Map, json};

const DEFAULTS: Defaults = Defaults {
    vocab_size: 201_088,
    hidden_size: 2880,
    intermediate_size: 2880,
    layers: 36,
    heads: 64,
    kv_heads: Some(8),
    head_dim: Some(64),
    activation_key: "hidden_act",
    activation: "silu",
    max_positions: 131_072,
    eps: 1e-5,
    theta: 150_000.0,
    tied: false,
};
/// Published configs have `num_local_experts`; the class also calls it `num_experts`.
const COUNTS: Counts = Counts {
    experts_keys: &["num_local_experts", "num_experts"],
    experts: 128,
    per_token: Some(4),
    width_key: "intermediate_size",
    width: DEFAULTS.intermediate_size,
};
const NAMES: MixtureNames = MixtureNames {
    router: "mlp.router",
    fused: FusedLayout {
        input_first: true,
        interleaved: true,
    },
    ..mixture::NAMES
};
const WINDOW: usize = 128;
const ALPHA: f64 = 1.702;
const LIMIT: f64 = 7.0;

/// Reads a gpt-oss config.
pub(super) fn parse(keys: &Keys) -> Result<ModelSpec> {
    let mut dense = dense::dimensions(keys, &DEFAULTS)?;
    let window = keys.size_or_null("sliding_window", Some(WINDOW), MAX_POSITIONS)?;
    dense::set_windows(keys, &mut dense.spec, window, |i| i % 2 == 0)?;
    let mut experts = mixture::read(keys, &COUNTS, &[NAMES])?;
    // The largest logits first, then softmax over them: the same as normalized scores.
    experts.routing.normalize = true;
    experts.router_bias = true;
    let block = &mut dense.spec.block;
    block.mixture = Some(experts);
    block.sinks = true;
    block.activation = Activation::ClampedSwiglu {
        alpha: keys.positive("swiglu_alpha")?.unwrap_or(ALPHA) as f32,
        limit: keys.positive("swiglu_limit")?.unwrap_or(LIMIT) as f32,
    };
    for layer in &mut dense.spec.layers {
        layer.mixture = true;
    }
    let default = Map::from_iter([
        ("rope_type".into(), json!("yarn")),
        ("factor".into(), json!(32.0)),
        ("truncate".into(), json!(false)),
        ("original_max_position_embeddings".into(), json!(4096)),
    ]);
    let table = match rope::parameters(keys)?.is_empty() {
        false => rope::shared(keys, dense.rope)?,
        true => {
            let theta = keys.positive("rope_theta")?.unwrap_or(DEFAULTS.theta);
            rope::table(
                &Keys::at(&default, "rope_parameters."),
                dense.rope,
                theta,
                None,
                None,
            )?
        }
    };
    Ok(dense.with_rope(table))
}
