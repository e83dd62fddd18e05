//! compressed-tensors, format `pack-quantized`: integer weights, 16-bit activations.
//!
//! Per linear: `weight_packed` I32 `[rows, columns * bits / 32]`, `weight_scale` `[rows, groups]` in the model's dtype,
//! `weight_shape` I64 `[2]`, and for asymmetric grids `weight_zero_point` I32 `[ceil(rows * bits / 32), groups]`, packed
//! down the rows. Readers hold signed codes and zero points and add `2^(bits-1)` to both before packing, which gives back
//! the unsigned ones of a [`QuantizedWeight`]; a symmetric grid stores no zero point and means `2^(bits-1)`.
//!
//! Sources: compressed-tensors 0.20, `compressors/pack_quantized/{base,helpers}.py` and `quantization/quant_{args,scheme,config}.py`.
//! vLLM is said to serve 4 and 8 bits of it; that was not checked here.

use super::compressed_tensors_config as config;
use super::raw::{Raw, scale_bytes, scale_type};
use super::schemes::{self, Scheme};
use super::{Format, LinearLayout, TensorLookup, TensorSpec, bits};
use crate::error::Result;
use crate::numerics::{Grid, QuantizedWeight, ScaleDtype};
use safetensors::Dtype;
use serde_json::Value;

/// The layout that llm-compressor writes; the default output.
#[derive(Clone, Copy, Debug, Default)]
pub struct CompressedTensors;

impl Format for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
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
            bits::to_bytes(bits::pack_rows(&weight.codes, columns, width)),
            scale_bytes(&weight.scales, weight.grid.scale_dtype),
            shape.iter().flat_map(|side| side.to_le_bytes()).collect(),
        ];
        if !weight.grid.symmetric {
            let by_group = bits::transpose(&weight.zeros, rows, groups);
            let packed = bits::pack_rows(&by_group, rows, width);
            let packed = bits::transpose(&packed, groups, bits::words(rows, width));
            tensors.push(bits::to_bytes(packed));
        }
        tensors
    }

    fn unpack(&self, linear: &str, stated: &Value, tensor: TensorLookup<'_>) -> Result<QuantizedWeight> {
        let Scheme {
            bits,
            group_size,
            symmetric,
        } = config::scheme_of(linear, stated)?;
        let (rows, columns, codes) = read_codes(linear, bits, tensor)?;

        let scale = Raw::required(tensor, linear, "weight_scale")?;
        let groups = match group_size {
            Some(size) if columns.is_multiple_of(size) => columns / size,
            Some(size) => {
                return Err(config::config_error(
                    linear,
                    format!("has {columns} columns, which are not whole groups of {size}"),
                ));
            }
            None => 1,
        };
        scale.expect_shape(&[rows, groups], "the packed weight and its group size")?;
        let (scales, scale_dtype) = scale.scales()?;

        let group_size = columns / groups;
        if let Some(order) = Raw::optional(tensor, linear, "weight_g_idx")? {
            order.expect_sequential_groups(columns, group_size)?;
        }
        let grid = Grid {
            bits,
            group_size,
            symmetric,
            scale_dtype,
        };
        let zeros = if symmetric {
            vec![grid.symmetric_zero(); scales.len()]
        } else {
            read_zeros(linear, rows, groups, grid, tensor)?
        };
        Ok(QuantizedWeight {
            grid,
            rows,
            columns,
            codes,
            scales,
            zeros,
        })
    }

    fn quantization_config(&self, linears: &[LinearLayout]) -> Value {
        config::quantization_config(linears)
    }

    fn side_files(&self, _linears: &[LinearLayout]) -> Vec<(&'static str, Value)> {
        Vec::new()
    }
}

/// Rows, columns and codes. `weight_shape` is believed only as far as the packed tensor bears it out.
fn read_codes(linear: &str, bits: u32, lookup: TensorLookup<'_>) -> Result<(usize, usize, Vec<u8>)> {
    let packed = Raw::required(lookup, linear, "weight_packed")?;
    let shape = Raw::required(lookup, linear, "weight_shape")?;
    let (rows, width) = packed.matrix()?;
    shape.expect_shape(&[2], "a matrix")?;
    let sides = shape.integers()?;
    let [stated_rows, columns] = sides[..] else {
        return Err(shape.error("does not hold two numbers", ""));
    };
    let columns = usize::try_from(columns).unwrap_or(0);
    let fits = usize::try_from(stated_rows) == Ok(rows) && columns > 0 && columns / 32 <= width;
    if fits && width == bits::words(columns, bits) {
        return Ok((rows, columns, bits::unpack_rows(&packed.words()?, columns, bits)));
    }
    // compressed-tensors before 2026 padded every word: ten 3-bit codes, two bits unused.
    let per_word = 32 / bits as usize;
    if fits && width == columns.div_ceil(per_word) {
        let mut codes = Vec::with_capacity(rows * columns);
        for words in packed.words()?.chunks_exact(width) {
            codes.extend((0..columns).map(|column| {
                let word = words[column / per_word] >> (bits * (column % per_word) as u32);
                (word & ((1 << bits) - 1)) as u8
            }));
        }
        return Ok((rows, columns, codes));
    }
    Err(packed.error(
        format!(
            "has shape [{rows}, {width}], which does not hold {bits}-bit codes of weight_shape {sides:?}"
        ),
        "the file is damaged, or num_bits in quantization_config is wrong",
    ))
}

/// Zero points by row: packed down the rows (I32), or one signed byte each (older writers).
fn read_zeros(
    linear: &str,
    rows: usize,
    groups: usize,
    grid: Grid,
    lookup: TensorLookup<'_>,
) -> Result<Vec<u8>> {
    let stored = Raw::required(lookup, linear, "weight_zero_point")?;
    if stored.dtype() == Dtype::I8 {
        stored.expect_shape(&[rows, groups], "weight_scale")?;
        let offset = i16::from(grid.symmetric_zero());
        return stored
            .signed_bytes()?
            .into_iter()
            .map(|zero| {
                u8::try_from(i16::from(zero) + offset)
                    .ok()
                    .filter(|&zero| zero <= grid.max_code())
                    .ok_or_else(|| stored.error(format!("{zero} does not fit in {} bits", grid.bits), ""))
            })
            .collect();
    }
    let height = bits::words(rows, grid.bits);
    stored.expect_shape(&[height, groups], "weight_scale")?;
    let by_group = bits::transpose(&stored.words()?, height, groups);
    let zeros = bits::unpack_rows(&by_group, rows, grid.bits);
    Ok(bits::transpose(&zeros, groups, rows))
}
