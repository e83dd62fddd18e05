//! What the families with mixtures of experts share: experts, widths, groups and scale, checked, and the usual names.

use super::keys::{Keys, MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH};
use crate::error::Result;
use crate::model::spec::{FusedLayout, LayerSpec, MixtureNames, MixtureSpec};
use crate::numerics::routing::{GroupLimit, RoutingRule, Scoring};

/// Experts `[experts, out, in]`, gate before up: as transformers has them in memory.
const FUSED: FusedLayout = FusedLayout {
    input_first: false,
    interleaved: false,
};
/// As Qwen2-MoE and those after it have them.
pub(super) const NAMES: MixtureNames = MixtureNames {
    router: "mlp.gate",
    experts: "mlp.experts",
    projections: ["gate_proj", "up_proj", "down_proj"],
    shared: "mlp.shared_expert",
    fused: FUSED,
};
/// As Mixtral has them.
pub(super) const MIXTRAL: MixtureNames = MixtureNames {
    router: "block_sparse_moe.gate",
    experts: "block_sparse_moe.experts",
    projections: ["w1", "w3", "w2"],
    shared: "block_sparse_moe.shared_expert",
    fused: FUSED,
};

/// Keys of the two counts, and what transformers takes without them.
pub(super) struct Counts {
    /// Spellings of the number of routed experts; the first that is there counts.
    pub(super) experts_keys: &'static [&'static str],
    pub(super) experts: usize,
    /// `None`: it has to be there.
    pub(super) per_token: Option<usize>,
    /// The key of a routed expert's inner width.
    pub(super) width_key: &'static str,
    pub(super) width: usize,
}

/// A mixture with softmax scores that is not normalized; no shared expert, no groups.
pub(super) fn read(keys: &Keys, counts: &Counts, names: &[MixtureNames]) -> Result<MixtureSpec> {
    let given = counts.experts_keys.iter().find(|key| keys.some(key).is_some());
    let experts_key = given.unwrap_or(&counts.experts_keys[0]);
    let experts = keys.size(experts_key, counts.experts, MAX_EXPERTS)?;
    let per_token = keys
        .size_or_null("num_experts_per_tok", counts.per_token, MAX_EXPERTS)?
        .ok_or_else(|| keys.error("num_experts_per_tok", "is missing"))?;
    if per_token > experts {
        return Err(keys.error(
            "num_experts_per_tok",
            format!("is {per_token}, more than `{experts_key}` = {experts}"),
        ));
    }
    Ok(MixtureSpec {
        routing: RoutingRule {
            experts,
            experts_per_token: per_token,
            scoring: Scoring::Softmax,
            normalize: false,
            scale: 1.0,
            groups: None,
        },
        intermediate_size: keys.size(counts.width_key, counts.width, MAX_WIDTH)?,
        shared: None,
        correction_bias: false,
        router_bias: false,
        names: names.to_vec(),
    })
}

/// Limits `rule` to the best `topk_group` of `n_group` groups, each scored by its `best` experts.
pub(super) fn limit_groups(
    keys: &Keys,
    rule: &mut RoutingRule,
    best: usize,
    defaults: (Option<usize>, Option<usize>),
) -> Result<()> {
    let needed = |key: &str, default: Option<usize>| {
        keys.size_or_null(key, default, MAX_EXPERTS)?
            .ok_or_else(|| keys.error(key, "is missing"))
    };
    let (groups, used) = (needed("n_group", defaults.0)?, needed("topk_group", defaults.1)?);
    let size = rule.experts / groups;
    if !rule.experts.is_multiple_of(groups) || size < best {
        return Err(keys.error(
            "n_group",
            format!(
                "is {groups}, which does not cut {} experts into groups of at least {best}",
                rule.experts
            ),
        ));
    }
    if used > groups || used * size < rule.experts_per_token {
        return Err(keys.error(
            "topk_group",
            format!(
                "is {used}: so many of {groups} groups of {size} experts do not hold `num_experts_per_tok` = {}",
                rule.experts_per_token
            ),
        ));
    }
    rule.groups = Some(GroupLimit { groups, used, best });
    Ok(())
}

/// Makes every `decoder_sparse_step`th layer a mixture, but for `mlp_only_layers`.
pub(super) fn place_by_step(keys: &Keys, layers: &mut [LayerSpec]) -> Result<()> {
    let step = keys.size("decoder_sparse_step", 1, MAX_LAYERS)?;
    let dense = keys.counts("mlp_only_layers", MAX_LAYERS)?;
    for (i, layer) in layers.iter_mut().enumerate() {
        layer.mixture = !dense.contains(&i) && (i + 1).is_multiple_of(step);
    }
    Ok(())
}
