//! Vision-language models: only their text tower is described, by the parser of its own family. What is of the
//! outer model: where the tower's tensors lie, whether the head is tied, and the dtype.

use serde_json::{Map, Value};

use super::dense::tower;
use super::keys::{Keys, shorten};
use super::text_parser;
use crate::error::Result;
use crate::model::spec::{ModelSpec, TowerNames};

/// How a family wraps its text tower.
struct Wrapping {
    /// `model_type` of the text tower where the config does not say.
    text_type: &'static str,
    /// Whether the tower can be of another type.
    any_text: bool,
    /// Whether older configs have the text tower's keys beside `vision_config`, with no `text_config`.
    flat: bool,
    /// How the two `tie_word_embeddings` make one.
    tied: fn(outer: Option<bool>, text: Option<bool>) -> bool,
}

/// Reads a Qwen2-VL config.
pub(super) fn parse_qwen2_vl(keys: &Keys) -> Result<ModelSpec> {
    let wrapping = Wrapping {
        text_type: "qwen2_vl_text",
        any_text: false,
        flat: true,
        tied: either,
    };
    parse(keys, &wrapping)
}

/// Reads a Qwen2.5-VL config.
pub(super) fn parse_qwen2_5_vl(keys: &Keys) -> Result<ModelSpec> {
    let wrapping = Wrapping {
        text_type: "qwen2_5_vl_text",
        any_text: false,
        flat: true,
        tied: either,
    };
    parse(keys, &wrapping)
}

/// Reads a Qwen3-VL config.
pub(super) fn parse_qwen3_vl(keys: &Keys) -> Result<ModelSpec> {
    let wrapping = Wrapping {
        text_type: "qwen3_vl_text",
        any_text: false,
        flat: false,
        tied: |outer, text| outer.or(text).unwrap_or(false),
    };
    parse(keys, &wrapping)
}

/// Reads a Qwen3-VL-MoE config.
pub(super) fn parse_qwen3_vl_moe(keys: &Keys) -> Result<ModelSpec> {
    let wrapping = Wrapping {
        text_type: "qwen3_vl_moe_text",
        any_text: false,
        flat: false,
        tied: |outer, text| outer.or(text).unwrap_or(false),
    };
    parse(keys, &wrapping)
}

/// Reads a LLaVA 1.5 config (of the `llava-hf` layout).
pub(super) fn parse_llava(keys: &Keys) -> Result<ModelSpec> {
    let wrapping = Wrapping {
        text_type: "llama",
        any_text: true,
        flat: false,
        tied: either,
    };
    parse(keys, &wrapping)
}

/// Reads a multimodal Gemma 3 config.
pub(super) fn parse_gemma3(keys: &Keys) -> Result<ModelSpec> {
    let wrapping = Wrapping {
        text_type: "gemma3_text",
        any_text: false,
        flat: false,
        tied: |outer, text| outer.or(text).unwrap_or(true),
    };
    parse(keys, &wrapping)
}

fn either(outer: Option<bool>, text: Option<bool>) -> bool {
    outer == Some(true) || text == Some(true)
}

/// The text tower's names: as transformers has them in memory, as LLaVA and Gemma 3 are published, as Qwen2-VL and
/// Qwen2.5-VL are published.
fn names() -> Vec<TowerNames> {
    vec![
        tower("model.language_model.", "lm_head.weight"),
        tower("language_model.model.", "language_model.lm_head.weight"),
        tower("model.", "lm_head.weight"),
    ]
}

fn parse(outer: &Keys, wrapping: &Wrapping) -> Result<ModelSpec> {
    let nested = outer.some("text_config").is_some();
    let text = match (nested, wrapping.flat) {
        (true, _) => outer.object("text_config")?,
        (false, true) => outer.clone(),
        (false, false) => return Err(outer.error("text_config", "is missing")),
    };
    let text_type = match nested {
        true => text.text("model_type")?.unwrap_or(wrapping.text_type),
        false => wrapping.text_type,
    };
    let parser = text_parser(text_type)
        .filter(|_| wrapping.any_text || text_type == wrapping.text_type)
        .ok_or_else(|| {
            text.error(
                "model_type",
                format!(
                    "is {}, a text tower that is not supported here",
                    shorten(text_type)
                ),
            )
        })?;

    let given = |keys: &Keys| -> Result<Option<bool>> {
        match keys.some("tie_word_embeddings") {
            Some(_) => keys.flag("tie_word_embeddings", false).map(Some),
            None => Ok(None),
        }
    };
    let tied = (wrapping.tied)(given(outer)?, given(&text)?);
    let mut merged: Map<String, Value> = text.map().cloned().unwrap_or_default();
    merged.insert("tie_word_embeddings".into(), tied.into());
    if text.some("dtype").is_none() && text.some("torch_dtype").is_none() {
        for key in ["dtype", "torch_dtype"] {
            if let Some(dtype) = outer.some(key) {
                merged.insert(key.into(), dtype.clone());
            }
        }
    }
    let path = if nested { "text_config." } else { "" };
    let mut spec = parser(&Keys::at(&merged, path))?;
    spec.names = names();
    Ok(spec)
}
