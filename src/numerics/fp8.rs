//! Weights in 8-bit floats (E4M3) with a scale for each rectangular block, as DeepSeek-V3 is published.

use std::ops::Range;

/// Mantissa bits.
const MANTISSA_BITS: u32 = 3;
/// Value of exponent field 1 is 2^(1 - BIAS).
const BIAS: i32 = 7;

/// The value of an E4M3 byte, "fn" flavour: no infinities, and NaN where all bits but the sign are set.
pub fn e4m3(byte: u8) -> f32 {
    let exponent = i32::from(byte >> MANTISSA_BITS & 0xf);
    let mantissa = f32::from(byte & 7) / 8.0;
    let size = match (byte & 0x7f, exponent) {
        (0x7f, _) => f32::NAN,
        (_, 0) => mantissa * 2f32.powi(1 - BIAS),
        _ => (1.0 + mantissa) * 2f32.powi(exponent - BIAS),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

/// Whether a byte is no number.
pub fn is_nan(byte: u8) -> bool {
    byte & 0x7f == 0x7f
}

/// A matrix of E4M3 bytes, none of them NaN, with a scale for each block: element (r, c) has the scale (r / block\[0\], c / block\[1\]) of
/// `scales`, `[.., ceil(columns / block[1])]`.
#[derive(Clone, Debug)]
pub struct Float8Matrix {
    /// `[rows, columns]`, row-major.
    pub codes: Vec<u8>,
    /// Columns.
    pub columns: usize,
    /// A factor a block.
    pub scales: Vec<f32>,
    /// Sides of a block.
    pub block: [usize; 2],
}

impl Float8Matrix {
    /// Writes the values of some rows to `values`, row-major.
    ///
    /// # Panics
    /// There are no such rows, or `values` has room for others.
    pub fn dequantize_rows_to(&self, rows: Range<usize>, values: &mut [f32]) {
        let codes = &self.codes[rows.start * self.columns..rows.end * self.columns];
        dequantize_blocks_to(codes, self.columns, rows.start, &self.scales, self.block, values);
    }
}

/// Writes the values of `codes`, rows of `columns` from row `first` of a matrix on, to `values`; scales are as those of a [`Float8Matrix`].
///
/// # Panics
/// `codes` are no whole rows, or rows without scales, or `values` has room for others.
pub fn dequantize_blocks_to(
    codes: &[u8],
    columns: usize,
    first: usize,
    scales: &[f32],
    block: [usize; 2],
    values: &mut [f32],
) {
    let [rows_of, columns_of] = block;
    let across = columns.div_ceil(columns_of);
    let rows = codes.len() / columns;
    assert!(codes.len() == rows * columns && scales.len() >= (first + rows).div_ceil(rows_of) * across);
    assert_eq!(values.len(), codes.len());
    let table: [f32; 256] = std::array::from_fn(|byte| e4m3(byte as u8));
    let each = values.chunks_exact_mut(columns).zip(codes.chunks_exact(columns));
    for (r, (values, codes)) in each.enumerate() {
        let scales = &scales[(first + r) / rows_of * across..][..across];
        let parts = values.chunks_mut(columns_of).zip(codes.chunks(columns_of));
        for ((values, codes), &scale) in parts.zip(scales) {
            for (value, &code) in values.iter_mut().zip(codes) {
                *value = table[usize::from(code)] * scale;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, bit by bit, in f64.
    fn reference(byte: u8) -> f64 {
        let bit = |i: u32| f64::from(byte >> i & 1);
        let sign = 1.0 - 2.0 * bit(7);
        let exponent = 8.0 * bit(6) + 4.0 * bit(5) + 2.0 * bit(4) + bit(3);
        let fraction = bit(2) / 2.0 + bit(1) / 4.0 + bit(0) / 8.0;
        match (exponent, fraction) {
            (15.0, 0.875) => f64::NAN,
            (0.0, _) => sign * fraction / 64.0,
            _ => sign * (1.0 + fraction) * (exponent - 7.0).exp2(),
        }
    }

    #[test]
    fn all_bytes_match_the_definition() {
        for byte in 0..=u8::MAX {
            let (ours, want) = (f64::from(e4m3(byte)), reference(byte));
            assert_eq!(ours.is_nan(), is_nan(byte));
            assert!(
                ours == want || (ours.is_nan() && want.is_nan()),
                "{byte:#x}: {ours} != {want}"
            );
        }
        assert_eq!((e4m3(0x7e), e4m3(1)), (448.0, 2f32.powi(-9)));
    }

    #[test]
    fn blocks_match_element_by_element() {
        for (rows, columns, block) in [
            (5usize, 7usize, [2, 3]),
            (4, 6, [2, 3]),
            (3, 3, [128, 128]),
            (1, 9, [1, 4]),
        ] {
            let codes: Vec<u8> = (0..rows * columns).map(|i| (i * 37 % 127) as u8).collect();
            let across = columns.div_ceil(block[1]);
            let scales: Vec<f32> = (0..rows.div_ceil(block[0]) * across)
                .map(|i| 0.5 + i as f32)
                .collect();
            let matrix = Float8Matrix {
                codes: codes.clone(),
                columns,
                scales: scales.clone(),
                block,
            };
            let mut ours = vec![0.0; codes.len()];
            matrix.dequantize_rows_to(0..rows, &mut ours);
            for first in 0..rows {
                let mut rest = vec![0.0; (rows - first) * columns];
                matrix.dequantize_rows_to(first..rows, &mut rest);
                assert_eq!(rest, ours[first * columns..]);
            }
            for (i, value) in ours.into_iter().enumerate() {
                let scale = scales[i / columns / block[0] * across + i % columns / block[1]];
                assert_eq!(f64::from(value), reference(codes[i]) * f64::from(scale));
            }
        }
    }
}
