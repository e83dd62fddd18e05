//! GPTQ, versions 1 and 2 of the checkpoint format.
//!
//! Per linear: `qweight` I32 `[columns * bits / 32, rows]`, packed down the columns; `qzeros` I32 `[groups, rows * bits / 32]`,
//! packed along the rows; `scales` F16 `[groups, rows]`; `g_idx` I32 `[columns]`, here always `column / group_size`.
//! Version 2 stores zero points as they are. Version 1 stores them minus one, field by field.
//!
//! **Version 1 cannot hold a zero point of 0**, and its readers disagree on what the field `2^bits - 1` means: GPTQModel adds one to
//! the packed word, so that it carries into the neighbour; kernels that add field by field read `2^bits`. GPTQModel moreover
//! refuses an asymmetric version 1 file that names no GPTQModel as its maker. So [`Gptq::V1`] writes symmetric grids only.
//!
//! Sources: GPTQModel 7.7, `nn_modules/qlinear/__init__.py` (unpacking), `utils/model.py` (`convert_gptq_v1_to_v2_format_module`),
//! `models/loader.py` (the refusal), `quantization/config.py`.

use super::gptq_config::Stated;
use super::raw::{Raw, scale_bytes};
use super::{CodedShape, Format, LinearLayout, TensorLookup, TensorSpec, gptq_config, schemes, words};
use crate::error::{Error, Result};
use crate::numerics::{Grid, QuantizedWeight, ScaleDtype, bits};
use safetensors::Dtype;
use serde_json::Value;

/// The layout of AutoGPTQ and GPTQModel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gptq {
    /// `checkpoint_format: "gptq"`: zero points minus one; what every serving stack reads.
    V1,
    /// `checkpoint_format: "gptq_v2"`: zero points as they are; the one for asymmetric grids.
    V2,
}

impl Format for Gptq {
    fn name(&self) -> &'static str {
        match self {
            Self::V1 => "gptq",
            Self::V2 => "gptq-v2",
        }
    }

    fn parts(&self) -> &'static [&'static str] {
        &["qweight", "qzeros", "scales", "g_idx"]
    }

    fn describe(&self, config: &Value) -> String {
        let stated = |key: &str| config.get(key).map_or("?".into(), Value::to_string);
        format!("{} bits, groups of {}", stated("bits"), stated("group_size"))
    }

    fn scale_dtype(&self, _weights: Dtype) -> ScaleDtype {
        ScaleDtype::F16
    }

    fn check(&self, linear: &str, rows: usize, columns: usize, grid: Grid) -> Result<()> {
        schemes::check(linear, rows, columns, grid)?;
        schemes::expect_whole_words("--format", linear, "rows", rows, grid.bits)?;
        if grid.scale_dtype != ScaleDtype::F16 {
            return Err(Error::usage(
                "--format",
                format!("{linear} has {:?} scales; GPTQ stores F16", grid.scale_dtype),
                "use --format compressed-tensors",
            ));
        }
        if *self == Self::V1 && !grid.symmetric {
            return Err(Error::usage(
                "--format",
                format!(
                    "{linear} is asymmetric; gptq stores zero points minus one and cannot hold a zero point of 0"
                ),
                "use --format gptq-v2 or compressed-tensors, or --symmetric",
            ));
        }
        Ok(())
    }

    fn specs(&self, linear: &str, rows: usize, columns: usize, grid: Grid) -> Vec<TensorSpec> {
        let spec = |part: &str, dtype, shape| TensorSpec {
            name: format!("{linear}.{part}"),
            dtype,
            shape,
        };
        let groups = columns / grid.group_size;
        let (height, width) = (bits::words(columns, grid.bits), bits::words(rows, grid.bits));
        vec![
            spec("qweight", Dtype::I32, vec![height, rows]),
            spec("qzeros", Dtype::I32, vec![groups, width]),
            spec("scales", Dtype::F16, vec![groups, rows]),
            spec("g_idx", Dtype::I32, vec![columns]),
        ]
    }

    fn pack(&self, weight: &QuantizedWeight) -> Vec<Vec<u8>> {
        let QuantizedWeight { rows, columns, .. } = *weight;
        let (width, groups) = (weight.grid.bits, weight.groups());
        let qweight = words::transpose(&weight.codes, rows, bits::words(columns, width));
        let mut zeros = words::transpose(&weight.zeros, rows, groups);
        if *self == Self::V1 {
            debug_assert!(zeros.iter().all(|&zero| zero > 0), "`check` was not asked");
            for zero in &mut zeros {
                *zero = zero.wrapping_sub(1) & weight.grid.max_code();
            }
        }
        let scales = words::transpose(&weight.scales, rows, groups);
        let g_idx = (0..columns).map(|column| (column / weight.grid.group_size) as u32);
        vec![
            words::to_bytes(&qweight),
            words::to_bytes(&bits::pack_rows(&zeros, rows, width)),
            scale_bytes(&scales, ScaleDtype::F16),
            words::to_bytes(&g_idx.collect::<Vec<_>>()),
        ]
    }

    fn shape(&self, linear: &str, config: &Value, tensor: TensorLookup<'_, '_>) -> Result<CodedShape> {
        let parts = Parts::find(linear, config, tensor)?;
        Ok(CodedShape {
            rows: parts.rows,
            columns: parts.columns,
            bits: parts.bits,
            group_size: parts.columns / parts.groups,
        })
    }

    fn unpack(&self, linear: &str, config: &Value, tensor: TensorLookup<'_, '_>) -> Result<QuantizedWeight> {
        let parts = Parts::find(linear, config, tensor)?;
        let (rows, columns, groups) = (parts.rows, parts.columns, parts.groups);
        let width = parts.bits;
        let (scales, scale_dtype) = parts.scales.scales()?;
        let mut grid = Grid {
            bits: width,
            group_size: columns / groups,
            symmetric: false,
            scale_dtype,
        };
        let zeros = self.read_zeros(&parts.qzeros, rows, grid, parts.stated.trusted_carry)?;
        grid.symmetric = parts.stated.symmetric && zeros.iter().all(|&it| it == grid.symmetric_zero());
        Ok(QuantizedWeight {
            grid,
            rows,
            columns,
            codes: words::transpose(&parts.qweight.words()?, bits::words(columns, width), rows),
            scales: words::transpose(&scales, groups, rows),
            zeros: words::transpose(&zeros, groups, rows),
        })
    }

    fn quantization_config(&self, linears: &[LinearLayout]) -> Value {
        let version = match self {
            Self::V1 => "gptq",
            Self::V2 => "gptq_v2",
        };
        gptq_config::quantization_config(version, linears)
    }

    fn side_files(&self, linears: &[LinearLayout]) -> Vec<(&'static str, Value)> {
        vec![("quantize_config.json", self.quantization_config(linears))]
    }
}

