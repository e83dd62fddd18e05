//! The text tower of a checkpoint: names and weights of embedding, blocks and head, read from the memory map a block at
//! a time. What is outside the tower (vision tower, projector) is never touched.

use super::block::{Block, Linear, LinearSpec, Norms, SiteKind};
use super::families;
use super::rotary::Rotary;
use super::spec::{BlockSpec, ModelSpec, TowerNames};
use crate::checkpoint::{Checkpoint, TensorView};
use crate::error::{Error, Result};
use crate::numerics::QuantizedWeight;
use bytemuck::allocation::pod_collect_to_vec;
use candle_core::{Device, Tensor};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use safetensors::Dtype;
use std::path::Path;
use std::sync::Arc;

/// Bytes of the head, as stored, that are widened at a time.
const HEAD_PANEL_BYTES: usize = 16 << 20;

/// A checkpoint whose text tower is understood.
#[derive(Debug)]
pub struct Tower {
    /// The directory and its tensors.
    pub checkpoint: Checkpoint,
    /// What the config says.
    pub spec: ModelSpec,
    block_spec: Arc<BlockSpec>,
    names: TowerNames,
    device: Device,
}

impl Tower {
    /// Opens a checkpoint directory and finds its text tower.
    ///
    /// # Errors
    /// An unreadable checkpoint, an unsupported architecture, or a tower whose tensors are missing or misshapen.
    pub fn open(folder: &Path, device: Device) -> Result<Self> {
        let checkpoint = Checkpoint::open(folder)?;
        let spec = families::parse(checkpoint.config())?;
        let embedding =
            |names: &&TowerNames| checkpoint.contains(&format!("{}embed_tokens.weight", names.tower));
        let names = spec.names.iter().find(embedding).cloned().ok_or_else(|| {
            let tried: Vec<_> = spec
                .names
                .iter()
                .map(|names| format!("{}embed_tokens.weight", names.tower))
                .collect();
            Error::invalid(
                folder.display().to_string(),
                format!("has none of {}", tried.join(", ")),
                "the checkpoint is incomplete, or its config.json describes another model",
            )
        })?;
        let tower = Self {
            block_spec: Arc::new(spec.block.clone()),
            checkpoint,
            spec,
            names,
            device,
        };
        tower.check()?;
        Ok(tower)
    }

    /// Shapes of everything that a run will read, so that a bad tensor is an error now and not an hour later.
    fn check(&self) -> Result<()> {
        let hidden = self.spec.hidden_size;
        self.expect(&self.embedding_name(), &[self.spec.vocab_size, hidden])?;
        self.expect(&self.head_name(), &[self.spec.vocab_size, hidden])?;
        self.expect(&format!("{}norm.weight", self.names.tower), &[hidden])?;
        for block in 0..self.blocks() {
            for name in self.norm_names() {
                let width = if name.starts_with("self_attn") {
                    self.spec.block.head_dim
                } else {
                    hidden
                };
                self.expect(&format!("{}{name}", self.block_prefix(block)), &[width])?;
            }
        }
        Ok(())
    }

    fn expect(&self, name: &str, shape: &[usize]) -> Result<()> {
        let tensor = self.checkpoint.tensor(name)?;
        if tensor.shape == shape {
            return Ok(());
        }
        Err(Error::invalid(
            name,
            format!("has shape {:?}, config.json asks for {shape:?}", tensor.shape),
            "config.json and weights are of different models",
        ))
    }

    /// Decoder layers.
    pub fn blocks(&self) -> usize {
        self.spec.layers.len()
    }

    /// What is the same in every block.
    pub fn block_spec(&self) -> &Arc<BlockSpec> {
        &self.block_spec
    }

    /// `model.layers.3.`
    pub fn block_prefix(&self, block: usize) -> String {
        format!("{}layers.{block}.", self.names.tower)
    }

    /// Full module name of a linear: `model.layers.3.mlp.up_proj`.
    pub fn linear_name(&self, block: usize, linear: &LinearSpec) -> String {
        format!("{}{}", self.block_prefix(block), linear.name)
    }

    /// Name of the embedding's tensor.
    pub fn embedding_name(&self) -> String {
        format!("{}embed_tokens.weight", self.names.tower)
    }

    /// Name of the head's tensor: the embedding's if they are tied.
    pub fn head_name(&self) -> String {
        if self.spec.tied_head && !self.checkpoint.contains(&self.names.head) {
            self.embedding_name()
        } else {
            self.names.head.clone()
        }
    }

    /// Element type of the linears' weights: that of the first block's first norm, which no source quantizes.
    pub fn weight_dtype(&self) -> Dtype {
        let name = format!("{}input_layernorm.weight", self.block_prefix(0));
        self.checkpoint
            .get(&name)
            .map_or(Dtype::BF16, |tensor| tensor.dtype)
    }

