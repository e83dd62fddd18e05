//! Dense little-endian bit streams of small codes in 32-bit words.
//!
//! Element `i` of a row occupies the bits `[i * bits, (i + 1) * bits)` of the row's stream, least significant first, and word
//! `w` holds the bits `[32 * w, 32 * w + 32)`. Where `bits` divides 32 no code crosses a word; 3-bit codes do, 32 of them
//! filling exactly 3 words. compressed-tensors (`compressors/pack_quantized/helpers.py`, 0.20) and GPTQ (GPTQModel 7.7,
//! `nn_modules/qlinear`) both store it, and differ in what they transpose afterwards.

use rayon::prelude::*;

/// Widths that [`pack_rows`] and [`unpack_rows`] take.
pub const WIDTHS: [u32; 4] = [2, 3, 4, 8];

/// Words that hold `codes` codes of `bits` bits; the last one is filled up with zeros.
pub const fn words(codes: usize, bits: u32) -> usize {
    (codes / 32) * bits as usize + ((codes % 32) * bits as usize).div_ceil(32)
}

/// Packs every row of `codes` (`[rows, columns]`, each below `2^bits`) into [`words`]`(columns, bits)` words.
pub fn pack_rows(codes: &[u8], columns: usize, bits: u32) -> Vec<u32> {
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
        .for_each(|(words, codes)| pack_row(codes.iter().copied(), bits, words));
    packed
}

/// Inverse of [`pack_rows`]: the first `columns` codes of every row of `words(columns, bits)` words.
pub fn unpack_rows(packed: &[u32], columns: usize, bits: u32) -> Vec<u8> {
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

/// Packs one row into its words.
pub(super) fn pack_row(codes: impl IntoIterator<Item = u8>, bits: u32, words: &mut [u32]) {
    let (mut stream, mut filled, mut words) = (0u64, 0, words.iter_mut());
    for code in codes {
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

/// The first codes of a row of words.
#[inline(always)]
pub(super) fn unpack_row(words: &[u32], bits: u32, codes: &mut [u8]) {
    match bits {
        2 => unpack_whole::<2>(words, codes),
        4 => unpack_whole::<4>(words, codes),
        8 => unpack_whole::<8>(words, codes),
        _ => unpack_stream(words, bits, codes),
    }
}

/// Where no code crosses a word.
#[inline(always)]
fn unpack_whole<const BITS: u32>(words: &[u32], codes: &mut [u8]) {
    for (codes, &word) in codes.chunks_mut((32 / BITS) as usize).zip(words) {
        for (k, code) in codes.iter_mut().enumerate() {
            *code = (word >> (k as u32 * BITS)) as u8 & (u8::MAX >> (8 - BITS));
        }
    }
}

fn unpack_stream(words: &[u32], bits: u32, codes: &mut [u8]) {
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
