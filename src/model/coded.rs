//! Weights that a checkpoint stores quantized: found by their tensors, read, and handed over as their values.

use super::tower::Tower;
use super::weights::unreadable;
use crate::error::{Error, Result};
use crate::formats::{Reader, Stored, TensorSpec};
use crate::numerics::QuantizedWeight;
use half::{bf16, f16};
use safetensors::Dtype;
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;

/// Bytes of a matrix, in f32, that are made at a time where it is not needed whole.
const PANEL_BYTES: usize = 16 << 20;

/// A weight that the checkpoint stores quantized.
#[derive(Clone, Debug)]
pub struct Coded {
    /// Name and shape that it has unquantized, and the dtype of the model's plain weights.
    pub spec: TensorSpec,
    /// The tensors of which it is made.
    pub parts: BTreeSet<String>,
}

impl Tower {
    /// Name, dtype, shape and bytes of a tensor as it lies in the memory map.
    pub(super) fn stored(&self, name: &str) -> Option<(TensorSpec, Cow<'_, [u8]>)> {
        let view = self.checkpoint.get(name)?;
        Some((self.checkpoint.spec(name)?, Cow::Borrowed(view.bytes)))
    }

    /// What reads the weight `name`, if that is stored quantized.
    pub(super) fn reader_of(&self, name: &str) -> Option<&Reader> {
        let reader = self.reader.as_ref();
        reader.filter(|reader| reader.holds(name, &|name| self.stored(name)))
    }

    /// What the config says of quantized weights.
    pub fn reader(&self) -> Option<&Reader> {
        self.reader.as_ref()
    }

    /// All weights that are stored quantized, in the tower and outside, by name. Reads headers only.
    ///
    /// # Errors
    /// Tensors of one are missing, contradict each other, or are there beside a plain one.
    pub fn coded(&self) -> Result<Vec<Coded>> {
        let Some(reader) = &self.reader else {
            return Ok(Vec::new());
        };
        let mut found = Vec::new();
        for part in self.checkpoint.names() {
            let Some(name) = self
                .checkpoint
                .spec(part)
                .and_then(|spec| reader.weight_name(&spec))
            else {
                continue;
            };
            if name != part && self.checkpoint.contains(&name) {
                return Err(Error::invalid(
                    name,
                    format!("is there beside {part}"),
                    "remove one of them: it is not known which is meant",
                ));
            }
            found.push(Coded {
                parts: reader.parts(&name, &|name| self.stored(name)),
                spec: TensorSpec {
                    shape: self.shape(&name)?,
                    dtype: self.weight_dtype(),
                    name,
                },
            });
        }
        Ok(found)
    }

    /// Hands over a quantized weight's elements in its spec's dtype, a panel of rows at a time.
    ///
    /// # Errors
    /// It cannot be read, or `visit` fails.
    pub fn dequantize(&self, coded: &Coded, visit: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let TensorSpec { name, dtype, shape } = &coded.spec;
        let stored = self.read(name)?;
        let (experts, rows, columns) = match shape[..] {
            [rows, columns] => (1, rows, columns),
            [experts, rows, columns] => (experts, rows, columns),
            _ => return Err(Error::invalid(name, format!("has shape {shape:?}"), "")),
        };
        for expert in 0..experts {
            for rows in panels(rows, columns) {
                visit(&narrow(name, &stored.dequantize(expert, rows)?, *dtype)?)?;
            }
        }
        self.release(name);
        Ok(())
    }

    /// A weight as it is stored, which is quantized.
    pub(super) fn read(&self, name: &str) -> Result<Stored<'_>> {
        match self.reader_of(name) {
            Some(reader) => reader.read(name, &|name| self.stored(name)),
            None => Err(Error::invalid(name, "is not quantized", "")),
        }
    }

    /// Takes a quantized weight's pages out of resident memory.
    pub(super) fn release(&self, name: &str) {
        for part in (self.reader.iter()).flat_map(|reader| reader.parts(name, &|name| self.stored(name))) {
            self.checkpoint.release(&part);
        }
    }

    /// The codes of a linear by its full module name; `None` where it is not stored in integer codes.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn codes(&self, linear: &str) -> Result<Option<QuantizedWeight>> {
        let name = format!("{linear}.weight");
        if self.reader_of(&name).is_none() {
            return Ok(None);
        }
        let stored = self.read(&name)?;
        self.release(&name);
        Ok(match stored {
            Stored::Codes(weight) => Some(weight),
            Stored::Floats(_) => None,
        })
    }
}

/// The rows of a matrix, in panels of [`PANEL_BYTES`] in f32.
pub(super) fn panels(rows: usize, columns: usize) -> impl Iterator<Item = Range<usize>> {
    let height = (PANEL_BYTES / 4 / columns.max(1)).max(1);
    (0..rows)
        .step_by(height)
        .map(move |begin| begin..rows.min(begin + height))
}

/// The little-endian bytes of `values`, rounded to `dtype`.
fn narrow(name: &str, values: &[f32], dtype: Dtype) -> Result<Vec<u8>> {
    let halves: Vec<u16> = match dtype {
        Dtype::F32 => return Ok(bytemuck::cast_slice(values).to_vec()),
        Dtype::BF16 => values
            .iter()
            .map(|&value| bf16::from_f32(value).to_bits())
            .collect(),
        Dtype::F16 => values
            .iter()
            .map(|&value| f16::from_f32(value).to_bits())
            .collect(),
        other => return Err(unreadable(name, other)),
    };
    if dtype == Dtype::F16
        && let Some(value) = values.iter().find(|value| !f16::from_f32(**value).is_finite())
    {
        return Err(Error::invalid(
            name,
            format!("has an element of {value}, which is none in f16"),
            "let it be quantized, too: remove it from --ignore",
        ));
    }
    Ok(bytemuck::cast_slice(&halves).to_vec())
}
