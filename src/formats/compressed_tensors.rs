//! compressed-tensors, format `pack-quantized`: integer weights, 16-bit activations.
//!
//! Per linear: `weight_packed` I32 `[rows, columns * bits / 32]`, `weight_scale` `[rows, groups]` in the model's dtype,
//! `weight_shape` I64 `[2]`, and for asymmetric grids `weight_zero_point` I32 `[ceil(rows * bits / 32), groups]`, packed
//! down the rows. Readers hold signed codes and zero points and add `2^(bits-1)` to both before packing, which gives back
//! the unsigned ones of a [`QuantizedWeight`]; a symmetric grid stores no zero point and means `2^(bits-1)`.
//!
//! What is read is more than what is written: `compressed_tensors_parts` says what.
//!
//! Sources: compressed-tensors 0.20, `compressors/pack_quantized/{base,helpers}.py` and `quantization/quant_{args,scheme,config}.py`.
//! vLLM is said to serve 4 and 8 bits of it; that was not checked here.

use super::compressed_tensors_config as config;
use super::compressed_tensors_parts::Parts;
use super::raw::{scale_bytes, scale_type};
use super::schemes;
use super::{CodedShape, Format, LinearLayout, TensorLookup, TensorSpec, words};
use crate::error::Result;
use crate::numerics::{Grid, QuantizedWeight, ScaleDtype, bits};
use safetensors::Dtype;
use serde_json::Value;

/// The layout that llm-compressor writes; the default output.
#[derive(Clone, Copy, Debug, Default)]
pub struct CompressedTensors;

impl Format for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn parts(&self) -> &'static [&'static str] {
        &[
            "weight_packed",
            "weight_scale",
            "weight_shape",
            "weight_zero_point",
            "weight_g_idx",
        ]
    }

    fn describe(&self, config: &Value) -> String {
        config::describe(config)
    }

    fn scale_dtype(&self, weights: Dtype) -> ScaleDtype {
        match weights {
            Dtype::BF16 => ScaleDtype::Bf16,
            Dtype::F16 => ScaleDtype::F16,
            _ => ScaleDtype::F32,
        }
    }

    fn check(&self, linear: &str, rows: usize, columns: usize, grid: Grid) -> Result<()> {
        schemes::check(linear, rows, columns, grid)
    }

    fn specs(&self, linear: &str, rows: usize, columns: usize, grid: Grid) -> Vec<TensorSpec> {
        let spec = |part: &str, dtype, shape| TensorSpec {
            name: format!("{linear}.{part}"),
            dtype,
            shape,
        };
        let groups = columns / grid.group_size;
        let width = bits::words(columns, grid.bits);
        let mut specs = vec![
            spec("weight_packed", Dtype::I32, vec![rows, width]),
            spec("weight_scale", scale_type(grid.scale_dtype), vec![rows, groups]),
            spec("weight_shape", Dtype::I64, vec![2]),
        ];
        if !grid.symmetric {
            let height = bits::words(rows, grid.bits);
            specs.push(spec("weight_zero_point", Dtype::I32, vec![height, groups]));
        }
        specs
    }

    fn pack(&self, weight: &QuantizedWeight) -> Vec<Vec<u8>> {
        let QuantizedWeight { rows, columns, .. } = *weight;
        let (width, groups) = (weight.grid.bits, weight.groups());
        let shape = [rows as i64, columns as i64];
        let mut tensors = vec![
            words::to_bytes(&weight.codes),
            scale_bytes(&weight.scales, weight.grid.scale_dtype),
            shape.iter().flat_map(|side| side.to_le_bytes()).collect(),
        ];
        if !weight.grid.symmetric {
            let by_group = words::transpose(&weight.zeros, rows, groups);
            let packed = bits::pack_rows(&by_group, rows, width);
            let packed = words::transpose(&packed, groups, bits::words(rows, width));
            tensors.push(words::to_bytes(&packed));
        }
        tensors
    }

    fn shape(&self, linear: &str, stated: &Value, tensor: TensorLookup<'_, '_>) -> Result<CodedShape> {
        Parts::find(linear, stated, tensor).map(|parts| parts.shape())
    }

    fn unpack(&self, linear: &str, stated: &Value, tensor: TensorLookup<'_, '_>) -> Result<QuantizedWeight> {
        Parts::find(linear, stated, tensor)?.decode()
    }

    fn quantization_config(&self, linears: &[LinearLayout]) -> Value {
        config::quantization_config(linears)
    }

    fn side_files(&self, _linears: &[LinearLayout]) -> Vec<(&'static str, Value)> {
        Vec::new()
    }
}
