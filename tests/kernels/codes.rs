//! Packed codes and their values.

use super::{Arg, KINDS, number, of, run, to, widened};
use crate::reference::random;
use proptest::prelude::*;
use quantflow::numerics::{Grid, QuantizedWeight, ScaleDtype, bits};

proptest! {
    #[test]
    fn codes_are_packed_as_on_the_cpu(bits in prop::sample::select(&bits::WIDTHS[..]), rows in 1usize..40, columns in 1usize..150, seed in 0u64..1000) {
        let mut random = random(seed);
        let codes: Vec<u8> = (0..rows * columns).map(|_| ((random() + 1.0) * 127.9) as u8 & ((1u32 << bits) - 1) as u8).collect();
        let by_column: Vec<f64> = (0..codes.len()).map(|i| f64::from(codes[i % rows * columns + i / rows])).collect();
        let words = bits::words(columns, bits);
        let mut packed = vec![u32::MAX; rows * words];
        let args = [to(&mut packed), of(&by_column), number(words), Arg::U32(bits), number(columns), number(rows)];
        run("pack", (rows, words), 32, &args);
        prop_assert_eq!(packed, bits::pack_rows(&codes, columns, bits));
    }

    #[test]
    fn weights_are_those_of_their_codes(bits in prop::sample::select(&bits::WIDTHS[..]), rows in 1usize..4, groups in 1usize..4, seed in 0u64..1000) {
        let mut random = random(seed);
        let (group_size, columns) = (32, 32 * groups);
        let grid = Grid { bits, group_size, symmetric: false, scale_dtype: ScaleDtype::F32 };
        let mut code = || ((random() + 1.0) * 127.9) as u8 & grid.max_code();
        let codes: Vec<u8> = (0..rows * columns).map(|_| code()).collect();
        let codes = bits::pack_rows(&codes, columns, bits);
        let zeros = (0..rows * groups).map(|_| code()).collect();
        let scales = (0..rows * groups).map(|i| 0.01 + i as f32 * 0.003).collect();
        let weight = QuantizedWeight { grid, rows, columns, codes, scales, zeros };
        for (kind, round) in KINDS {
            let mut out = vec![0u32; rows * columns];
            let args = [
                to(&mut out), of(&weight.codes), of(&weight.scales), of(&weight.zeros), number(columns), number(group_size),
                number(bits::words(columns, bits)), Arg::U32(bits), Arg::I32(kind),
            ];
            run("dequantize", (rows * 32, columns / 32), 32, &args);
            let expected: Vec<f32> = weight.dequantize().into_iter().map(round).collect();
            prop_assert_eq!(widened(kind, &out, rows * columns), expected);
        }
    }
}
