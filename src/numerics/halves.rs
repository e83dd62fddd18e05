//! 16-bit floats in bytes that need not be aligned, to f32 and back, piece by piece: no copy of the whole is made.

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use half::slice::HalfFloatSliceExt;

/// Values that are converted together.
const PIECE: usize = 4096;

/// Writes the values of `bytes` to `values`.
///
/// # Panics
/// There are more or fewer.
pub fn widen<H: Pod>(bytes: &[u8], values: &mut [f32])
where
    [H]: HalfFloatSliceExt,
{
    assert_eq!(bytes.len(), values.len() * size_of::<H>());
    let mut piece = [H::zeroed(); PIECE];
    for (bytes, values) in bytes.chunks(PIECE * size_of::<H>()).zip(values.chunks_mut(PIECE)) {
        let piece = &mut piece[..values.len()];
        cast_slice_mut(piece).copy_from_slice(bytes);
        piece.convert_to_f32_slice(values);
    }
}

/// The bytes of `values`, each rounded to the nearest.
pub fn narrow<H: Pod>(values: &[f32]) -> Vec<u8>
where
    [H]: HalfFloatSliceExt,
{
    let mut bytes = Vec::with_capacity(size_of::<H>() * values.len());
    let mut piece = [H::zeroed(); PIECE];
    for values in values.chunks(PIECE) {
        let piece = &mut piece[..values.len()];
        piece.convert_from_f32_slice(values);
        bytes.extend_from_slice(cast_slice(piece));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_value_is_rounded_by_itself(values in prop::collection::vec(any::<f32>(), 0..3 * PIECE), odd in any::<bool>()) {
            let values: Vec<f32> = values.into_iter().filter(|v| !v.is_nan()).collect();
            let bytes = [vec![0; usize::from(odd)], narrow::<bf16>(&values)].concat();
            let mut wide = vec![1.0; values.len()];
            widen::<bf16>(&bytes[usize::from(odd)..], &mut wide);
            let expected: Vec<f32> = values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
            prop_assert_eq!(&wide, &expected);
            widen::<f16>(&narrow::<f16>(&values), &mut wide);
            let expected: Vec<f32> = values.iter().map(|&v| f16::from_f32(v).to_f32()).collect();
            prop_assert_eq!(wide, expected);
        }
    }
}
