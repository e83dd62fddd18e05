//! compressed-tensors, format `pack-quantized`: integer weights, 16-bit activations.
//!
//! Per linear: `weight_packed` I32 `[rows, columns * bits / 32]`, `weight_scale` `[rows, groups]` in the model's dtype,
//! `weight_shape` I64 `[2]`, and for asymmetric grids `weight_zero_point` I32 `[ceil(rows * bits / 32), groups]`, packed
//! down the rows. Readers hold signed codes and zero points and add `2^(bits-1)` to both before packing, which gives back
//! the unsigned ones of a [`QuantizedWeight`]; a symmetric grid stores no zero point and means `2^(bits-1)`.
//!
//! Sources: compressed-tensors 0.20, `compressors/pack_quantized/{base,helpers}.py` and `quantization/quant_{args,scheme,config}.py`;
//! vLLM, `compressed_tensors/schemes/compressed_tensors_wNa16.py` (4 and 8 bits only).

use super::raw::{Raw, scale_bytes, scale_type};
use super::schemes::{self, Scheme};
use super::{Format, LinearLayout, TensorLookup, TensorSpec, bits};
use crate::error::{Error, Result};
use crate::numerics::{Grid, QuantizedWeight, ScaleDtype};
use regex::Regex;
use safetensors::Dtype;
use serde_json::{Value, json};

/// The `format` of the config.
const PACK_QUANTIZED: &str = "pack-quantized";

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

    fn unpack(&self, linear: &str, config: &Value, tensor: TensorLookup<'_>) -> Result<QuantizedWeight> {
        let Scheme {
            bits,
            group_size,
            symmetric,
        } = scheme_of(linear, config)?;
        let (rows, columns, codes) = read_codes(linear, bits, tensor)?;

        let scale = Raw::required(tensor, linear, "weight_scale")?;
        let groups = match group_size {
            Some(size) if columns.is_multiple_of(size) => columns / size,
            Some(size) => {
                return Err(config_error(
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

    /// One group with `targets: ["Linear"]` where all quantized linears agree, else one group a scheme with explicit names.
    ///
    /// `actorder` is null: it only tells how codes were searched. Readers treat null and `static` alike (codes in
    /// column order, no `weight_g_idx`); `group`, which needs one, was removed from compressed-tensors in 2026.
    fn quantization_config(&self, linears: &[LinearLayout]) -> Value {
        let schemes = schemes::schemes(linears);
        let uniform = schemes.len() == 1;
        let groups: serde_json::Map<String, Value> = schemes
            .into_iter()
            .enumerate()
            .map(|(index, (scheme, members))| {
                let targets = if uniform {
                    json!(["Linear"])
                } else {
                    members.iter().map(|it| it.name.as_str()).collect()
                };
                (format!("group_{index}"), group(targets, scheme))
            })
            .collect();
        let ignore: Value = linears
            .iter()
            .filter(|linear| linear.grid.is_none())
            .map(|linear| linear.name.as_str())
            .collect();
        json!({
            "quant_method": "compressed-tensors",
            "format": PACK_QUANTIZED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignore,
            "kv_cache_scheme": null,
            "global_compression_ratio": null,
        })
    }

    fn side_files(&self, _linears: &[LinearLayout]) -> Vec<(&'static str, Value)> {
        Vec::new()
    }
}

/// One entry of `config_groups`. Readers reject keys that they do not know here.
fn group(targets: Value, scheme: Scheme) -> Value {
    let strategy = match scheme.group_size {
        Some(_) => "group",
        None => "channel",
    };
    json!({
        "targets": targets,
        "format": PACK_QUANTIZED,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": strategy,
            "group_size": scheme.group_size,
            "dynamic": false,
            "actorder": null,
        },
        "input_activations": null,
        "output_activations": null,
    })
}

fn config_error(linear: &str, problem: impl Into<String>) -> Error {
    Error::invalid(
        format!("quantization_config for {linear}"),
        problem,
        "only integer pack-quantized weights of 2, 3, 4 or 8 bits, in groups or per channel, are read",
    )
}

/// The scheme whose target fits best: the exact name, then a regular expression, then the class `Linear`.
fn scheme_of(linear: &str, config: &Value) -> Result<Scheme> {
    let groups = config.get("config_groups").and_then(Value::as_object);
    let rank = |target: &str| match target.strip_prefix("re:") {
        // Python's re.match: from the start, not to the end. Patterns with look-around fit nothing here.
        Some(pattern) => Regex::new(&format!("^(?:{pattern})"))
            .is_ok_and(|pattern| pattern.is_match(linear))
            .then_some(1),
        None if target == linear => Some(0),
        None => (target == "Linear").then_some(2),
    };
    let mut best: Option<(i32, &Value)> = None;
    for group in groups.into_iter().flat_map(|groups| groups.values()) {
        let targets = group.get("targets").and_then(Value::as_array);
        let targets = targets.into_iter().flatten().filter_map(Value::as_str);
        if let Some(rank) = targets.filter_map(rank).min()
            && best.is_none_or(|(known, _)| rank < known)
        {
            best = Some((rank, group));
        }
    }
    let Some((_, group)) = best else {
        return Err(config_error(linear, "no entry of config_groups targets it"));
    };
    let format = group.get("format").filter(|it| !it.is_null());
    let format = format.or(config.get("format")).and_then(Value::as_str);
    if format != Some(PACK_QUANTIZED) {
        return Err(config_error(linear, format!("the format is {format:?}")));
    }
    let weights = &group["weights"];
    let kind = weights.get("type").map_or(Some("int"), Value::as_str);
    if kind != Some("int") {
        return Err(config_error(linear, format!("the type is {kind:?}")));
    }
    let number = |key: &str| weights.get(key).and_then(Value::as_i64);
    let bits = number("num_bits").and_then(|bits| u32::try_from(bits).ok());
    let bits = bits.filter(|bits| bits::WIDTHS.contains(bits));
    let Some(bits) = bits else {
        return Err(config_error(
            linear,
            format!("num_bits is {}", weights["num_bits"]),
        ));
    };
    let group_size = match (
        weights.get("strategy").and_then(Value::as_str),
        number("group_size"),
    ) {
        (Some("channel"), _) | (None, Some(-1)) => None,
        (Some("group") | None, Some(size)) if size > 0 => usize::try_from(size).ok(),
        (strategy, size) => {
            return Err(config_error(
                linear,
                format!("strategy {strategy:?} with group_size {size:?}"),
            ));
        }
    };
    Ok(Scheme {
        bits,
        group_size,
        symmetric: weights["symmetric"].as_bool().unwrap_or(true),
    })
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
