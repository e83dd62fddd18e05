//! Gemma 2 and the text tower of Gemma 3: sandwich norms that store weight - 1, a scaled embedding, an attention
//! scale of their own, windows in most layers; Gemma 2 with softcaps, Gemma 3 with query and key norms and a
//! second rotary table for its sliding layers.

use half::{bf16, f16};

use super::dense::{self, Defaults, Dense};
use super::keys::{Keys, MAX_LAYERS, MAX_POSITIONS, shorten};
use super::rope;
use crate::error::Result;
use crate::model::spec::ModelSpec;

const GEMMA2: Defaults = Defaults {
    vocab_size: 256_000,
    hidden_size: 2304,
    intermediate_size: 9216,
    layers: 26,
    heads: 8,
    kv_heads: Some(4),
    head_dim: Some(256),
    activation_key: "hidden_activation",
    activation: "gelu_pytorch_tanh",
    max_positions: 8192,
    eps: 1e-6,
    theta: 10_000.0,
    tied: true,
};
const GEMMA3: Defaults = Defaults {
    vocab_size: 262_208,
    max_positions: 131_072,
    theta: 1e6,
    ..GEMMA2
};
/// Frequency base of Gemma 3's sliding layers.
const LOCAL_THETA: f64 = 10_000.0;
const WINDOW: usize = 4096;
const QUERY_PRE_ATTN_SCALAR: f64 = 256.0;
const ATTENTION_SOFTCAP: f64 = 50.0;
const FINAL_SOFTCAP: f64 = 30.0;
/// Every so many layers of Gemma 3 is a full one.
const PATTERN: usize = 6;
/// Index of Gemma 3's table for full layers, and of that for sliding ones.
const FULL: usize = 0;
const SLIDING: usize = 1;

/// Reads a Gemma 2 config.
pub(super) fn parse_gemma2(keys: &Keys) -> Result<ModelSpec> {
    let mut dense = read(keys, &GEMMA2, |i| i % 2 == 0)?;
    dense.spec.block.attention_softcap =
        dense::softcap(keys, "attn_logit_softcapping", Some(ATTENTION_SOFTCAP))?;
    dense.spec.final_softcap = dense::softcap(keys, "final_logit_softcapping", Some(FINAL_SOFTCAP))?;
    let table = rope::shared(keys, dense.rope)?;
    Ok(dense.with_rope(table))
}

/// Reads a Gemma 3 text config.
pub(super) fn parse_gemma3(keys: &Keys) -> Result<ModelSpec> {
    let pattern = keys.size("sliding_window_pattern", PATTERN, MAX_LAYERS)?;
    let mut dense = read(keys, &GEMMA3, |i| (i + 1) % pattern != 0)?;
    if keys.some("attn_logit_softcapping").is_some() {
        return Err(keys.error(
            "attn_logit_softcapping",
            "is set, but Gemma 3's attention has no softcap",
        ));
    }
    dense.spec.final_softcap = dense::softcap(keys, "final_logit_softcapping", None)?;
    dense.spec.block.qk_norm = true;

    let new = keys.object("rope_parameters")?;
    if let Some(flat) = ["rope_type", "rope_theta", "factor"]
        .into_iter()
        .find(|key| new.some(key).is_some())
    {
        return Err(new.error(flat, "stands outside of `full_attention` and `sliding_attention`"));
    }
    let old = keys.object("rope_scaling")?;
    let full = if old.is_empty() {
        new.object("full_attention")?
    } else {
        old
    };
    let full_theta = theta(keys, &full, "rope_theta", GEMMA3.theta)?;
    let full_table = rope::table(&full, dense.rope, full_theta, None, None)?;
    let local = new.object("sliding_attention")?;
    let local_theta = theta(keys, &local, "rope_local_base_freq", LOCAL_THETA)?;
    let local_table = rope::table(&local, dense.rope, local_theta, None, None)?;

    let mut spec = dense.spec;
    spec.max_sequence = [full_table.max_sequence, local_table.max_sequence]
        .into_iter()
        .flatten()
        .min();
    spec.block.ropes = vec![full_table.rope, local_table.rope];
    for layer in &mut spec.layers {
        layer.rope = Some(if layer.window.is_some() { SLIDING } else { FULL });
    }
    Ok(spec)
}

fn theta(keys: &Keys, parameters: &Keys, old_key: &str, default: f64) -> Result<f64> {
    Ok(match parameters.positive("rope_theta")? {
        Some(theta) => theta,
        None => keys.positive(old_key)?.unwrap_or(default),
    })
}

/// What both share.
fn read(keys: &Keys, defaults: &Defaults, sliding: impl Fn(usize) -> bool) -> Result<Dense> {
    if keys.flag("use_bidirectional_attention", false)? {
        return Err(keys.error(
            "use_bidirectional_attention",
            "is true; only causal attention is supported",
        ));
    }
    let mut dense = dense::read(keys, defaults)?;
    let window = keys.size_or_null("sliding_window", Some(WINDOW), MAX_POSITIONS)?;
    dense::set_windows(keys, &mut dense.spec, window, sliding)?;
    let scalar = keys
        .positive("query_pre_attn_scalar")?
        .unwrap_or(QUERY_PRE_ATTN_SCALAR);
    dense.spec.block.attention_scale = scalar.powf(-0.5) as f32;
    dense.spec.block.norm.unit_offset = true;
    dense.spec.block.sandwich_norms = true;
    dense.spec.embedding_scale = Some(embedding_scale(keys, dense.spec.hidden_size)?);
    Ok(dense)
}

/// sqrt(hidden_size) as transformers has it: rounded to f32, then to the dtype of the checkpoint.
fn embedding_scale(keys: &Keys, hidden_size: usize) -> Result<f32> {
    let scale = (hidden_size as f64).sqrt() as f32;
    let key = if keys.some("dtype").is_some() {
        "dtype"
    } else {
        "torch_dtype"
    };
    let dtype = keys.text(key)?.unwrap_or("float32");
    match dtype.strip_prefix("torch.").unwrap_or(dtype) {
        "bfloat16" => Ok(bf16::from_f32(scale).to_f32()),
        "float16" => Ok(f16::from_f32(scale).to_f32()),
        "float32" => Ok(scale),
        other => Err(keys.error(
            key,
            format!(
                "is {}, supported are bfloat16, float16 and float32",
                shorten(other)
            ),
        )),
    }
}
