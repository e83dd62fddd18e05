//! Weights in 8-bit floats (E4M3) with a scale for each rectangular block, as DeepSeek-V3 is published.

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

/// `codes`, rows of `columns` from row `first` of a matrix on, times their scales: element (r, c) of the matrix has the scale
/// (r / block\[0\], c / block\[1\]) of `scales`, `[.., ceil(columns / block[1])]`.
///
/// # Panics
/// `codes` are no whole rows, or rows without scales.
pub fn dequantize_blocks(
    codes: &[u8],
    columns: usize,
    first: usize,
    scales: &[f32],
    block: [usize; 2],
) -> Vec<f32> {
    let [rows_of, columns_of] = block;
    let across = columns.div_ceil(columns_of);
    let rows = codes.len() / columns;
    assert!(codes.len() == rows * columns && scales.len() >= (first + rows).div_ceil(rows_of) * across);
    let values: [f32; 256] = std::array::from_fn(|byte| e4m3(byte as u8));
    let mut out = Vec::with_capacity(codes.len());
    for (r, row) in codes.chunks_exact(columns).enumerate() {
        let scales = &scales[(first + r) / rows_of * across..][..across];
        for (part, &scale) in row.chunks(columns_of).zip(scales) {
            out.extend(part.iter().map(|&code| values[usize::from(code)] * scale));
        }
    }
    out
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
            let ours = dequantize_blocks(&codes, columns, 0, &scales, block);
            for first in 0..rows {
                let rest = dequantize_blocks(&codes[first * columns..], columns, first, &scales, block);
                assert_eq!(rest, ours[first * columns..]);
            }
            for (i, value) in ours.into_iter().enumerate() {
                let scale = scales[i / columns / block[0] * across + i % columns / block[1]];
                assert_eq!(f64::from(value), reference(codes[i]) * f64::from(scale));
            }
        }
    }
}
