//! Reading tensors that somebody else wrote: dtype, shape and length are checked before anything is decoded.
//!
//! Nothing here allocates more than a small multiple of the bytes that are already in memory, and nothing panics on
//! any input. It knows no layout; the formats do.

use super::{TensorLookup, words};
use crate::error::{Error, Result};
use crate::numerics::ScaleDtype;
use half::{bf16, f16};
use safetensors::Dtype;
use std::borrow::Cow;

/// The hint on tensors whose content contradicts itself.
const DAMAGED: &str = "the file is damaged, or was written by a tool whose layout is not known here";

/// A tensor whose data is as long as its shape says.
pub(super) struct Raw<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    data: Cow<'a, [u8]>,
}

impl<'a> Raw<'a> {
    /// The tensor `{linear}.{part}`, which has to be there.
    pub(super) fn required(lookup: TensorLookup<'_, 'a>, linear: &str, part: &str) -> Result<Self> {
        Self::named(lookup, format!("{linear}.{part}"))
    }

    /// The tensor `name`, which has to be there.
    pub(super) fn named(lookup: TensorLookup<'_, 'a>, name: String) -> Result<Self> {
        Self::find(lookup, &name)?.ok_or_else(|| {
            Error::invalid(
                name,
                "is missing",
                "the checkpoint is incomplete, or its quantization_config names another format",
            )
        })
    }

    /// The tensor `{linear}.{part}`, if it is there.
    pub(super) fn optional(lookup: TensorLookup<'_, 'a>, linear: &str, part: &str) -> Result<Option<Self>> {
        Self::find(lookup, &format!("{linear}.{part}"))
    }

    /// The tensor `name`, if it is there.
    pub(super) fn find(lookup: TensorLookup<'_, 'a>, name: &str) -> Result<Option<Self>> {
        let Some((spec, data)) = lookup(name) else {
            return Ok(None);
        };
        let bits = spec
            .shape
            .iter()
            .try_fold(spec.dtype.bitsize(), |total, &side| total.checked_mul(side));
        if bits != data.len().checked_mul(8) {
            let problem = format!(
                "has {} bytes, which is not {} {:?}",
                data.len(),
                shape_text(&spec.shape),
                spec.dtype
            );
            return Err(Error::invalid(name, problem, DAMAGED));
        }
        let (dtype, shape) = (spec.dtype, spec.shape);
        Ok(Some(Self {
            name: name.to_owned(),
            dtype,
            shape,
            data,
        }))
    }

    /// An error about this tensor.
    pub(super) fn error(&self, problem: impl Into<String>, hint: impl Into<String>) -> Error {
        Error::invalid(self.name.clone(), problem, hint)
    }

