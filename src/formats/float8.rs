//! Weights in 8-bit floats (E4M3) with scales beside them: `{name}_scale_inv` (DeepSeek, transformers' FineGrainedFP8) or `{name}_scale`
//! (compressed-tensors, vLLM). Either is a factor, whatever its name says. A scale belongs to a rectangular block, a row, a column or all
//! of a matrix; a tensor of all experts, `[experts, rows, columns]`, has the scales of each expert's matrix.
//!
//! Sources: transformers 5, `integrations/finegrained_fp8.py`; DeepSeek-V3, `inference/kernel.py` (`weight_dequant`); compressed-tensors
//! 0.20, `compressors/naive_quantized/base.py`.

use super::TensorLookup;
use super::raw::Raw;
use crate::error::{Error, Result};
use crate::numerics::fp8::{self, Float8Matrix};
use safetensors::Dtype;
use serde_json::Value;
use std::borrow::Cow;
use std::ops::Range;

/// Largest side of a block that is believed.
const BLOCK_MAX: u64 = 1 << 16;
/// Names of the scales: below the weight's own.
pub(super) const SCALES: [&str; 2] = ["_scale_inv", "_scale"];

/// The sides of a block as a config states them, rows first.
pub(super) fn block_sides(value: &Value) -> Option<[usize; 2]> {
    let side = |value: &Value| value.as_u64().filter(|side| (1..=BLOCK_MAX).contains(side));
    match value.as_array()?.as_slice() {
        [rows, columns] => Some([side(rows)? as usize, side(columns)? as usize]),
        _ => None,
    }
}

/// One matrix, or one an expert, not yet widened.
pub struct Float8<'a> {
    name: String,
    /// As stored: two or three sides.
    shape: Vec<usize>,
    rows: usize,
    columns: usize,
    codes: Cow<'a, [u8]>,
    scale: Raw<'a>,
    /// Sides of what has a scale.
    block: [usize; 2],
    /// Elements of `scale` that an expert has; 0 where all share one.
    expert_scales: usize,
}

impl<'a> Float8<'a> {
    /// Finds the weight `name` and its scales, and reads neither. `block` is what the config says of blocks.
    pub(super) fn find(name: &str, block: Option<[usize; 2]>, tensor: TensorLookup<'_, 'a>) -> Result<Self> {
        let weight = Raw::named(tensor, name.to_owned())?;
        if weight.dtype() != Dtype::F8_E4M3 {
            return Err(weight.error(format!("is {:?}, not F8_E4M3", weight.dtype()), ""));
        }
        let shape = weight.shape().to_vec();
        let (experts, rows, columns) = match shape[..] {
            [rows, columns] if rows * columns > 0 => (None, rows, columns),
            [experts, rows, columns] if experts * rows * columns > 0 => (Some(experts), rows, columns),
            _ => {
                return Err(weight.error(
                    format!(
                        "has shape {shape:?}; 8-bit floats are read in matrices, or in one for each expert"
                    ),
                    "",
                ));
            }
        };
        let names = SCALES.map(|ending| format!("{name}{ending}"));
        let mut scale = None;
        for name in &names {
            scale = scale.or(Raw::find(tensor, name)?);
        }
        let scale = scale.ok_or_else(|| {
            Error::invalid(
                name,
                format!("is F8_E4M3, but neither {} nor {} is there", names[0], names[1]),
                "the checkpoint is incomplete: download it again",
            )
        })?;
        scale.scale_dtype()?;
        let grids = grids(rows, columns, block);
        let found = scale.shape();
        let inner = |[down, across]: [usize; 2]| match experts {
            None => vec![down, across],
            Some(experts) => vec![experts, down, across],
        };
        let fits = |grid: [usize; 2]| {
            // One scale a row, or for all, is also written without sides of 1.
            let flat: Vec<usize> = experts
                .into_iter()
                .chain((grid[0] > 1).then_some(grid[0]))
                .collect();
            inner(grid) == found || (block.is_none() && grid[1] == 1 && flat == found)
        };
        let total = block.is_none() && found.iter().all(|&side| side == 1);
        let Some((block, [down, across])) = grids.iter().copied().find(|(_, grid)| total || fits(*grid))
        else {
            let wanted: Vec<_> = grids
                .iter()
                .map(|(_, grid)| format!("{:?}", inner(*grid)))
                .collect();
            return Err(scale.error(
                format!("has shape {found:?}, expected {}", wanted.join(" or ")),
                match block {
                    Some(_) => {
                        "the checkpoint is damaged, or its block size in quantization_config is another"
                    }
                    None => "scales of blocks need weight_block_size in quantization_config",
                },
            ));
        };
        Ok(Self {
            name: name.to_owned(),
            shape,
            rows,
            columns,
            codes: weight.into_data(),
            scale,
            block,
            expert_scales: if total { 0 } else { down * across },
        })
    }

    /// As stored: `[rows, columns]`, or `[experts, rows, columns]`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Bytes of elements and scales in memory.
    pub(super) fn byte_len(&self) -> usize {
        self.codes.len() + self.scale.shape().iter().product::<usize>() * size_of::<f32>()
    }

    /// Rows `rows` of the matrix of `expert` (0 where there is one matrix), in f32.
    ///
    /// # Errors
    /// A scale, or an element, is no number.
    pub fn dequantize(&self, expert: usize, rows: Range<usize>) -> Result<Vec<f32>> {
        let (scales, _) = self.scale.scales()?;
        let (begin, length) = (expert * self.expert_scales, self.expert_scales.max(1));
        let matrix = expert * self.rows * self.columns;
        let codes = self.numbers(matrix + rows.start * self.columns..matrix + rows.end * self.columns)?;
        let mut values = vec![0.0; codes.len()];
        let scales = &scales[begin..begin + length];
        fp8::dequantize_blocks_to(codes, self.columns, rows.start, scales, self.block, &mut values);
        Ok(values)
    }

    /// The one matrix that there is, in memory.
    ///
    /// # Errors
    /// A scale, or an element, is no number.
    pub fn into_matrix(self) -> Result<Float8Matrix> {
        self.numbers(0..self.rows * self.columns)?;
        let (scales, _) = self.scale.scales()?;
        Ok(Float8Matrix {
            codes: self.codes.into_owned(),
            columns: self.columns,
            scales,
            block: self.block,
        })
    }

    /// These codes, of which none is NaN.
    fn numbers(&self, range: Range<usize>) -> Result<&[u8]> {
        let codes = &self.codes[range.clone()];
        match codes.iter().position(|&code| fp8::is_nan(code)) {
            None => Ok(codes),
            Some(at) => Err(Error::invalid(
                &self.name,
                format!("element {} is not a number", range.start + at),
                "the file is damaged: download it again",
            )),
        }
    }
}

/// What may have a scale in a matrix, as sides of the block, and how many there are down and across.
fn grids(rows: usize, columns: usize, block: Option<[usize; 2]>) -> Vec<([usize; 2], [usize; 2])> {
    let blocks = match block {
        Some(block) => vec![block],
        None => vec![[rows, columns], [1, columns], [rows, 1]],
    };
    let count = |[down, across]: [usize; 2]| [rows.div_ceil(down), columns.div_ceil(across)];
    blocks.into_iter().map(|block| (block, count(block))).collect()
}
