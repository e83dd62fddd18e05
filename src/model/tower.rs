//! The text tower of a checkpoint: names and weights of embedding, blocks and head, read from the memory map a block at
//! a time. What is outside the tower (vision tower, projector) is never touched.

use super::block::{Block, Norms};
use super::families;
use super::linear::{Linear, Weight};
use super::mixture::MixtureWeights;
use super::rotary::Rotary;
use super::sites::LinearSpec;
use super::spec::{BlockSpec, MixtureSpec, ModelSpec, TowerNames};
use super::weights::widen;
use crate::checkpoint::{Checkpoint, TensorView};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::formats::{Reader, quantization_config};
use crate::system::side_by_side;
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use std::path::Path;
use std::sync::Arc;

/// Attention sinks, below `layers.{i}.`.
const SINKS: &str = "self_attn.sinks";
/// A router's correction of scores, below its module.
const CORRECTION: &str = "e_score_correction_bias";

/// A checkpoint whose text tower is understood.
#[derive(Debug)]
pub struct Tower {
    /// The directory and its tensors.
    pub checkpoint: Checkpoint,
    /// What the config says.
    pub spec: ModelSpec,
    block_spec: Arc<BlockSpec>,
    names: TowerNames,
    /// Of weights that are stored quantized, if any are.
    pub(super) reader: Option<Reader>,
    pub(super) placement: Placement,
}

impl Tower {
    /// Opens a checkpoint directory and finds its text tower.
    ///
    /// # Errors
    /// An unreadable checkpoint, an unsupported architecture or quantization, or a tower whose tensors are missing or misshapen.
    pub fn open(folder: &Path, placement: impl Into<Placement>) -> Result<Self> {
        let checkpoint = Checkpoint::open(folder)?;
        let mut spec = families::parse(checkpoint.config())?;
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
        choose_mixture_names(&mut spec, &names, &checkpoint);
        let reader = quantization_config(checkpoint.config())
            .map(Reader::new)
            .transpose()?;
        let tower = Self {
            block_spec: Arc::new(spec.block.clone()),
            reader,
            checkpoint,
            spec,
            names,
            placement: placement.into(),
        };
        tower.check()?;
        Ok(tower)
    }

    /// Shapes of everything that a run will read, so that a bad tensor is an error now and not an hour later.
    fn check(&self) -> Result<()> {
        let hidden = self.spec.hidden_size;
        let embedding = self.embedding_name();
        if self.reader_of(&embedding).is_some() {
            return Err(Error::invalid(
                embedding,
                "is quantized; embeddings can be read where they are plain",
                "start from the original checkpoint",
            ));
        }
        self.expect(&embedding, &[self.spec.vocab_size, hidden])?;
        self.expect(&self.head_name(), &[self.spec.vocab_size, hidden])?;
        self.expect(&format!("{}norm.weight", self.names.tower), &[hidden])?;
        let spec = &self.spec.block;
        for block in 0..self.blocks() {
            let expect = |name: &str, shape: &[usize]| {
                self.expect(&format!("{}{name}", self.block_prefix(block)), shape)
            };
            for (name, width) in self.norm_names() {
                expect(name, &[width])?;
            }
            if spec.sinks {
                expect(SINKS, &[spec.heads])?;
            }
            let Some(mixture) = spec.mixture_of(&self.spec.layers[block]) else {
                continue;
            };
            let (names, experts) = (&mixture.names[0], mixture.routing.experts);
            expect(&format!("{}.weight", names.router), &[experts, hidden])?;
            if mixture.router_bias {
                expect(&format!("{}.bias", names.router), &[experts])?;
            }
            if mixture.correction_bias {
                expect(&format!("{}.{CORRECTION}", names.router), &[experts])?;
            }
            if mixture.shared.is_some_and(|shared| shared.gated) {
                expect(&format!("{}_gate.weight", names.shared), &[1, hidden])?;
            }
        }
        Ok(())
    }

    /// Where its tensors are made.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// As [`Placement::device`].
    pub(super) fn device(&self) -> &Device {
        &self.placement.device
    }

    /// The dtype in which linears have their weights and take their inputs.
    pub fn precision(&self) -> DType {
        self.placement.precision(self.weight_dtype())
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
        let vocab = self.spec.vocab_size;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(Error::invalid(
                format!("token {token}"),
                format!("is outside the vocabulary of {vocab}"),
                "the tokenizer or the token file belongs to another model",
            ));
        }
        let rows = || self.checkpoint.rows(&name, tokens);
        let rows = match self.placement().on_device {
            true => side_by_side(rows)?,
            false => rows()?,
        };
        let rows = widen(
            &TensorView {
                bytes: &rows,
                shape: &[tokens.len(), self.spec.hidden_size],
                ..table
            },
            self.device(),
        )?;
        match self.spec.embedding_scale {
            Some(scale) => Ok((rows * f64::from(scale))?),
            None => Ok(rows),
        }
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

