//! What a checkpoint's `quantization_config` says of how its weights are stored, and the one way in which they are read: [`Reader`].
//!
//! Which weights are quantized is seen by their tensors, not by lists of names in the config, which each tool matches in its own way.
//! A weight is known by the name that it has, or would have, unquantized: `{linear}.weight`, or that of a tensor of all experts.

use super::float8::{self, Float8, SCALES};
use super::{
    CodedShape, CompressedTensors, Format, Gptq, TensorLookup, TensorSpec, compressed_tensors_config,
};
use crate::error::{Error, Result};
use crate::numerics::QuantizedWeight;
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeSet;
use std::ops::Range;

/// What speaks of a linear's quantized activations, beside its weight; of no use to a new weight.
const ACTIVATIONS: [&str; 5] = [
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "activation_scale",
];

/// Keys of `config.json` below which a quantization is described, the first that is there counts.
pub const CONFIG_KEYS: [&str; 4] = [
    "/quantization_config",
    "/text_config/quantization_config",
    "/compression_config",
    "/text_config/compression_config",
];

/// The quantization that a `config.json` describes, if it describes one.
pub fn quantization_config(config: &Value) -> Option<&Value> {
    let mut found = CONFIG_KEYS.iter().filter_map(|key| config.pointer(key));
    found.find(|value| !value.is_null())
}

/// A weight as it is stored.
pub enum Stored<'a> {
    /// Integer codes on a grid.
    Codes(QuantizedWeight),
    /// 8-bit floats with scales.
    Floats(Float8<'a>),
}

impl Stored<'_> {
    /// Rows `rows` of the matrix, or of that of `expert` where there is one an expert, in f32.
    ///
    /// # Errors
    /// A scale, or an element, is no number.
    pub fn dequantize(&self, expert: usize, rows: Range<usize>) -> Result<Vec<f32>> {
        match self {
            Self::Codes(weight) => Ok(weight.dequantize_rows(rows)),
            Self::Floats(floats) => floats.dequantize(expert, rows),
        }
    }
}

/// Reads the quantized weights of a checkpoint.
pub struct Reader {
    config: Value,
    method: Method,
}

enum Method {
    /// Integer codes in one of the layouts that are written, too. compressed-tensors may hold 8-bit floats beside them.
    Format(Box<dyn Format>),
    /// 8-bit floats; the sides of a block, unless a scale belongs to a row or to all.
    Fp8(Option<[usize; 2]>),
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Reader").field(&self.describe()).finish()
    }
}

impl Reader {
    /// Reads a `quantization_config`.
    ///
    /// # Errors
    /// A method or layout that cannot be read.
    pub fn new(config: &Value) -> Result<Self> {
        let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or_default();
        let refuse = |problem: String| {
            let hint = "readable are compressed-tensors (integers, 8-bit floats), gptq, gptq_v2 and fp8; else start from the original checkpoint";
            Err(Error::invalid("quantization_config", problem, hint))
        };
        let method = match (text("quant_method"), text("checkpoint_format")) {
            ("compressed-tensors", _) => {
                let transforms = config.pointer("/transform_config/config_groups");
                if transforms
                    .and_then(Value::as_object)
                    .is_some_and(|groups| !groups.is_empty())
                {
                    return refuse("has a transform_config: its weights are rotated".into());
                }
                Method::Format(Box::new(CompressedTensors))
            }
            ("gptq", "gptq" | "") => Method::Format(Box::new(Gptq::V1)),
            ("gptq", "gptq_v2") => Method::Format(Box::new(Gptq::V2)),
            ("fp8", _) => match config.get("weight_block_size").filter(|sides| !sides.is_null()) {
                None => Method::Fp8(None),
                Some(sides) => match float8::block_sides(sides) {
                    Some(block) => Method::Fp8(Some(block)),
                    None => return refuse(format!("weight_block_size is {sides}, not two sides of a block")),
                },
            },
            (method, layout) => {
                return refuse(format!(
                    "quant_method {method:?} with checkpoint_format {layout:?} cannot be read"
                ));
            }
        };
        Ok(Self {
            config: config.clone(),
            method,
        })
    }

    /// Refuses what a checkpoint quantized anew could not say.
    ///
    /// # Errors
    /// Its key-value cache is quantized, too.
    pub fn expect_weights_alone(&self) -> Result<()> {
        match self
            .config
            .get("kv_cache_scheme")
            .filter(|scheme| !scheme.is_null())
        {
            None => Ok(()),
            Some(_) => Err(Error::invalid(
                "quantization_config",
                "has a kv_cache_scheme, which no output keeps",
                "start from a checkpoint whose key-value cache is not quantized",
            )),
        }
    }

    /// The name that the weight which `part` holds would have unquantized; `None` if `part` is plain, or no more than an accompaniment.
    pub fn weight_name(&self, part: &TensorSpec) -> Option<String> {
        let name = &part.name;
        let codes = self.format().and_then(|format| {
            let linear = name.strip_suffix(format.parts()[0])?.strip_suffix('.')?;
            Some(format!("{linear}.weight"))
        });
        codes.or_else(|| self.is_held_by(part).then(|| name.clone()))
    }

