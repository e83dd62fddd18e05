//! GPTQ's `quantization_config`, which is also its `quantize_config.json`.
//!
//! One base scheme; linears that differ are named by regular expressions in `dynamic`, in the order in which readers try them:
//! `-:` leaves a linear alone, `+:` overrides keys. GPTQModel matches a linear's own name, vLLM the name of the fused
//! one (`qkv_proj`), in a tower whose prefix it renames (`model.language_model.` is `language_model.model.` there); the patterns fit both.
//!
//! Sources: GPTQModel 7.7, `quantization/config.py` (`dynamic_get`, `from_quant_config`) and `utils/model.py`
//! (`FUSED_PROJECTION_UNITS`). What is said of vLLM was not checked against its sources.

use super::LinearLayout;
use super::schemes::{Scheme, schemes};
use crate::numerics::bits::WIDTHS;
use regex::Regex;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// What a config says of one linear.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stated {
    /// `None` if it is none of the known widths.
    pub(super) bits: Option<u32>,
    /// `None` for one scale a row.
    pub(super) group_size: Option<usize>,
    pub(super) symmetric: bool,
    /// Made by GPTQModel, whose word-wise carry in version 1 zero points can be followed.
    pub(super) trusted_carry: bool,
}

/// Linears that serving stacks fuse, and the name of the whole.
const FUSED: [(&str, &[&str]); 2] = [
    ("qkv_proj", &["q_proj", "k_proj", "v_proj"]),
    ("gate_up_proj", &["gate_proj", "up_proj"]),
];

/// Writes the config; `version` is the `checkpoint_format`.
pub(super) fn quantization_config(version: &str, linears: &[LinearLayout]) -> Value {
    let schemes = schemes(linears);
    // The base is the scheme of the most linears, the earliest of several.
    let base = schemes
        .iter()
        .rev()
        .max_by_key(|(_, members)| members.len())
        .map_or(
            Scheme {
                bits: 4,
                group_size: Some(128),
                symmetric: true,
            },
            |&(scheme, _)| scheme,
        );
    let mut dynamic = Map::new();
    let ignored = linears.iter().filter(|linear| {
        // The head has a key of its own.
        linear.grid.is_none() && !linear.name.ends_with("lm_head")
    });
    for pattern in patterns(ignored) {
        dynamic.insert(format!("-:{pattern}"), json!({}));
    }
    for (scheme, members) in schemes.iter().filter(|&&(scheme, _)| scheme != base) {
        for pattern in patterns(members.iter().copied()) {
            dynamic.insert(
                format!("+:{pattern}"),
                json!({
                    "bits": scheme.bits,
                    "group_size": group_size(scheme),
                    "sym": scheme.symmetric,
                }),
            );
        }
    }
    let mut config = json!({
        "quant_method": "gptq",
        "checkpoint_format": version,
        "format": version,
        "bits": base.bits,
        "group_size": group_size(&base),
        "sym": base.symmetric,
        "desc_act": false,
        "lm_head": false,
        "pack_dtype": "int32",
        "meta": {"quantizer": [concat!("quantflow:", env!("CARGO_PKG_VERSION"))]},
    });
    if !dynamic.is_empty() {
        config["dynamic"] = Value::Object(dynamic);
    }
    config
}

fn group_size(scheme: &Scheme) -> Value {
    scheme.group_size.map_or(json!(-1), |size| json!(size))
}

/// Patterns that fit exactly `members`, fused linears as one.
fn patterns<'a>(members: impl Iterator<Item = &'a LinearLayout>) -> Vec<String> {
    let tails: Vec<&str> = members.map(|linear| tail(&linear.name)).collect();
    let known: BTreeSet<&str> = tails.iter().copied().collect();
    let mut done: BTreeSet<&str> = BTreeSet::new();
    let mut patterns = Vec::new();
    for tail in tails {
        if done.contains(tail) {
            continue;
        }
        let (parent, leaf) = tail.rsplit_once('.').unwrap_or(("", tail));
        let dot = if parent.is_empty() { "" } else { "." };
        let unit = FUSED.iter().find(|(_, parts)| {
            let has = |part: &&str| known.contains(format!("{parent}{dot}{part}").as_str());
            parts.contains(&leaf) && parts.iter().all(has)
        });
        let leaves = match unit {
            None => regex::escape(leaf),
            Some((whole, parts)) => {
                for part in *parts {
                    let name = format!("{parent}{dot}{part}");
                    done.extend(known.get(name.as_str()));
                }
                format!("(?:{}|{whole})", parts.join("|"))
            }
        };
        patterns.push(format!(
            r"(?:.*\.)?{}{leaves}$",
            regex::escape(&format!("{parent}{dot}"))
        ));
    }
    patterns
}

/// The name without the prefixes that serving stacks rename: from `layers.` on in a text tower, else without `model.`.
fn tail(name: &str) -> &str {
    let text = ["language_model.", "text_model."];
    let layers = name.find("layers.").filter(|&at| at > 0);
    match layers {
        Some(at) if text.iter().any(|tower| name[..at].contains(tower)) => &name[at..],
        _ => name.strip_prefix("model.").unwrap_or(name),
    }
}

/// Reads a config of any writer. Patterns that need look-around are passed over.
pub(super) fn stated(linear: &str, config: &Value) -> Stated {
    let dynamic = config.get("dynamic").and_then(Value::as_object);
    let overrides = dynamic.into_iter().flatten().find_map(|(pattern, values)| {
        let pattern = pattern.strip_prefix("+:").unwrap_or(pattern);
        Regex::new(&format!("^(?:{pattern})"))
            .is_ok_and(|pattern| pattern.is_match(linear))
            .then_some(values)
    });
    let get = |key: &str| {
        overrides
            .and_then(|values| values.get(key))
            .or_else(|| config.get(key))
    };
    let bits = get("bits").and_then(Value::as_u64);
    let bits = bits.and_then(|bits| u32::try_from(bits).ok());
    let group_size = get("group_size").and_then(Value::as_u64);
    let makers = match config.pointer("/meta/quantizer") {
        Some(Value::Array(makers)) => makers.iter().filter_map(Value::as_str).collect(),
        Some(Value::String(maker)) => vec![maker.as_str()],
        _ => Vec::new(),
    };
    Stated {
        bits: bits.filter(|bits| WIDTHS.contains(bits)),
        group_size: group_size.and_then(|size| usize::try_from(size).ok()),
        symmetric: get("sym").and_then(Value::as_bool).unwrap_or(true),
        trusted_carry: makers.iter().any(|maker| maker.starts_with("gptqmodel:")),
    }
}
