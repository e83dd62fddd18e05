//! The linears of any checkpoint that can be read: plain, or in one of the formats that are written here.

use super::block::{Linear, SiteKind};
use super::tower::Tower;
use crate::error::Result;
use crate::formats::{self, Format};
use crate::numerics::QuantizedWeight;
use candle_core::Device;
use std::path::Path;

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

    /// The linears of a site, dequantized, in f32.
    pub fn linears(&self, block: usize, site: SiteKind) -> Result<Vec<Linear>> {
        let tower = &self.tower;
        let specs = tower.spec.block.linears(site);
        specs
            .iter()
            .map(
                |spec| match self.quantized_weight(&tower.linear_name(block, spec))? {
                    None => tower.linear(block, spec),
                    Some(weight) => tower.quantized_linear(block, spec, &weight),
                },
            )
            .collect()
    }

    /// The linears of every site of a block, in the order of [`SiteKind::ALL`].
    pub fn block_linears(&self, block: usize) -> Result<Vec<Vec<Linear>>> {
        SiteKind::ALL
            .iter()
            .map(|&site| self.linears(block, site))
            .collect()
    }
}
