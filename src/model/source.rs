//! A checkpoint as an evaluation streams it: a block at a time, with all of its linears at once.

use super::block::Block;
use super::linear::Linear;
use super::rotary::Rotary;
use super::sites::{LinearSpec, SiteKind};
use super::tower::Tower;
use crate::device::{self, Placement};
use crate::error::{Error, Result};
use crate::numerics::divergence::{self, Divergence};
use candle_core::Tensor;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// A block with its linears, dequantized, in f32; a mixture's routed experts are not among them.
#[derive(Debug)]
pub struct LoadedBlock {
    /// Norms, routers and options.
    pub block: Block,
    index: usize,
    linears: HashMap<Cow<'static, str>, Linear>,
}

/// Logits of one model at a time in f32, in each worker. Whatever the budget: other shapes are multiplied in another order.
pub const LOGITS_BYTES: usize = 32 << 20;
/// The same on a device: large products are fast there, and some copies in f64 have to fit.
const DEVICE_LOGITS_BYTES: usize = 8 * LOGITS_BYTES;

/// A checkpoint to run whole.
pub struct Source {
    /// What reads it.
    pub tower: Tower,
    /// On a device, once it was asked for.
    head: Mutex<Option<Linear>>,
}

impl Source {
    /// Opens a directory.
    ///
    /// # Errors
    /// See [`Tower::open`].
    pub fn open(folder: &Path, placement: impl Into<Placement>) -> Result<Self> {
        Ok(Self {
            tower: Tower::open(folder, placement)?,
            head: Mutex::default(),
        })
    }

    /// A block with all of its linears but routed experts.
    ///
    /// # Errors
    /// As [`Tower::linear`].
    pub fn load_block(&self, index: usize, rotary: &[Arc<Rotary>]) -> Result<LoadedBlock> {
        let spec = &self.tower.spec;
        let mut linears = HashMap::new();
        for site in spec.sites(index) {
            if matches!(site, SiteKind::ExpertDown(_)) {
                continue;
            }
            // Only routed experts have a place in a tensor of all experts.
            for linear in spec.linears(index, site).iter().filter(|l| l.fused.is_none()) {
                linears.insert(linear.name.clone(), self.tower.linear(index, linear)?);
            }
        }
        Ok(LoadedBlock {
            block: self.tower.block(index, rotary)?,
            index,
            linears,
        })
    }

    /// The block's output for `residual`, `[tokens, hidden]`, of sequences of `length` tokens. Routed experts are read one at a time.
    ///
    /// # Errors
    /// As [`Tower::linear`].
    pub fn forward(&self, loaded: &LoadedBlock, residual: &Tensor, length: usize) -> Result<Tensor> {
        let linear = |spec: &LinearSpec| self.linear_of(loaded, spec);
        loaded.block.forward(residual, length, &linear)
    }

    /// A linear of a loaded block; a routed expert's is read.
    ///
    /// # Errors
    /// As [`Tower::linear`].
    pub fn linear_of(&self, loaded: &LoadedBlock, linear: &LinearSpec) -> Result<Linear> {
        match loaded.linears.get(&linear.name) {
            Some(linear) => Ok(linear.clone()),
            None => self.tower.linear(loaded.index, linear),
        }
    }

    /// Positions whose logits are there at a time.
    pub fn logits_rows(&self) -> usize {
        let bytes = match self.tower.placement().on_device {
            true => DEVICE_LOGITS_BYTES,
            false => LOGITS_BYTES,
        };
        (bytes / 4 / self.tower.spec.vocab_size).max(1)
    }

    /// As [`Tower::logits`]; a device is sent the head once.
    ///
    /// # Errors
    /// The head cannot be read, or the device has no memory left.
    pub fn logits(&self, residual: &Tensor) -> Result<Tensor> {
        if !self.tower.placement().on_device {
            return self.tower.logits(residual);
        }
        let mut kept =
            (self.head.lock()).map_err(|_| Error::Worker("it stopped while it read the head".into()))?;
        let head = match &*kept {
            Some(head) => head.clone(),
            None => kept.insert(self.tower.head()?).clone(),
        };
        self.tower.logits_by(&head, residual)
    }

    /// Compares logits that [`Self::logits`] of this model and of another gave for the same positions, each with its target.
    ///
    /// # Errors
    /// Shapes do not fit, or the device has no memory left.
    pub fn compare(&self, reference: &Tensor, model: &Tensor, targets: &[u32]) -> Result<Vec<Divergence>> {
        if self.tower.placement().on_device {
            return Ok(device::divergence::compare(reference, model, targets)?);
        }
        let vocab = self.tower.spec.vocab_size;
        let values = |logits: &Tensor| logits.flatten_all()?.to_vec1::<f32>();
        let (reference, model) = (values(reference)?, values(model)?);
        let pairs = reference.chunks_exact(vocab).zip(model.chunks_exact(vocab));
        let compared = pairs.zip(targets);
        Ok(compared
            .map(|((r, m), &target)| divergence::compare(r, m, target as usize))
            .collect())
    }
}