/// The tensors of a linear, held against each other; none but `g_idx` is read yet.
struct Parts<'a> {
    stated: Stated,
    bits: u32,
    rows: usize,
    columns: usize,
    groups: usize,
    qweight: Raw<'a>,
    scales: Raw<'a>,
    qzeros: Raw<'a>,
}

impl<'a> Parts<'a> {
    fn find(linear: &str, config: &Value, tensor: TensorLookup<'_, 'a>) -> Result<Self> {
        let stated = gptq_config::stated(linear, config);
        let qweight = Raw::required(tensor, linear, "qweight")?;
        let (height, rows) = qweight.matrix()?;
        qweight.expect_words()?;
        let Some(bits) = stated.bits else {
            return Err(Error::invalid(
                format!("quantization_config for {linear}"),
                "bits is not 2, 3, 4 or 8",
                "GPTQ files of other widths are not read",
            ));
        };
        if !(height * 32).is_multiple_of(bits as usize) {
            return Err(qweight.error(
                format!("has {height} rows of words, which hold no whole number of {bits}-bit codes"),
                "bits in quantization_config is wrong, or the file is damaged",
            ));
        }
        // `height * 32` cannot overflow: the tensor's 4 * height * rows bytes lie in memory.
        let columns = height * 32 / bits as usize;

        let scales = Raw::required(tensor, linear, "scales")?;
        let (groups, _) = scales.matrix()?;
        scales.expect_shape(&[groups, rows], "qweight")?;
        scales.scale_dtype()?;
        if !columns.is_multiple_of(groups) {
            return Err(scales.error(
                format!("has {groups} groups, which do not divide {columns} columns"),
                "a last group that is not full is not read",
            ));
        }
        let group_size = columns / groups;
        if stated
            .group_size
            .is_some_and(|size| size != group_size && size < columns)
        {
            return Err(scales.error(
                format!(
                    "has groups of {group_size}, but quantization_config says {:?}",
                    stated.group_size
                ),
                "the file is damaged, or bits in quantization_config is wrong",
            ));
        }
        if let Some(order) = Raw::optional(tensor, linear, "g_idx")? {
            order.expect_sequential_groups(columns, group_size)?;
        }
        let qzeros = Raw::required(tensor, linear, "qzeros")?;
        qzeros.expect_shape(&[groups, bits::words(rows, bits)], "scales")?;
        Ok(Self {
            stated,
            bits,
            rows,
            columns,
            groups,
            qweight,
            scales,
            qzeros,
        })
    }
}

impl Gptq {
    /// Zero points `[groups, rows]`.
    ///
    /// A version 1 field of all ones has no meaning that its readers share. GPTQModel writes a zero point of 0 so that it comes back
    /// when one is added to the packed word (3 bits: to the field); that is followed for files that name GPTQModel
    /// (`trusted_carry`), others are refused.
    fn read_zeros(self, stored: &Raw<'_>, rows: usize, grid: Grid, trusted_carry: bool) -> Result<Vec<u8>> {
        let mut words = stored.words()?;
        if self == Self::V2 {
            return Ok(bits::unpack_rows(&words, rows, grid.bits));
        }
        let mut zeros = bits::unpack_rows(&words, rows, grid.bits);
        let wraps = zeros.contains(&grid.max_code());
        if wraps && !trusted_carry {
            return Err(stored.error(
                format!(
                    "holds the field {}, a zero point of 0 that version 1 of the format cannot express",
                    grid.max_code()
                ),
                "readers disagree on it; quantize the original again, as gptq-v2 or symmetric",
            ));
        }
        if wraps && grid.bits != 3 {
            let ones = u32::MAX / u32::from(grid.max_code());
            for word in &mut words {
                *word = word.wrapping_add(ones);
            }
            return Ok(bits::unpack_rows(&words, rows, grid.bits));
        }
        for zero in &mut zeros {
            *zero = zero.wrapping_add(1) & grid.max_code();
        }
        Ok(zeros)
    }
}
