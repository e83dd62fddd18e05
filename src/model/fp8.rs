//! Source weights in block-scaled 8-bit floats: `{name}` in E4M3 and `{name}_scale_inv` beside it. They are widened as they are
//! read; nothing is copied to the disk.

use crate::checkpoint::{Checkpoint, TensorView};
use crate::error::{Error, Result};
use crate::numerics::fp8::dequantize_blocks;
use candle_core::{Device, Tensor};
use safetensors::Dtype;

/// Largest side of a block that is believed.
const BLOCK_MAX: u64 = 1 << 16;

/// Whether `config`, a `quantization_config`, says that weights are of this kind.
pub(super) fn is_fp8(config: &serde_json::Value) -> bool {
    config.get("quant_method").and_then(|method| method.as_str()) == Some("fp8")
}

/// The sides of a block, rows first.
fn block_size(checkpoint: &Checkpoint) -> Result<[usize; 2]> {
    let sides = checkpoint
        .config()
        .get("quantization_config")
        .and_then(|config| config.get("weight_block_size"))
        .and_then(|sides| sides.as_array());
    let side = |value: &serde_json::Value| value.as_u64().filter(|side| (1..=BLOCK_MAX).contains(side));
    match sides
        .map(|sides| sides.iter().map(side).collect::<Vec<_>>())
        .as_deref()
    {
        Some([Some(rows), Some(columns)]) => Ok([*rows as usize, *columns as usize]),
        _ => Err(Error::invalid(
            "config.json",
            format!(
                "`quantization_config.weight_block_size` is missing, or not two numbers from 1 to {BLOCK_MAX}"
            ),
            "8-bit float weights can be read where they have a scale for each block, as DeepSeek-V3's have",
        )),
    }
}

/// `tensor`, `[rows, columns]` in E4M3, in f32.
///
/// # Errors
/// Its scales are missing or misshapen.
pub(super) fn widen(checkpoint: &Checkpoint, tensor: &TensorView<'_>, device: &Device) -> Result<Tensor> {
    let block = block_size(checkpoint)?;
    let name = format!("{}_scale_inv", tensor.name);
    let scales = checkpoint.tensor(&name)?;
    let [rows, columns] = *tensor.shape else {
        return Err(Error::invalid(
            tensor.name,
            format!(
                "has shape {:?}; 8-bit floats with block scales are matrices",
                tensor.shape
            ),
            "",
        ));
    };
    let wanted = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
    if scales.shape != wanted || scales.dtype != Dtype::F32 {
        return Err(Error::invalid(
            name,
            format!(
                "is {:?} {:?}, expected F32 {wanted:?}",
                scales.dtype, scales.shape
            ),
            "the checkpoint is damaged, or its weight_block_size is another",
        ));
    }
    let values: Vec<f32> = bytemuck::pod_collect_to_vec(scales.bytes);
    let weights = dequantize_blocks(tensor.bytes, columns, &values, block);
    Ok(Tensor::from_vec(weights, (rows, columns), device)?)
}
