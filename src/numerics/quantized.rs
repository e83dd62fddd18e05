//! What a solver returns and a format stores: integer codes on a per-group grid.
//!
//! Codes are final (law 7): a [`QuantizedWeight`] is the only carrier of codes, scales and zero points
//! between solver, output file and forward pass; nothing is re-derived from dequantized weights.

use super::bits;
use super::simd::vectorized;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The dtype in which scales are stored. Scales are rounded to it before any code is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleDtype {
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
    /// IEEE single precision
    F32,
}

impl ScaleDtype {
    /// Smallest positive scale that is used: a normal number of the dtype, so that `1 / scale` is finite.
    pub fn min_positive(self) -> f64 {
        match self {
            Self::Bf16 | Self::F32 => f64::from(f32::MIN_POSITIVE),
            Self::F16 => f64::from(f16::MIN_POSITIVE.to_f32()),
        }
    }

    /// `value` rounded to the dtype, to nearest even, clamped to its positive normal range.
    pub fn round(self, value: f64) -> f64 {
        let value = value.max(self.min_positive());
        match self {
            Self::Bf16 => round_significand(value, bf16::MANTISSA_DIGITS - 1),
            Self::F16 => round_significand(value.min(f16::MAX.to_f64()), f16::MANTISSA_DIGITS - 1),
            Self::F32 => f64::from(value as f32),
        }
    }
}

/// The significand of a positive normal number, rounded to `bits` explicit bits. The conversions of the crate `half` look at the upper half of
/// an f64 alone, and take what lies just above the middle for the middle.
fn round_significand(value: f64, bits: u32) -> f64 {
    let dropped = f64::MANTISSA_DIGITS - 1 - bits;
    let word = value.to_bits();
    let word = word + ((word >> dropped) & 1) + ((1 << (dropped - 1)) - 1);
    f64::from_bits(word & !((1 << dropped) - 1))
}

/// The grid of one linear: what its codes mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grid {
    /// 2, 3, 4 or 8
    pub bits: u32,
    /// Columns that share a scale; the number of columns itself for per-channel grids.
    pub group_size: usize,
    /// Symmetric grids have the zero point 2^(bits-1) everywhere.
    pub symmetric: bool,
    /// Storage dtype of the scales.
    pub scale_dtype: ScaleDtype,
}

impl Grid {
    /// Largest code: 2^bits - 1. The smallest is 0.
    pub fn max_code(self) -> u8 {
        ((1u32 << self.bits) - 1) as u8
    }

    /// Zero point of a symmetric grid: 2^(bits-1).
    pub fn symmetric_zero(self) -> u8 {
        (1u32 << (self.bits - 1)) as u8
    }
}

/// The quantized weight of one linear: `w[r, c] = (code[r, c] - zero[r, g]) * scale[r, g]`, `g = c / group_size`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizedWeight {
    /// What the codes mean.
    pub grid: Grid,
    /// Output features.
    pub rows: usize,
    /// Input features; a multiple of `grid.group_size`.
    pub columns: usize,
    /// `[rows, bits::words(columns, grid.bits)]`, row-major: codes in `0..=grid.max_code()`, a row packed as [`bits`] says
    pub codes: Vec<u32>,
    /// `[rows, columns / group_size]`, each exactly representable in `grid.scale_dtype`
    pub scales: Vec<f32>,
    /// `[rows, columns / group_size]`, in `0..=grid.max_code()`; `2^(bits-1)` throughout if symmetric
    pub zeros: Vec<u8>,
}

impl QuantizedWeight {
    /// Bytes of codes, scales and zero points of `rows` rows.
    pub fn byte_len(rows: usize, columns: usize, bits: u32, group_size: usize) -> usize {
        let of_group = size_of::<f32>() + size_of::<u8>();
        rows * (bits::words(columns, bits) * size_of::<u32>() + columns / group_size * of_group)
    }

    /// Groups in a row.
    pub fn groups(&self) -> usize {
        self.columns / self.grid.group_size
    }

    /// Codes, not packed: `[rows, columns]`, row-major.
    pub fn unpacked(&self) -> Vec<u8> {
        bits::unpack_rows(&self.codes, self.columns, self.grid.bits)
    }

    /// The weight that an inference kernel sees, `[rows, columns]` row-major, in f32.
    pub fn dequantize(&self) -> Vec<f32> {
        self.dequantize_rows(0..self.rows)
    }

    /// These rows of [`Self::dequantize`].
    ///
    /// # Panics
    /// There are no such rows.
    pub fn dequantize_rows(&self, rows: Range<usize>) -> Vec<f32> {
        let mut values = vec![0.0; rows.len() * self.columns];
        self.dequantize_rows_to(rows, &mut values);
        values
    }

    /// Writes these rows of [`Self::dequantize`] to `values`.
    ///
    /// # Panics
    /// There are no such rows, or `values` has room for others.
    pub fn dequantize_rows_to(&self, rows: Range<usize>, values: &mut [f32]) {
        assert_eq!(values.len(), rows.len() * self.columns);
        let (width, groups) = (bits::words(self.columns, self.grid.bits), self.groups());
        let size = self.grid.group_size;
        let mut codes = vec![0; self.columns];
        vectorized!({
            for (row, values) in rows.zip(values.chunks_exact_mut(self.columns)) {
                bits::unpack_row(&self.codes[row * width..][..width], self.grid.bits, &mut codes);
                let scales = &self.scales[row * groups..][..groups];
                let scales = scales.iter().zip(&self.zeros[row * groups..][..groups]);
                let parts = values.chunks_exact_mut(size).zip(codes.chunks_exact(size));
                for ((values, codes), (&scale, &zero)) in parts.zip(scales) {
                    let zero = i32::from(zero);
                    for (value, &code) in values.iter_mut().zip(codes) {
                        *value = (i32::from(code) - zero) as f32 * scale;
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_rounded_to_the_nearest() {
        let middle = 0.197_753_906_25;
        let round = |value| ScaleDtype::Bf16.round(value);
        assert_eq!(round(middle), 0.197_265_625);
        assert_eq!(round(middle + 1e-15), 0.198_242_187_5);
        assert_eq!(round(middle - 1e-15), 0.197_265_625);
        assert_eq!(ScaleDtype::F16.round(1e9), 65504.0);
        for dtype in [ScaleDtype::Bf16, ScaleDtype::F16, ScaleDtype::F32] {
            assert_eq!(dtype.round(0.0), dtype.min_positive());
            assert_eq!(dtype.round(0.75), 0.75);
        }
    }
}