    /// Element type as stored.
    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Shape as stored.
    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The data as stored.
    pub(super) fn into_data(self) -> Cow<'a, [u8]> {
        self.data
    }

    /// Rows and columns of a matrix with at least one element.
    pub(super) fn matrix(&self) -> Result<(usize, usize)> {
        match self.shape[..] {
            [rows, columns] if rows > 0 && columns > 0 => Ok((rows, columns)),
            _ => Err(self.error(
                format!(
                    "has shape {}, not two dimensions above 0",
                    shape_text(&self.shape)
                ),
                DAMAGED,
            )),
        }
    }

    /// Checks the shape; `why` says where the expectation comes from.
    pub(super) fn expect_shape(&self, shape: &[usize], why: &str) -> Result<()> {
        if self.shape == shape {
            return Ok(());
        }
        let problem = format!(
            "has shape {}, but {why} makes it {}",
            shape_text(&self.shape),
            shape_text(shape)
        );
        Err(self.error(problem, DAMAGED))
    }

    /// Refuses what is no I32 tensor.
    pub(super) fn expect_words(&self) -> Result<()> {
        match self.dtype {
            Dtype::I32 | Dtype::U32 => Ok(()),
            other => Err(self.error(format!("is {other:?}, not I32"), DAMAGED)),
        }
    }

    /// The data as 32-bit words of an I32 tensor.
    pub(super) fn words(&self) -> Result<Vec<u32>> {
        self.expect_words()?;
        Ok(words::from_bytes(&self.data))
    }

    /// The data of an I8 tensor.
    pub(super) fn signed_bytes(&self) -> Result<Vec<i8>> {
        match self.dtype {
            Dtype::I8 => Ok(self.data.iter().map(|&byte| byte as i8).collect()),
            other => Err(self.error(format!("is {other:?}, not I8"), DAMAGED)),
        }
    }

    /// The data of an I32 or I64 tensor as integers.
    pub(super) fn integers(&self) -> Result<Vec<i64>> {
        match self.dtype {
            Dtype::I64 => Ok(self
                .data
                .as_chunks::<8>()
                .0
                .iter()
                .map(|&bytes| i64::from_le_bytes(bytes))
                .collect()),
            Dtype::I32 => Ok(words::from_bytes(&self.data)
                .into_iter()
                .map(|word| i64::from(word as i32))
                .collect()),
            other => Err(self.error(format!("is {other:?}, not I32 or I64"), DAMAGED)),
        }
    }

    /// The dtype of a BF16, F16 or F32 tensor.
    pub(super) fn scale_dtype(&self) -> Result<ScaleDtype> {
        match self.dtype {
            Dtype::BF16 => Ok(ScaleDtype::Bf16),
            Dtype::F16 => Ok(ScaleDtype::F16),
            Dtype::F32 => Ok(ScaleDtype::F32),
            other => Err(self.error(format!("is {other:?}, not BF16, F16 or F32"), DAMAGED)),
        }
    }

    /// The data of a BF16, F16 or F32 tensor, all of it finite, with its dtype.
    pub(super) fn scales(&self) -> Result<(Vec<f32>, ScaleDtype)> {
        let halves = || self.data.as_chunks::<2>().0.iter();
        let dtype = self.scale_dtype()?;
        let values: Vec<f32> = match dtype {
            ScaleDtype::Bf16 => halves().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            ScaleDtype::F16 => halves().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            ScaleDtype::F32 => {
                let words = words::from_bytes(&self.data).into_iter();
                words.map(f32::from_bits).collect()
            }
        };
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok((values, dtype)),
            Some(at) => Err(self.error(
                format!("element {at} is {}", values[at]),
                "quantize the original checkpoint again; a scale has to be finite",
            )),
        }
    }

    /// Checks that column `i` of `columns` belongs to group `i / group_size`; other orders are reorderings at run time.
    pub(super) fn expect_sequential_groups(&self, columns: usize, group_size: usize) -> Result<()> {
        self.expect_shape(&[columns], "the packed weight")?;
        let groups = self.integers()?;
        // compressed-tensors before 0.10 fills an unused g_idx with -1.
        if groups.iter().all(|&group| group == -1) {
            return Ok(());
        }
        let odd = groups
            .iter()
            .enumerate()
            .find(|&(column, &group)| usize::try_from(group) != Ok(column / group_size));
        match odd {
            None => Ok(()),
            Some((column, &group)) => Err(self.error(
                format!(
                    "puts column {column} into group {group}, not {}: the columns were reordered (desc_act, actorder group)",
                    column / group_size
                ),
                "only files with groups of neighbouring columns are read; quantize with desc_act false or actorder static",
            )),
        }
    }
}

/// The little-endian bytes of scales in `dtype`, in which each is exactly representable.
pub(super) fn scale_bytes(scales: &[f32], dtype: ScaleDtype) -> Vec<u8> {
    let wide = |bytes: fn(f32) -> [u8; 2]| scales.iter().flat_map(|&s| bytes(s)).collect();
    match dtype {
        ScaleDtype::Bf16 => wide(|scale| bf16::from_f32(scale).to_le_bytes()),
        ScaleDtype::F16 => wide(|scale| f16::from_f32(scale).to_le_bytes()),
        ScaleDtype::F32 => scales.iter().flat_map(|s| s.to_le_bytes()).collect(),
    }
}

/// The safetensors dtype of scales.
pub(super) fn scale_type(dtype: ScaleDtype) -> Dtype {
    match dtype {
        ScaleDtype::Bf16 => Dtype::BF16,
        ScaleDtype::F16 => Dtype::F16,
        ScaleDtype::F32 => Dtype::F32,
    }
}

fn shape_text(shape: &[usize]) -> String {
    let sides: Vec<_> = shape.iter().map(usize::to_string).collect();
    format!("[{}]", sides.join(", "))
}