    /// Names below `layers.{i}.` and widths.
    fn norm_names(&self) -> Vec<(&'static str, usize)> {
        let spec = &self.spec.block;
        let hidden = spec.hidden_size;
        let mut names = vec![
            ("input_layernorm.weight", hidden),
            ("post_attention_layernorm.weight", hidden),
        ];
        if spec.sandwich_norms {
            names.extend([
                ("pre_feedforward_layernorm.weight", hidden),
                ("post_feedforward_layernorm.weight", hidden),
            ]);
        }
        if spec.qk_norm {
            names.extend([
                ("self_attn.q_norm.weight", spec.head_dim),
                ("self_attn.k_norm.weight", spec.head_dim),
            ]);
        }
        if let Some(mla) = &spec.mla {
            names.extend(
                mla.q_lora_rank
                    .map(|rank| ("self_attn.q_a_layernorm.weight", rank)),
            );
            names.push(("self_attn.kv_a_layernorm.weight", mla.kv_lora_rank));
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
            .map(|rope| Rotary::new(rope, length, self.device()));
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
        let latents = match &spec.mla {
            None => None,
            Some(mla) => Some((
                mla.q_lora_rank
                    .map(|_| norm("self_attn.q_a_layernorm"))
                    .transpose()?,
                norm("self_attn.kv_a_layernorm")?,
            )),
        };
        let layer = self.spec.layers[block];
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
                latents,
            },
            spec: Arc::clone(&self.block_spec),
            layer,
            rotary: layer.rope.map(|index| Arc::clone(&rotary[index])),
            sinks: match spec.sinks {
                true => Some(self.load_values(&format!("{}{SINKS}", self.block_prefix(block)))?),
                false => None,
            },
            mixture: spec
                .mixture_of(&layer)
                .map(|mixture| self.mixture(block, mixture))
                .transpose()?,
        })
    }

    fn load_values(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.load(name)?.flatten_all()?.to_vec1()?)
    }

    /// Router and its like.
    fn mixture(&self, block: usize, mixture: &MixtureSpec) -> Result<MixtureWeights> {
        let names = &mixture.names[0];
        let at = |name: &str| format!("{}{name}", self.block_prefix(block));
        let load = |wanted: bool, name: String| wanted.then(|| self.load(&name)).transpose();
        let router = at(names.router);
        let gated = mixture.shared.is_some_and(|shared| shared.gated);
        let shared_gate = load(gated, at(&format!("{}_gate.weight", names.shared)))?;
        Ok(MixtureWeights {
            router: Linear {
                weight: Weight::Whole(self.load(&format!("{router}.weight"))?),
                bias: load(mixture.router_bias, format!("{router}.bias"))?,
            },
            correction: mixture
                .correction_bias
                .then(|| self.load_values(&format!("{router}.{CORRECTION}")))
                .transpose()?,
            shared_gate: shared_gate.map(|weight| Linear {
                weight: Weight::Whole(weight),
                bias: None,
            }),
        })
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
        let panels = self.panels(&name, |weight| Ok(normed.matmul(&weight.t()?)?))?;
        self.cap(Tensor::cat(&panels, 1)?)
    }

    /// The whole head, for [`Self::logits_by`].
    pub(super) fn head(&self) -> Result<Linear> {
        Ok(Linear {
            weight: self.weight(&self.head_name())?,
            bias: None,
        })
    }

    /// As [`Self::logits`], by the head that [`Self::head`] gave.
    pub(super) fn logits_by(&self, head: &Linear, residual: &Tensor) -> Result<Tensor> {
        self.cap(head.forward(&self.final_norm(residual)?)?)
    }

    fn cap(&self, logits: Tensor) -> Result<Tensor> {
        match self.spec.final_softcap {
            Some(cap) => Ok(((logits / f64::from(cap))?.tanh()? * f64::from(cap))?),
            None => Ok(logits),
        }
    }
}

/// Keeps the first names of the mixture whose router is there, or the most usual ones, which an error will then name.
fn choose_mixture_names(spec: &mut ModelSpec, tower: &TowerNames, checkpoint: &Checkpoint) {
    let Some(first) = spec.layers.iter().position(|layer| layer.mixture) else {
        return;
    };
    if let Some(mixture) = &mut spec.block.mixture {
        let router = |router: &str| format!("{}layers.{first}.{router}.weight", tower.tower);
        let exists = |position: &usize| checkpoint.contains(&router(mixture.names[*position].router));
        let chosen = (0..mixture.names.len()).find(exists).unwrap_or(0);
        mixture.names.swap(0, chosen);
        mixture.names.truncate(1);
    }
}
