//! A checkpoint as an evaluation streams it: a block at a time, with all of its linears at once.

use super::block::Block;
use super::linear::Linear;
use super::rotary::Rotary;
use super::sites::{LinearSpec, SiteKind};
use super::tower::Tower;
use crate::device::Placement;
use crate::error::Result;
use candle_core::Tensor;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// A block with its linears, dequantized, in f32; a mixture's routed experts are not among them.
#[derive(Debug)]
pub struct LoadedBlock {
    /// Norms, routers and options.
    pub block: Block,
    index: usize,
    linears: HashMap<Cow<'static, str>, Linear>,
}

/// A checkpoint to run whole.
pub struct Source {
    /// What reads it.
    pub tower: Tower,
}

impl Source {
    /// Opens a directory.
    ///
    /// # Errors
    /// See [`Tower::open`].
    pub fn open(folder: &Path, placement: impl Into<Placement>) -> Result<Self> {
        Ok(Self {
            tower: Tower::open(folder, placement)?,
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
}
