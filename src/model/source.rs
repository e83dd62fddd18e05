//! The linears of any checkpoint that can be read: plain, or in one of the formats that are written here.

use super::block::{Block, Linear};
use super::fp8;
use super::rotary::Rotary;
use super::sites::{LinearSpec, SiteKind};
use super::tower::Tower;
use crate::error::Result;
use crate::formats::{self, Format};
use crate::numerics::QuantizedWeight;
use candle_core::{Device, Tensor};
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

/// A checkpoint whose linears may be quantized.
pub struct Source {
    /// Everything but the quantized linears.
    pub tower: Tower,
    quantized: Option<(Box<dyn Format>, serde_json::Value)>,
}

impl Source {
    /// Opens a directory.
    ///
    /// # Errors
    /// See [`Tower::open`]; or a quantization that cannot be read.
    pub fn open(folder: &Path, device: Device) -> Result<Self> {
        let tower = Tower::open(folder, device)?;
        let config = tower.checkpoint.config().get("quantization_config").cloned();
        let quantized = match config {
            // Widened as they are read.
            Some(config) if fp8::is_fp8(&config) => None,
            Some(config) => Some((formats::detect(&config)?, config)),
            None => None,
        };
        Ok(Self { tower, quantized })
    }

    /// The codes of a linear by its full module name, or `None` where its weight is plain.
    pub fn quantized_weight(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        let checkpoint = &self.tower.checkpoint;
        let Some((format, config)) = self
            .quantized
            .as_ref()
            .filter(|_| !checkpoint.contains(&format!("{name}.weight")))
        else {
            return Ok(None);
        };
        let read = |name: &str| {
            let view = checkpoint.get(name)?;
            let bytes = view.bytes.to_vec();
            checkpoint.release(name);
            Some((checkpoint.spec(name)?, bytes))
        };
        format.unpack(name, config, &read).map(Some)
    }

    /// A linear, dequantized, in f32.
    ///
    /// # Errors
    /// It is missing, misshapen or cannot be unpacked.
    pub fn linear(&self, block: usize, linear: &LinearSpec) -> Result<Linear> {
        let tower = &self.tower;
        if tower.has_plain(block, linear) {
            return tower.linear(block, linear);
        }
        match self.quantized_weight(&tower.linear_name(block, linear))? {
            None => tower.linear(block, linear),
            Some(weight) => tower.quantized_linear(block, linear, &weight),
        }
    }

    /// A block with all of its linears but routed experts.
    ///
    /// # Errors
    /// As [`Self::linear`].
    pub fn load_block(&self, index: usize, rotary: &[Arc<Rotary>]) -> Result<LoadedBlock> {
        let spec = &self.tower.spec;
        let mut linears = HashMap::new();
        for site in spec.sites(index) {
            if matches!(site, SiteKind::ExpertDown(_)) {
                continue;
            }
            // Only routed experts have a place in a tensor of all experts.
            for linear in spec.linears(index, site).iter().filter(|l| l.fused.is_none()) {
                linears.insert(linear.name.clone(), self.linear(index, linear)?);
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
    /// As [`Self::linear`].
    pub fn forward(&self, loaded: &LoadedBlock, residual: &Tensor, length: usize) -> Result<Tensor> {
        let linear = |spec: &LinearSpec| self.linear_of(loaded, spec);
        loaded.block.forward(residual, length, &linear)
    }

    /// A linear of a loaded block; a routed expert's is read.
    ///
    /// # Errors
    /// As [`Self::linear`].
    pub fn linear_of(&self, loaded: &LoadedBlock, linear: &LinearSpec) -> Result<Linear> {
        match loaded.linears.get(&linear.name) {
            Some(linear) => Ok(linear.clone()),
            None => self.linear(loaded.index, linear),
        }
    }
}
