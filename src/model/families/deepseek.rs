//! DeepSeek-V2 and V3 (and R1): latent attention with interleaved rotary pairs, dense layers first, then mixtures with a shared expert.
//! V2 scores by softmax, V3 by sigmoid with a correction that only the choice sees. Multi-token prediction layers, which V3's
//! checkpoints have after the last layer, are no part of the tower.

use super::dense::{self, Defaults};
use super::keys::{Keys, MAX_EXPERTS, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_WIDTH, shorten};
use super::mixture::{self, Counts};
use super::rope;
use crate::error::Result;
use crate::model::spec::{MixtureNames, MixtureSpec, MlaSpec, ModelSpec, SharedExpertSpec};
use crate::numerics::routing::Scoring;

const V2: Defaults = Defaults {
    vocab_size: 102_400,
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
const V3: Defaults = Defaults {
    vocab_size: 129_280,
    hidden_size: 7168,
    intermediate_size: 18_432,
    layers: 61,
    heads: 128,
    kv_heads: Some(128),
    max_positions: 4096,
    ..V2
};
const V2_COUNTS: Counts = Counts {
    experts_keys: &["n_routed_experts"],
    experts: 64,
    per_token: None,
    width_key: "moe_intermediate_size",
    width: 1407,
};
const V3_COUNTS: Counts = Counts {
    experts: 256,
    per_token: Some(8),
    width: 2048,
    ..V2_COUNTS
};
const NAMES: MixtureNames = MixtureNames {
    shared: "mlp.shared_experts",
    ..mixture::NAMES
};
const Q_LORA_RANK: usize = 1536;
const KV_LORA_RANK: usize = 512;
const NOPE_HEAD_DIM: usize = 128;
const ROPE_HEAD_DIM: usize = 64;
const VALUE_HEAD_DIM: usize = 128;
/// The latents' norms do not read the config's epsilon.
const LATENT_NORM_EPS: f32 = 1e-6;
const V2_SHARED: usize = 2;
const V3_SHARED: usize = 1;
/// `first_k_dense_replace`
const V3_DENSE_LAYERS: usize = 3;
const V3_SCALE: f64 = 2.5;
const V3_GROUPS: (Option<usize>, Option<usize>) = (Some(8), Some(4));

/// Reads a DeepSeek-V2 config.
pub(super) fn parse_v2(keys: &Keys) -> Result<ModelSpec> {
    let mut experts = mixture::read(keys, &V2_COUNTS, &[NAMES])?;
    only(keys, "scoring_func", &["softmax"])?;
    if keys.flag("norm_topk_prob", false)? {
        return Err(keys.error(
            "norm_topk_prob",
            "is true, but transformers' DeepSeek-V2 does not normalize its gates",
        ));
    }
    if only(keys, "topk_method", &["greedy", "group_limited_greedy"])? == "group_limited_greedy" {
        mixture::limit_groups(keys, &mut experts.routing, 1, (None, None))?;
    }
    experts.routing.scale = keys.positive("routed_scaling_factor")?.unwrap_or(1.0) as f32;
    parse(keys, &V2, experts, V2_SHARED, 0, true)
}

/// Reads a DeepSeek-V3 config.
pub(super) fn parse_v3(keys: &Keys) -> Result<ModelSpec> {
    let mut experts = mixture::read(keys, &V3_COUNTS, &[NAMES])?;
    only(keys, "scoring_func", &["sigmoid"])?;
    only(keys, "topk_method", &["noaux_tc"])?;
    experts.routing.scoring = Scoring::Sigmoid;
    experts.correction_bias = true;
    experts.routing.normalize = keys.flag("norm_topk_prob", true)?;
    experts.routing.scale = keys.positive("routed_scaling_factor")?.unwrap_or(V3_SCALE) as f32;
    mixture::limit_groups(keys, &mut experts.routing, 2, V3_GROUPS)?;
    let interleaved = keys.flag("rope_interleave", true)?;
    parse(keys, &V3, experts, V3_SHARED, V3_DENSE_LAYERS, interleaved)
}

/// A string that can only be one of `known`; the first where absent.
fn only<'a>(keys: &Keys<'a>, key: &str, known: &[&'a str]) -> Result<&'a str> {
    match keys.text(key)? {
        None => Ok(known[0]),
        Some(text) if known.contains(&text) => Ok(text),
        Some(other) => Err(keys.error(
            key,
            format!("is {}, supported are {}", shorten(other), known.join(", ")),
        )),
    }
}

fn parse(
    keys: &Keys,
    defaults: &Defaults,
    mut experts: MixtureSpec,
    shared: usize,
    dense_layers: usize,
    interleaved: bool,
) -> Result<ModelSpec> {
    let mla = MlaSpec {
        q_lora_rank: keys.size_or_null("q_lora_rank", Some(Q_LORA_RANK), MAX_WIDTH)?,
        kv_lora_rank: keys.size("kv_lora_rank", KV_LORA_RANK, MAX_WIDTH)?,
        qk_nope_head_dim: keys.size("qk_nope_head_dim", NOPE_HEAD_DIM, MAX_HEAD_DIM)?,
        qk_rope_head_dim: keys.size("qk_rope_head_dim", ROPE_HEAD_DIM, MAX_HEAD_DIM)?,
        v_head_dim: keys.size("v_head_dim", VALUE_HEAD_DIM, MAX_HEAD_DIM)?,
        norm_eps: LATENT_NORM_EPS,
    };
    let heads = keys.size("num_attention_heads", defaults.heads, MAX_HEADS)?;
    if mla.qk_rope_head_dim % 2 == 1 || mla.v_head_dim * heads > MAX_WIDTH {
        return Err(keys.error(
            "qk_rope_head_dim",
            format!(
                "is {} and `v_head_dim` {}, expected an even number, and up to {MAX_WIDTH} for all heads",
                mla.qk_rope_head_dim, mla.v_head_dim
            ),
        ));
    }
    let head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim;
    let mut dense = dense::with_head_dim(keys, defaults, Some(head_dim))?;
    if dense.spec.block.kv_heads != heads {
        return Err(keys.error(
            "num_key_value_heads",
            format!(
                "is {}, but latent attention has as many as `num_attention_heads` = {heads}",
                dense.spec.block.kv_heads
            ),
        ));
    }
    dense::all_alike(keys, None)?;
    dense.rope.head_dim = mla.qk_rope_head_dim;

    // Several shared experts are one wide one on disk.
    let shared = keys.size("n_shared_experts", shared, MAX_EXPERTS)?;
    let width = experts.intermediate_size * shared;
    if width > MAX_WIDTH {
        return Err(keys.error(
            "n_shared_experts",
            format!("is {shared}, which makes a shared expert of {width} channels"),
        ));
    }
    experts.shared = Some(SharedExpertSpec {
        intermediate_size: width,
        gated: false,
    });
    let first = keys.count("first_k_dense_replace", dense_layers, MAX_LAYERS)?;
    if keys.size("moe_layer_freq", 1, MAX_LAYERS)? != 1 {
        return Err(keys.error("moe_layer_freq", "is not 1, which transformers does not support"));
    }
    for layer in dense.spec.layers.iter_mut().skip(first) {
        layer.mixture = true;
    }
    let block = &mut dense.spec.block;
    block.mla = Some(mla);
    block.mixture = Some(experts);
    block.attention_scale = attention_scale(keys, head_dim)?;
    let mut table = rope::shared(keys, dense.rope)?;
    table.rope.interleaved = interleaved;
    Ok(dense.with_rope(table))
}

/// head_dim^-0.5, times the square of yarn's magnitude for all channels.
fn attention_scale(keys: &Keys, head_dim: usize) -> Result<f32> {
    let mut scale = (head_dim as f64).powf(-0.5);
    let parameters = rope::parameters(keys)?;
    if rope::kind(&parameters)? != "default"
        && let Some(by) = parameters.positive("mscale_all_dim")?
    {
        let factor = parameters
            .positive("factor")?
            .ok_or_else(|| parameters.error("factor", "is missing"))?;
        scale *= rope::magnitude(factor, by).powi(2);
    }
    Ok(scale as f32)
}