    /// Rows of the embedding for `tokens`, scaled as the family wants: `[tokens, hidden]`.
    ///
    /// # Errors
    /// A token outside the vocabulary.
    pub fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let name = self.embedding_name();
        let table = self.checkpoint.tensor(&name)?;
        let row_bytes = table.bytes.len() / self.spec.vocab_size;
        let mut rows = Vec::with_capacity(tokens.len() * row_bytes);
        for &token in tokens {
            let begin = token as usize * row_bytes;
            let row = table.bytes.get(begin..begin + row_bytes).ok_or_else(|| {
                Error::invalid(
                    format!("token {token}"),
                    format!("is outside the vocabulary of {}", self.spec.vocab_size),
                    "the tokenizer or the token file belongs to another model",
                )
            })?;
            rows.extend_from_slice(row);
        }
        let rows = widen(
            &TensorView {
                bytes: &rows,
                shape: &[tokens.len(), self.spec.hidden_size],
                ..table
            },
            &self.device,
        )?;
        match self.spec.embedding_scale {
            Some(scale) => Ok((rows * f64::from(scale))?),
            None => Ok(rows),
        }
    }

    /// Takes the embedding's pages out of resident memory.
    pub fn release_embedding(&self) {
        self.checkpoint.release(&self.embedding_name());
    }

    /// A tensor in f32.
    pub fn load(&self, name: &str) -> Result<Tensor> {
        let TensorView { dtype, shape, .. } = self.checkpoint.tensor(name)?;
        let mut values = Vec::with_capacity(shape.iter().product());
        self.checkpoint
            .stream(name, |bytes| widen_onto(&mut values, name, dtype, bytes))?;
        Ok(Tensor::from_vec(values, shape, &self.device)?)
    }

    /// A vector in f32 that every norm of the family means by this tensor.
    fn load_norm(&self, name: &str) -> Result<Tensor> {
        let weight = self.load(name)?;
        if self.spec.block.norm.unit_offset {
            Ok((weight + 1.0)?)
        } else {
            Ok(weight)
        }
    }

    fn norm_names(&self) -> Vec<&'static str> {
        let mut names = vec!["input_layernorm.weight", "post_attention_layernorm.weight"];
        if self.spec.block.sandwich_norms {
            names.extend([
                "pre_feedforward_layernorm.weight",
                "post_feedforward_layernorm.weight",
            ]);
        }
        if self.spec.block.qk_norm {
            names.extend(["self_attn.q_norm.weight", "self_attn.k_norm.weight"]);
        }
        names
    }

    /// Rotary tables for sequences of `length` tokens, one for each of [`BlockSpec::ropes`].
    pub fn rotary(&self, length: usize) -> Result<Vec<Arc<Rotary>>> {
        let tables = self
            .spec
            .block
            .ropes
            .iter()
            .map(|rope| Rotary::new(rope, length, &self.device));
        Ok(tables
            .map(|table| table.map(Arc::new))
            .collect::<Result<_, _>>()?)
    }

    /// Checks that the rotary tables hold for sequences of `length` tokens.
    ///
    /// # Errors
    /// They do not.
    pub fn expect_length(&self, length: usize) -> Result<()> {
        match self.spec.max_sequence.filter(|longest| length > *longest) {
            None => Ok(()),
            Some(longest) => Err(Error::usage(
                "--length",
                format!(
                    "{length} tokens are more than the {longest} for which this model's rotary tables hold"
                ),
                format!("use --length {longest} or less"),
            )),
        }
    }

    /// A block's norms and options, without its linears.
    pub fn block(&self, block: usize, rotary: &[Arc<Rotary>]) -> Result<Block> {
        let spec = &self.spec.block;
        let norm = |name: &str| self.load_norm(&format!("{}{name}.weight", self.block_prefix(block)));
        let pair = |wanted: bool, first: &str, second: &str| match wanted {
            true => Ok::<_, Error>(Some((norm(first)?, norm(second)?))),
            false => Ok(None),
        };
        let mlp = if spec.sandwich_norms {
            "pre_feedforward_layernorm"
        } else {
            "post_attention_layernorm"
        };
        Ok(Block {
            norms: Norms {
                input: norm("input_layernorm")?,
                mlp: norm(mlp)?,
                outputs: pair(
                    spec.sandwich_norms,
                    "post_attention_layernorm",
                    "post_feedforward_layernorm",
                )?,
                query_key: pair(spec.qk_norm, "self_attn.q_norm", "self_attn.k_norm")?,
            },
            spec: Arc::clone(&self.block_spec),
            layer: self.spec.layers[block],
            rotary: self.spec.layers[block]
                .rope
                .map(|index| Arc::clone(&rotary[index])),
        })
    }

    /// The bias of a linear, if it has one.
    pub fn bias(&self, block: usize, linear: &LinearSpec) -> Result<Option<Tensor>> {
        let name = format!("{}.bias", self.linear_name(block, linear));
        if !self.checkpoint.contains(&name) {
            return Ok(None);
        }
        self.expect(&name, &[linear.rows])?;
        self.load(&name).map(Some)
    }

    /// An unquantized linear, in f32.
    pub fn linear(&self, block: usize, linear: &LinearSpec) -> Result<Linear> {
        let name = format!("{}.weight", self.linear_name(block, linear));
        self.expect(&name, &[linear.rows, linear.columns])?;
        Ok(Linear {
            weight: self.load(&name)?,
            bias: self.bias(block, linear)?,
        })
    }

    /// A linear with its quantized weight, dequantized to f32, and its own bias.
    ///
    /// # Errors
    /// The weight has another shape than config.json asks for.
    pub fn quantized_linear(
        &self,
        block: usize,
        linear: &LinearSpec,
        weight: &QuantizedWeight,
    ) -> Result<Linear> {
        let shape = (weight.rows, weight.columns);
        if shape != (linear.rows, linear.columns) {
            return Err(Error::invalid(
                self.linear_name(block, linear),
                format!(
                    "has shape {shape:?}, config.json asks for {:?}",
                    (linear.rows, linear.columns)
                ),
                "config.json and weights are of different models",
            ));
        }
        Ok(Linear {
            weight: Tensor::from_vec(weight.dequantize(), shape, &self.device)?,
            bias: self.bias(block, linear)?,
        })
    }

    /// The unquantized linears of a site, in f32.
    pub fn linears(&self, block: usize, site: SiteKind) -> Result<Vec<Linear>> {
        let linears = self.spec.block.linears(site);
        linears.iter().map(|linear| self.linear(block, linear)).collect()
    }

    /// The final norm of `residual`, the last block's output: `[tokens, hidden]`.
    pub fn final_norm(&self, residual: &Tensor) -> Result<Tensor> {
        let weight = self.load_norm(&format!("{}norm.weight", self.names.tower))?;
        Ok(candle_nn::ops::rms_norm(
            residual,
            &weight,
            self.spec.block.norm.eps,
        )?)
    }

    /// Logits of `residual`, the last block's output: `[tokens, vocabulary]` in f32. The head, often the largest tensor
    /// of a checkpoint, is never whole in memory.
    pub fn logits(&self, residual: &Tensor) -> Result<Tensor> {
        let normed = self.final_norm(residual)?;
        let name = self.head_name();
        let head = self.checkpoint.tensor(&name)?;
        let row_bytes = head.bytes.len() / self.spec.vocab_size;
        let panel_bytes = (HEAD_PANEL_BYTES / row_bytes).max(1) * row_bytes;
        let panels = head.bytes.chunks(panel_bytes).map(|bytes| {
            let shape = [bytes.len() / row_bytes, self.spec.hidden_size];
            let panel = TensorView {
                bytes,
                shape: &shape,
                ..head
            };
            let weight = widen(&panel, &self.device)?;
            self.checkpoint.release(&name);
            Ok(normed.matmul(&weight.t()?)?)
        });
        let logits = Tensor::cat(&panels.collect::<Result<Vec<_>>>()?, 1)?;
        match self.spec.final_softcap {
            Some(cap) => Ok(((logits / f64::from(cap))?.tanh()? * f64::from(cap))?),
            None => Ok(logits),
        }
    }
}

