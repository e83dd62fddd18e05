//! The linears of any checkpoint that can be read: plain, or in one of the formats that are written here.

use super::block::{Linear, SiteKind};
use super::tower::Tower;
use crate::error::Result;
use crate::formats::{self, Format};
use candle_core::{Device, Tensor};
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

    /// The linears of a site, dequantized, in f32.
    pub fn linears(&self, block: usize, site: SiteKind) -> Result<Vec<Linear>> {
        let Some((format, config)) = &self.quantized else {
            return self.tower.linears(block, site);
        };
        let checkpoint = &self.tower.checkpoint;
        let read = |name: &str| {
            let view = checkpoint.get(name)?;
            let bytes = view.bytes.to_vec();
            checkpoint.release(name);
            Some((checkpoint.spec(name)?, bytes))
        };
        let specs = self.tower.spec.block.linears(site);
        specs
            .iter()
            .map(|spec| {
                let name = self.tower.linear_name(block, spec);
                if checkpoint.contains(&format!("{name}.weight")) {
                    let weight = self.tower.load(&format!("{name}.weight"))?;
                    return Ok(Linear { weight, bias: self.tower.bias(block, spec)? });
                }
                let weight = format.unpack(&name, config, &read)?;
                let shape = (weight.rows, weight.columns);
                if shape != (spec.rows, spec.columns) {
                    return Err(crate::error::Error::invalid(
                        name,
                        format!("has shape {shape:?}, config.json asks for {:?}", (spec.rows, spec.columns)),
                        "config.json and weights are of different models",
                    ));
                }
                Ok(Linear {
                    weight: Tensor::from_vec(weight.dequantize(), shape, &Device::Cpu)?,
                    bias: self.tower.bias(block, spec)?,
                })
            })
            .collect()
    }
}
