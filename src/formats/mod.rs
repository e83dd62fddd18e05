//! On-disk layouts of a [`QuantizedWeight`]: one file a format, each both `pack` and `unpack`; and what else can be read ([`Reader`]).
//!
//! A format knows names, shapes, bit orders and the config that serving stacks read. It knows neither
//! the solver, nor timely, nor how files are written. To add one: a file here that implements [`Format`], and a line
//! in [`by_name`].

mod compressed_tensors;
mod compressed_tensors_config;
mod compressed_tensors_parts;
mod float8;
mod gptq;
mod gptq_config;
mod raw;
mod reader;
mod schemes;
mod words;

pub use compressed_tensors::CompressedTensors;
pub use float8::Float8;
pub use gptq::Gptq;
pub use reader::{CONFIG_KEYS, Reader, Stored, quantization_config};

use crate::error::{Error, Result};
use crate::numerics::{Grid, QuantizedWeight, ScaleDtype};
use safetensors::Dtype;
use std::borrow::Cow;

/// Name, dtype and shape of a tensor in a safetensors file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Full name, as it stands in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes of the tensor's data.
    pub fn byte_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// A linear as the output's config has to speak of it.
#[derive(Clone, Debug)]
pub struct LinearLayout {
    /// Module path without `.weight`: `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// Its grid; `None` for a linear that is left alone.
    pub grid: Option<Grid>,
}

/// A linear in integer codes, as far as headers tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodedShape {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// Of a code.
    pub bits: u32,
    /// Columns that share a scale.
    pub group_size: usize,
}

/// Gives spec and bytes of a tensor by its full name, or `None`. Bytes of a memory map are borrowed: asking for the spec alone reads nothing.
pub type TensorLookup<'f, 't> = &'f dyn Fn(&str) -> Option<(TensorSpec, Cow<'t, [u8]>)>;

/// A layout that serving stacks read.
pub trait Format: Send + Sync {
    /// As on the command line: `compressed-tensors`, `gptq`, `gptq-v2`.
    fn name(&self) -> &'static str;

    /// Names of a linear's tensors, below its own, in every version of the layout. The first is there wherever one is, and in no other layout.
    fn parts(&self) -> &'static [&'static str];

    /// The schemes of a `quantization_config` of this format, in words.
    fn describe(&self, config: &serde_json::Value) -> String;

    /// The dtype of scales in this format, for a model of the given weight dtype.
    fn scale_dtype(&self, weights: Dtype) -> ScaleDtype;

    /// Whether this layout can hold `grid` for a `rows × columns` linear; the error says what it can hold.
    fn check(&self, linear: &str, rows: usize, columns: usize, grid: Grid) -> Result<()>;

    /// The tensors that replace `{linear}.weight`, in the order that [`Format::pack`] fills them.
    fn specs(&self, linear: &str, rows: usize, columns: usize, grid: Grid) -> Vec<TensorSpec>;

    /// The little-endian bytes of each tensor of [`Format::specs`], in that order.
    fn pack(&self, weight: &QuantizedWeight) -> Vec<Vec<u8>>;

    /// What the headers of a linear tell that is stored in this layout. Checks dtypes and shapes of all its tensors, and reads no weights.
    fn shape(
        &self,
        linear: &str,
        config: &serde_json::Value,
        tensor: TensorLookup<'_, '_>,
    ) -> Result<CodedShape>;

    /// Reads back what [`Format::pack`] wrote. `tensor` is untrusted.
    ///
    /// `config` is the `quantization_config` of the checkpoint. Works on files of other writers too, as far
    /// as the layout has no run-time reordering (a `g_idx` that is not monotone is an error).
    fn unpack(
        &self,
        linear: &str,
        config: &serde_json::Value,
        tensor: TensorLookup<'_, '_>,
    ) -> Result<QuantizedWeight>;

    /// The `quantization_config` object of `config.json`. `linears` lists every linear of the model, the ones left alone too.
    fn quantization_config(&self, linears: &[LinearLayout]) -> serde_json::Value;

    /// Further files beside `config.json`, name and JSON content (GPTQ's `quantize_config.json`).
    fn side_files(&self, linears: &[LinearLayout]) -> Vec<(&'static str, serde_json::Value)>;
}

/// Names that [`by_name`] knows.
pub const NAMES: [&str; 3] = ["compressed-tensors", "gptq", "gptq-v2"];

/// The format of a command-line name.
///
/// # Errors
/// An unknown name, with the known ones listed.
pub fn by_name(name: &str) -> Result<Box<dyn Format>> {
    match name {
        "compressed-tensors" => Ok(Box::new(CompressedTensors)),
        "gptq" => Ok(Box::new(Gptq::V1)),
        "gptq-v2" => Ok(Box::new(Gptq::V2)),
        other => Err(Error::usage(
            "--format",
            format!("{other} is not a known format"),
            format!("use one of {}", NAMES.join(", ")),
        )),
    }
}
