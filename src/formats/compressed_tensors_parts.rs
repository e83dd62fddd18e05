//! The tensors of a linear in compressed-tensors, held against each other before anything is decoded.
//!
//! Read are `pack-quantized` (codes in words), dense or, as before 2026, padded; and `int-quantized` (a signed byte a code, in `weight`).
//!
//! Sources: compressed-tensors 0.20, `compressors/pack_quantized/{base,helpers}.py`, `compressors/naive_quantized/base.py`.

use super::compressed_tensors_config as config;
use super::raw::Raw;
use super::schemes::Scheme;
use super::{CodedShape, TensorLookup, words};
use crate::error::Result;
use crate::numerics::{Grid, QuantizedWeight, bits};
use safetensors::Dtype;
use serde_json::Value;

/// How codes are stored.
enum Codes<'a> {
    /// A stream of bits.
    Dense(Raw<'a>),
    /// Whole codes in each word: ten 3-bit codes, two bits unused.
    Padded(Raw<'a>),
    /// A signed byte each.
    Bytes(Raw<'a>),
}

/// See the module.
pub(super) struct Parts<'a> {
    rows: usize,
    columns: usize,
    codes: Codes<'a>,
    grid: Grid,
    scale: Raw<'a>,
    /// `None` where the grid is symmetric.
    zeros: Option<Raw<'a>>,
}

impl<'a> Parts<'a> {
    /// Finds the tensors of `linear`; reads none but `weight_shape` and `weight_g_idx`.
    pub(super) fn find(linear: &str, stated: &Value, tensor: TensorLookup<'_, 'a>) -> Result<Self> {
        let Scheme {
            bits,
            group_size,
            symmetric,
        } = config::scheme_of(linear, stated)?;
        let (rows, columns, codes) = find_codes(linear, bits, tensor)?;
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
        scale.expect_shape(&[rows, groups], "the weight and its group size")?;
        let group_size = columns / groups;
        if let Some(order) = Raw::optional(tensor, linear, "weight_g_idx")? {
            order.expect_sequential_groups(columns, group_size)?;
        }
        let grid = Grid {
            bits,
            group_size,
            symmetric,
            scale_dtype: scale.scale_dtype()?,
        };
        let zeros = match symmetric {
            true => None,
            false => Some(Raw::required(tensor, linear, "weight_zero_point")?),
        };
        if let Some(zeros) = &zeros {
            // Packed down the rows, or one signed byte each (older writers, and int-quantized).
            let height = match zeros.dtype() {
                Dtype::I8 => rows,
                _ => bits::words(rows, bits),
            };
            zeros.expect_shape(&[height, groups], "weight_scale")?;
        }
        Ok(Self {
            rows,
            columns,
            codes,
            grid,
            scale,
            zeros,
        })
    }

    /// What the headers tell.
    pub(super) fn shape(&self) -> CodedShape {
        CodedShape {
            rows: self.rows,
            columns: self.columns,
            bits: self.grid.bits,
            group_size: self.grid.group_size,
        }
    }

    /// Reads them.
    pub(super) fn decode(self) -> Result<QuantizedWeight> {
        let (rows, columns, grid) = (self.rows, self.columns, self.grid);
        let bits = grid.bits;
        let codes = match self.codes {
            Codes::Dense(packed) => packed.words()?,
            Codes::Padded(packed) => {
                let per_word = 32 / bits as usize;
                let mut codes = Vec::with_capacity(rows * columns);
                for words in packed.words()?.chunks_exact(columns.div_ceil(per_word)) {
                    codes.extend((0..columns).map(|column| {
                        let word = words[column / per_word] >> (bits * (column % per_word) as u32);
                        (word & ((1 << bits) - 1)) as u8
                    }));
                }
                bits::pack_rows(&codes, columns, bits)
            }
            Codes::Bytes(bytes) => bits::pack_rows(&unsigned(&bytes, grid)?, columns, bits),
        };
        let (scales, _) = self.scale.scales()?;
        let zeros = match self.zeros {
            None => vec![grid.symmetric_zero(); scales.len()],
            Some(bytes) if bytes.dtype() == Dtype::I8 => unsigned(&bytes, grid)?,
            Some(packed) => {
                let groups = columns / grid.group_size;
                let by_group = words::transpose(&packed.words()?, bits::words(rows, bits), groups);
                let zeros = bits::unpack_rows(&by_group, rows, bits);
                words::transpose(&zeros, groups, rows)
            }
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
}

/// Rows, columns and what holds the codes. `weight_shape` is believed only as far as the packed tensor bears it out.
fn find_codes<'a>(
    linear: &str,
    bits: u32,
    lookup: TensorLookup<'_, 'a>,
) -> Result<(usize, usize, Codes<'a>)> {
    if let Some(bytes) = Raw::optional(lookup, linear, "weight")?
        && bytes.dtype() == Dtype::I8
    {
        let (rows, columns) = bytes.matrix()?;
        return Ok((rows, columns, Codes::Bytes(bytes)));
    }
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
    packed.expect_words()?;
    if fits && width == bits::words(columns, bits) {
        return Ok((rows, columns, Codes::Dense(packed)));
    }
    if fits && width == columns.div_ceil(32 / bits as usize) {
        return Ok((rows, columns, Codes::Padded(packed)));
    }
    Err(packed.error(
        format!(
            "has shape [{rows}, {width}], which does not hold {bits}-bit codes of weight_shape {sides:?}"
        ),
        "the file is damaged, or num_bits in quantization_config is wrong",
    ))
}

/// Signed bytes as the unsigned codes or zero points of `grid`.
fn unsigned(bytes: &Raw<'_>, grid: Grid) -> Result<Vec<u8>> {
    let offset = i16::from(grid.symmetric_zero());
    let code = |signed: i8| {
        u8::try_from(i16::from(signed) + offset)
            .ok()
            .filter(|&code| code <= grid.max_code())
            .ok_or_else(|| bytes.error(format!("{signed} does not fit in {} bits", grid.bits), ""))
    };
    bytes.signed_bytes()?.into_iter().map(code).collect()
}
