//! compressed-tensors' `quantization_config`.
//!
//! Sources: compressed-tensors 0.20, `quantization/quant_{args,scheme,config}.py` (keys; unknown ones are rejected) and
//! `utils/match.py` (targets and their order).

use super::LinearLayout;
use super::schemes::{self, Scheme};
use crate::error::{Error, Result};
use crate::numerics::bits::WIDTHS;
use regex::Regex;
use serde_json::{Value, json};

/// The `format` of the config.
const PACK_QUANTIZED: &str = "pack-quantized";
/// Formats of integer codes that are read.
const INTEGERS: [&str; 3] = [PACK_QUANTIZED, "int-quantized", "naive-quantized"];

/// One group with `targets: ["Linear"]` where all quantized linears agree, else one group a scheme with explicit names.
///
/// `actorder` is null: it only tells how codes were searched. Readers treat null and `static` alike (codes in
/// column order, no `weight_g_idx`); `group`, which needs one, was removed from compressed-tensors in 2026.
pub(super) fn quantization_config(linears: &[LinearLayout]) -> Value {
    let schemes = schemes::schemes(linears);
    let uniform = schemes.len() == 1;
    let groups: serde_json::Map<String, Value> = schemes
        .into_iter()
        .enumerate()
        .map(|(index, (scheme, members))| {
            let targets = if uniform {
                json!(["Linear"])
            } else {
                members.iter().map(|it| it.name.as_str()).collect()
            };
            (format!("group_{index}"), group(targets, scheme))
        })
        .collect();
    let ignore: Value = linears
        .iter()
        .filter(|linear| linear.grid.is_none())
        .map(|linear| linear.name.as_str())
        .collect();
    json!({
        "quant_method": "compressed-tensors",
        "format": PACK_QUANTIZED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "global_compression_ratio": null,
    })
}

/// One entry of `config_groups`. Readers reject keys that they do not know here.
fn group(targets: Value, scheme: Scheme) -> Value {
    let strategy = match scheme.group_size {
        Some(_) => "group",
        None => "channel",
    };
    json!({
        "targets": targets,
        "format": PACK_QUANTIZED,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": strategy,
            "group_size": scheme.group_size,
            "dynamic": false,
            "actorder": null,
        },
        "input_activations": null,
        "output_activations": null,
    })
}

pub(super) fn config_error(linear: &str, problem: impl Into<String>) -> Error {
    Error::invalid(
        format!("quantization_config for {linear}"),
        problem,
        "read are integer weights of 2, 3, 4 or 8 bits, in groups or per channel, and 8-bit floats; else start from the original checkpoint",
    )
}

/// The group whose target fits best: the exact name, then a regular expression, then the class `Linear`.
fn group_of<'a>(linear: &str, config: &'a Value) -> Result<&'a Value> {
    let groups = config.get("config_groups").and_then(Value::as_object);
    let rank = |target: &str| match target.strip_prefix("re:") {
        // Python's re.match: from the start, not to the end. Patterns with look-around fit nothing here.
        Some(pattern) => Regex::new(&format!("^(?:{pattern})"))
            .is_ok_and(|pattern| pattern.is_match(linear))
            .then_some(1),
        None if target == linear => Some(0),
        None => (target == "Linear").then_some(2),
    };
    let mut best: Option<(i32, &Value)> = None;
    for group in groups.into_iter().flat_map(|groups| groups.values()) {
        let targets = group.get("targets").and_then(Value::as_array);
        let targets = targets.into_iter().flatten().filter_map(Value::as_str);
        if let Some(rank) = targets.filter_map(rank).min()
            && best.is_none_or(|(known, _)| rank < known)
        {
            best = Some((rank, group));
        }
    }
    best.map(|(_, group)| group)
        .ok_or_else(|| config_error(linear, "no entry of config_groups targets it"))
}

/// The groups of a config, in words.
pub(super) fn describe(config: &Value) -> String {
    let groups = config.get("config_groups").and_then(Value::as_object);
    let words = |group: &Value| {
        let weights = &group["weights"];
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let size = weights["group_size"]
            .as_u64()
            .filter(|_| weights["strategy"] == "group");
        let size = size.map_or(String::new(), |size| format!(" of {size}"));
        let (bits, kind, strategy) = (&weights["num_bits"], &weights["type"], &weights["strategy"]);
        format!("{bits}-bit {} by {}{size}", text(kind), text(strategy))
    };
    let words: Vec<String> = groups
        .into_iter()
        .flatten()
        .map(|(_, group)| words(group))
        .collect();
    words.join("; ")
}

/// The sides of a float linear's blocks, rows first, where its scales are a block's each.
pub(super) fn block_of(linear: &str, config: &Value) -> Result<Option<[usize; 2]>> {
    let weights = &group_of(linear, config)?["weights"];
    if weights.get("strategy").and_then(Value::as_str) != Some("block") {
        return Ok(None);
    }
    let sides = super::float8::block_sides(&weights["block_structure"]);
    sides.map(Some).ok_or_else(|| {
        config_error(
            linear,
            format!("block_structure is {}", weights["block_structure"]),
        )
    })
}

/// The integer scheme of a linear.
pub(super) fn scheme_of(linear: &str, config: &Value) -> Result<Scheme> {
    let group = group_of(linear, config)?;
    let format = group.get("format").filter(|it| !it.is_null());
    let format = format.or(config.get("format")).and_then(Value::as_str);
    if !format.is_some_and(|format| INTEGERS.contains(&format)) {
        return Err(config_error(linear, format!("the format is {format:?}")));
    }
    let weights = &group["weights"];
    let kind = weights.get("type").map_or(Some("int"), Value::as_str);
    if kind != Some("int") {
        return Err(config_error(linear, format!("the type is {kind:?}")));
    }
    let number = |key: &str| weights.get(key).and_then(Value::as_i64);
    let bits = number("num_bits").and_then(|bits| u32::try_from(bits).ok());
    let bits = bits.filter(|bits| WIDTHS.contains(bits));
    let Some(bits) = bits else {
        return Err(config_error(
            linear,
            format!("num_bits is {}", weights["num_bits"]),
        ));
    };
    let group_size = match (
        weights.get("strategy").and_then(Value::as_str),
        number("group_size"),
    ) {
        (Some("channel"), _) | (None, Some(-1)) => None,
        (Some("group") | None, Some(size)) if size > 0 => usize::try_from(size).ok(),
        (strategy, size) => {
            return Err(config_error(
                linear,
                format!("strategy {strategy:?} with group_size {size:?}"),
            ));
        }
    };
    Ok(Scheme {
        bits,
        group_size,
        symmetric: weights["symmetric"].as_bool().unwrap_or(true),
    })
}
