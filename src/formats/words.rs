//! Matrices of words on their way to a file's bytes and back.

/// Side of the square that [`transpose`] moves at once: two squares of u32 fit in a 32 KiB first-level cache.
const TILE: usize = 64;

/// The transpose of `matrix` (`[rows, columns]`, row-major), in square tiles.
pub(super) fn transpose<T: Copy + Default>(matrix: &[T], rows: usize, columns: usize) -> Vec<T> {
    debug_assert_eq!(matrix.len(), rows * columns);
    let mut out = vec![T::default(); matrix.len()];
    for top in (0..rows).step_by(TILE) {
        for left in (0..columns).step_by(TILE) {
            for row in top..(top + TILE).min(rows) {
                for column in left..(left + TILE).min(columns) {
                    out[column * rows + row] = matrix[row * columns + column];
                }
            }
        }
    }
    out
}

/// The little-endian bytes of `words`.
pub(super) fn to_bytes(words: &[u32]) -> Vec<u8> {
    let mut bytes = vec![0; 4 * words.len()];
    for (bytes, word) in bytes.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Inverse of [`to_bytes`]; trailing bytes that fill no word are dropped.
pub(super) fn from_bytes(bytes: &[u8]) -> Vec<u32> {
    bytes
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_round_trip(words in prop::collection::vec(any::<u32>(), 0..50)) {
            prop_assert_eq!(from_bytes(&to_bytes(&words)), words);
        }

        #[test]
        fn transpose_is_an_involution(rows in 0usize..150, columns in 0usize..150) {
            let matrix: Vec<u32> = (0..(rows * columns) as u32).collect();
            let turned = transpose(&matrix, rows, columns);
            if rows > 1 && columns > 1 {
                prop_assert_eq!(turned[1], columns as u32);
            }
            prop_assert_eq!(transpose(&turned, columns, rows), matrix);
        }
    }
}