/// Copies a tensor out of the memory map, in f32.
fn widen(tensor: &TensorView<'_>, device: &Device) -> Result<Tensor> {
    let mut values = Vec::with_capacity(tensor.shape.iter().product());
    widen_onto(&mut values, tensor.name, tensor.dtype, tensor.bytes)?;
    Ok(Tensor::from_vec(values, tensor.shape, device)?)
}

/// Appends elements, in f32. `name` is for the error alone.
fn widen_onto(values: &mut Vec<f32>, name: &str, dtype: Dtype, bytes: &[u8]) -> Result<()> {
    let begin = values.len();
    match dtype {
        Dtype::F32 => values.extend(pod_collect_to_vec::<u8, f32>(bytes)),
        Dtype::BF16 | Dtype::F16 => {
            let halves: Vec<u16> = pod_collect_to_vec(bytes);
            values.resize(begin + halves.len(), 0.0);
            match dtype {
                Dtype::BF16 => halves
                    .reinterpret_cast::<bf16>()
                    .convert_to_f32_slice(&mut values[begin..]),
                _ => halves
                    .reinterpret_cast::<f16>()
                    .convert_to_f32_slice(&mut values[begin..]),
            }
        }
        other => {
            return Err(Error::invalid(
                name,
                format!("is {other:?}; bf16, f16 and f32 weights can be read"),
                "is the checkpoint already quantized?",
            ));
        }
    }
    Ok(())
}