    /// Whether the weight `name` is stored quantized.
    pub fn holds(&self, name: &str, tensor: TensorLookup<'_, '_>) -> bool {
        match (tensor(name), self.format(), name.strip_suffix(".weight")) {
            (Some((spec, _)), ..) => self.is_held_by(&spec),
            (None, Some(format), Some(linear)) => {
                tensor(&format!("{linear}.{}", format.parts()[0])).is_some()
            }
            _ => false,
        }
    }

    /// All tensors that there are of the weight `name`, which is stored quantized; those of its activations, too.
    pub fn parts(&self, name: &str, tensor: TensorLookup<'_, '_>) -> BTreeSet<String> {
        let mut names: BTreeSet<String> = SCALES.map(|ending| format!("{name}{ending}")).into();
        names.insert(name.to_owned());
        if let Some(linear) = name.strip_suffix(".weight") {
            let codes = self.format().map_or(&[][..], |format| format.parts());
            let parts = codes.iter().chain(&ACTIVATIONS);
            names.extend(parts.map(|part| format!("{linear}.{part}")));
        }
        names.retain(|name| tensor(name).is_some());
        names
    }

    /// Shape of the weight `name`, which is stored quantized. Checks the shapes and dtypes of all its tensors, and reads no weights.
    ///
    /// # Errors
    /// One is missing, or does not fit the others or the config.
    pub fn shape(&self, name: &str, tensor: TensorLookup<'_, '_>) -> Result<Vec<usize>> {
        match self.codes(name, tensor) {
            Some((format, linear)) => {
                let CodedShape { rows, columns, .. } = format.shape(linear, &self.config, tensor)?;
                Ok(vec![rows, columns])
            }
            None => self.floats(name, tensor).map(|floats| floats.shape().to_vec()),
        }
    }

    /// Bytes of the weight `name` in memory, as codes with their scales. Looks at headers only.
    ///
    /// # Errors
    /// As [`Self::shape`].
    pub fn byte_len(&self, name: &str, tensor: TensorLookup<'_, '_>) -> Result<usize> {
        match self.codes(name, tensor) {
            Some((format, linear)) => {
                let shape = format.shape(linear, &self.config, tensor)?;
                Ok(QuantizedWeight::byte_len(
                    shape.rows,
                    shape.columns,
                    shape.bits,
                    shape.group_size,
                ))
            }
            None => self.floats(name, tensor).map(|floats| floats.byte_len()),
        }
    }

    /// Reads the weight `name`, which is stored quantized.
    ///
    /// # Errors
    /// As [`Self::shape`], and content that cannot be.
    pub fn read<'a>(&self, name: &str, tensor: TensorLookup<'_, 'a>) -> Result<Stored<'a>> {
        match self.codes(name, tensor) {
            Some((format, linear)) => format.unpack(linear, &self.config, tensor).map(Stored::Codes),
            None => self.floats(name, tensor).map(Stored::Floats),
        }
    }

    /// The tensors that this layout has for the codes `weight` of `linear`.
    pub fn specs(&self, linear: &str, weight: &QuantizedWeight) -> Vec<TensorSpec> {
        let specs = |format: &dyn Format| format.specs(linear, weight.rows, weight.columns, weight.grid);
        self.format().map(specs).unwrap_or_default()
    }

    /// The method and its schemes, in a few words.
    pub fn describe(&self) -> String {
        let sides = |[rows, columns]: [usize; 2]| format!("blocks of {rows} x {columns}");
        match &self.method {
            Method::Fp8(block) => format!("fp8, {}", block.map_or("a scale a tensor or row".into(), sides)),
            Method::Format(format) => format!("{}, {}", format.name(), format.describe(&self.config)),
        }
    }

    fn format(&self) -> Option<&dyn Format> {
        match &self.method {
            Method::Format(format) => Some(format.as_ref()),
            Method::Fp8(_) => None,
        }
    }

    /// Whether a tensor, by itself and not by its name, holds a quantized weight: E4M3 floats, or a signed byte a code. Scales of other
    /// schemes are floats like that, too.
    fn is_held_by(&self, spec: &TensorSpec) -> bool {
        let bytes = spec.dtype == Dtype::I8 && spec.name.ends_with(".weight") && self.format().is_some();
        let scale = SCALES.iter().any(|ending| spec.name.ends_with(ending));
        bytes || (spec.dtype == Dtype::F8_E4M3 && !scale)
    }

    /// The layout of the weight `name` and the linear's name, unless it is stored in floats.
    fn codes<'n>(&self, name: &'n str, tensor: TensorLookup<'_, '_>) -> Option<(&dyn Format, &'n str)> {
        let floats = tensor(name).is_some_and(|(spec, _)| spec.dtype == Dtype::F8_E4M3);
        let linear = name.strip_suffix(".weight").filter(|_| !floats)?;
        self.format().map(|format| (format, linear))
    }

    fn floats<'a>(&self, name: &str, tensor: TensorLookup<'_, 'a>) -> Result<Float8<'a>> {
        let block = match self.method {
            Method::Fp8(block) => block,
            Method::Format(_) => {
                let linear = name.strip_suffix(".weight").unwrap_or(name);
                compressed_tensors_config::block_of(linear, &self.config)?
            }
        };
        Float8::find(name, block, tensor)
    }
}
