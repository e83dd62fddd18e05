//! Dense little-endian bit streams of small codes in 32-bit words.
//!
//! Element `i` of a row occupies the bits `[i * bits, (i + 1) * bits)` of the row's stream, least significant first, and word
//! `w` holds the bits `[32 * w, 32 * w + 32)`. Where `bits` divides 32 no code crosses a word; 3-bit codes do, 32 of them
//! filling exactly 3 words. Both layouts of this crate use it: compressed-tensors
//! (`compressors/pack_quantized/helpers.py`, 0.20) and GPTQ (GPTQModel 7.7, `nn_modules/qlinear`), which differ only in the
//! axis that is packed. This module knows shapes and bits, no tensor names.

use rayon::prelude::*;

/// Widths that [`pack_rows`] and [`unpack_rows`] take.
pub(super) const WIDTHS: [u32; 4] = [2, 3, 4, 8];

/// Side of the square that [`transpose`] moves at once: two squares of u32 fit in a 32 KiB first-level cache.
const TILE: usize = 64;

/// Words that hold `codes` codes of `bits` bits; the last one is filled up with zeros.
pub(super) const fn words(codes: usize, bits: u32) -> usize {
    (codes / 32) * bits as usize + ((codes % 32) * bits as usize).div_ceil(32)
}

/// Packs every row of `codes` (`[rows, columns]`, each below `2^bits`) into [`words`]`(columns, bits)` words.
pub(super) fn pack_rows(codes: &[u8], columns: usize, bits: u32) -> Vec<u32> {
    debug_assert!(WIDTHS.contains(&bits));
    let width = words(columns, bits);
    if width == 0 {
        return Vec::new();
    }
    debug_assert_eq!(codes.len() % columns, 0);
    let mut packed = vec![0; codes.len() / columns * width];
    packed
        .par_chunks_exact_mut(width)
        .zip(codes.par_chunks_exact(columns))
        .for_each(|(words, codes)| pack_row(codes, bits, words));
    packed
}

/// Inverse of [`pack_rows`]: the first `columns` codes of every row of `words(columns, bits)` words.
pub(super) fn unpack_rows(packed: &[u32], columns: usize, bits: u32) -> Vec<u8> {
    debug_assert!(WIDTHS.contains(&bits));
    let width = words(columns, bits);
    if width == 0 {
        return Vec::new();
    }
    debug_assert_eq!(packed.len() % width, 0);
    let mut codes = vec![0; packed.len() / width * columns];
    codes
        .par_chunks_exact_mut(columns)
        .zip(packed.par_chunks_exact(width))
        .for_each(|(codes, words)| unpack_row(words, bits, codes));
    codes
}

fn pack_row(codes: &[u8], bits: u32, words: &mut [u32]) {
    let (mut stream, mut filled, mut words) = (0u64, 0, words.iter_mut());
    for &code in codes {
        debug_assert!(u32::from(code) < 1 << bits, "code {code} in {bits} bits");
        stream |= u64::from(code) << filled;
        filled += bits;
        if filled >= 32 {
            if let Some(word) = words.next() {
                *word = stream as u32;
            }
            stream >>= 32;
            filled -= 32;
        }
    }
    if let Some(word) = words.next() {
        *word = stream as u32;
    }
}

fn unpack_row(words: &[u32], bits: u32, codes: &mut [u8]) {
    let mask = (1u64 << bits) - 1;
    let (mut stream, mut filled, mut words) = (0u64, 0, words.iter());
    for code in codes {
        if filled < bits {
            stream |= u64::from(words.next().copied().unwrap_or(0)) << filled;
            filled += 32;
        }
        *code = (stream & mask) as u8;
        stream >>= bits;
        filled -= bits;
    }
}

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
pub(super) fn to_bytes(mut words: Vec<u32>) -> Vec<u8> {
    for word in &mut words {
        *word = word.to_le();
    }
    bytemuck::cast_slice(&words).to_vec()
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

    /// One bit at a time, straight from the definition.
    fn pack_slowly(codes: &[u8], columns: usize, bits: u32) -> Vec<u32> {
        let (bits, width) = (bits as usize, (columns * bits as usize).div_ceil(32));
        let mut packed = vec![0u32; codes.len() / columns * width];
        for (at, &code) in codes.iter().enumerate() {
            let (row, column) = (at / columns, at % columns);
            for bit in 0..bits {
                let place = column * bits + bit;
                packed[row * width + place / 32] |= u32::from(code >> bit & 1) << (place % 32);
            }
        }
        packed
    }

    fn matrices() -> impl Strategy<Value = (Vec<u8>, usize, u32)> {
        (1usize..5, 1usize..140, prop::sample::select(&WIDTHS[..])).prop_flat_map(|(rows, columns, bits)| {
            let max = ((1u32 << bits) - 1) as u8;
            (
                prop::collection::vec(0..=max, rows * columns),
                Just(columns),
                Just(bits),
            )
        })
    }

    proptest! {
        #[test]
        fn packs_as_the_definition_says((codes, columns, bits) in matrices()) {
            let packed = pack_rows(&codes, columns, bits);
            prop_assert_eq!(&packed, &pack_slowly(&codes, columns, bits));
            prop_assert_eq!(packed.len(), codes.len() / columns * words(columns, bits));
            prop_assert_eq!(unpack_rows(&packed, columns, bits), codes);
        }

        #[test]
        fn bytes_round_trip(words in prop::collection::vec(any::<u32>(), 0..50)) {
            prop_assert_eq!(from_bytes(&to_bytes(words.clone())), words);
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

    #[test]
    fn known_words() {
        let check = |codes: &[u8], bits, expect: &[u32]| {
            assert_eq!(pack_rows(codes, codes.len(), bits), expect, "{bits} bit");
        };
        check(&[1, 2, 3, 4, 5, 6, 7, 8], 4, &[0x8765_4321]);
        check(&[0x11, 0x22, 0x33, 0xff, 0xaa], 8, &[0xff33_2211, 0xaa]);
        check(&[3, 0, 1, 2], 2, &[0b10_01_00_11]);
        check(&[7; 32], 3, &[u32::MAX; 3]);
        // Code 10 starts at bit 30: two bits in word 0, one in word 1.
        let mut codes = [0; 32];
        codes[10] = 0b101;
        check(&codes, 3, &[0b01 << 30, 0b1, 0]);
    }
}
