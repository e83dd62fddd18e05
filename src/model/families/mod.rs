//! From `config.json` to [`ModelSpec`], one file a family. This module reads a parsed config and nothing else: no tensors, no files.
//!
//! To add a family: one file with a `parse(&Keys) -> Result<ModelSpec>`, and one row in [`FAMILIES`].

mod deepseek;
mod dense;
mod gemma;
mod gpt_oss;
mod keys;
mod llama;
mod mistral;
mod mixtral;
mod mixture;
mod phi;
mod qwen;
mod qwen_moe;
mod rope;
mod vision_language;

use serde_json::Value;

use self::keys::{Keys, shorten};
use super::spec::ModelSpec;
use crate::error::{Error, Result};

type Parser = fn(&Keys) -> Result<ModelSpec>;

/// One supported family.
struct Family {
    /// Its entry in `architectures`; none for a text tower that only occurs inside of a vision-language model.
    architecture: Option<&'static str>,
    /// Its `model_type`.
    model_type: &'static str,
    /// Whether it is a vision-language model, whose text tower has a row of its own.
    vision: bool,
    /// Reads its config.
    parse: Parser,
}

impl Family {
    const fn text(architecture: Option<&'static str>, model_type: &'static str, parse: Parser) -> Self {
        Self {
            architecture,
            model_type,
            vision: false,
            parse,
        }
    }

    const fn vision(architecture: &'static str, model_type: &'static str, parse: Parser) -> Self {
        Self {
            architecture: Some(architecture),
            model_type,
            vision: true,
            parse,
        }
    }
}

/// Every supported family.
#[rustfmt::skip]
const FAMILIES: &[Family] = &[
    Family::text(Some("LlamaForCausalLM"), "llama", llama::parse),
    Family::text(Some("MistralForCausalLM"), "mistral", mistral::parse),
    Family::text(Some("Qwen2ForCausalLM"), "qwen2", qwen::parse_qwen2),
    Family::text(Some("Qwen3ForCausalLM"), "qwen3", qwen::parse_qwen3),
    Family::text(Some("Gemma2ForCausalLM"), "gemma2", gemma::parse_gemma2),
    Family::text(Some("Gemma3ForCausalLM"), "gemma3_text", gemma::parse_gemma3),
    Family::text(Some("Phi3ForCausalLM"), "phi3", phi::parse),
    Family::text(Some("MixtralForCausalLM"), "mixtral", mixtral::parse),
    Family::text(Some("Qwen2MoeForCausalLM"), "qwen2_moe", qwen_moe::parse_qwen2),
    Family::text(Some("Qwen3MoeForCausalLM"), "qwen3_moe", qwen_moe::parse_qwen3),
    Family::text(Some("DeepseekV2ForCausalLM"), "deepseek_v2", deepseek::parse_v2),
    Family::text(Some("DeepseekV3ForCausalLM"), "deepseek_v3", deepseek::parse_v3),
    Family::text(Some("GptOssForCausalLM"), "gpt_oss", gpt_oss::parse),
    Family::text(None, "qwen3_vl_moe_text", qwen_moe::parse_qwen3_vl),
    Family::text(None, "qwen2_vl_text", qwen::parse_qwen2_vl),
    Family::text(None, "qwen2_5_vl_text", qwen::parse_qwen2_vl),
    Family::text(None, "qwen3_vl_text", qwen::parse_qwen3_vl),
    Family::vision("Qwen2VLForConditionalGeneration", "qwen2_vl", vision_language::parse_qwen2_vl),
    Family::vision("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", vision_language::parse_qwen2_5_vl),
    Family::vision("Qwen3VLForConditionalGeneration", "qwen3_vl", vision_language::parse_qwen3_vl),
    Family::vision("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", vision_language::parse_qwen3_vl_moe),
    Family::vision("LlavaForConditionalGeneration", "llava", vision_language::parse_llava),
    Family::vision("Gemma3ForConditionalGeneration", "gemma3", vision_language::parse_gemma3),
];

/// The architectures that [`parse`] accepts.
pub fn supported() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().filter_map(|family| family.architecture)
}

/// Describes the text tower of the checkpoint that `config` (its `config.json`) belongs to.
///
/// The family is the first entry of `architectures`, or `model_type` where there are none.
pub fn parse(config: &Value) -> Result<ModelSpec> {
    let keys = Keys::root(config)?;
    let architecture = keys
        .texts("architectures")?
        .and_then(|list| list.first().copied());
    let model_type = keys.text("model_type")?;
    let (family, name) = match (architecture, model_type) {
        (Some(name), _) => (FAMILIES.iter().find(|f| f.architecture == Some(name)), name),
        (None, Some(name)) => (
            FAMILIES
                .iter()
                .find(|f| f.architecture.is_some() && f.model_type == name),
            name,
        ),
        (None, None) => return Err(keys.error("architectures", "and `model_type` are missing")),
    };
    let family = family.ok_or_else(|| unsupported(name))?;
    if let Some(model_type) = model_type.filter(|t| *t != family.model_type) {
        return Err(keys.error(
            "model_type",
            format!(
                "is {}, but `architectures` has {name}, whose type is {:?}",
                shorten(model_type),
                family.model_type
            ),
        ));
    }
    let mut spec = (family.parse)(&keys)?;
    spec.architecture = name.to_owned();
    Ok(spec)
}

/// The parser of a text tower by its `model_type`.
fn text_parser(model_type: &str) -> Option<Parser> {
    FAMILIES
        .iter()
        .find(|f| !f.vision && f.model_type == model_type)
        .map(|f| f.parse)
}

fn unsupported(name: &str) -> Error {
    let list: Vec<_> = supported().collect();
    Error::invalid(
        "config.json",
        format!(
            "architecture {} is not supported; supported are {}",
            shorten(name),
            list.join(", ")
        ),
        "models of another architecture are not read as one of these; to add a family, see src/model/families/mod.rs",
    )
}
