//! The forward pass.

use super::{Arg, KINDS, number, of, run, to, widened};
use crate::reference::random;
use proptest::prelude::*;
use quantflow::numerics::elementwise;

type Gate = fn(&mut [f32], &[f32]);

#[test]
fn gates_are_those_of_the_cpu() {
    let gate: Vec<f32> = (-400..400).map(|i| i as f32 / 37.0).collect();
    let up: Vec<f32> = gate.iter().map(|v| 1.0 - v / 3.0).collect();
    let (alpha, limit) = (1.702, 2.5);
    let kernels: [Gate; 3] = [elementwise::silu_gate, elementwise::gelu_tanh_gate, |gate, up| {
        elementwise::clamped_swiglu_gate(gate, up, 1.702, 2.5);
    }];
    for (activation, kernel) in kernels.into_iter().enumerate() {
        let mut ours = gate.clone();
        let args = [
            to(&mut ours),
            of(&up),
            Arg::U64(gate.len() as u64),
            Arg::I32(activation as i32),
            Arg::F32(alpha),
            Arg::F32(limit),
        ];
        run("gated", (gate.len(), 1), 64, &args);
        let mut expected = gate.clone();
        kernel(&mut expected, &up);
        for (ours, expected) in ours.iter().zip(&expected) {
            assert!(
                (ours - expected).abs() <= 2e-6 * expected.abs().max(1.0),
                "{activation}: {ours} {expected}"
            );
        }
    }
}

#[test]
fn rows_are_added_where_they_belong() {
    let (width, tokens, gates) = (70, [4u32, 0, 2], [0.5f32, -2.0, 3.0]);
    let rows: Vec<f32> = (0..3 * width).map(|i| i as f32).collect();
    let mut out = vec![1f32; 5 * width];
    run(
        "add_gated_rows",
        (3 * 32, width.div_ceil(32)),
        32,
        &[to(&mut out), of(&rows), of(&tokens), of(&gates), number(width)],
    );
    for (i, value) in out.into_iter().enumerate() {
        let row = tokens.iter().position(|&token| token as usize == i / width);
        assert_eq!(
            value,
            1.0 + row.map_or(0.0, |row| gates[row] * rows[row * width + i % width])
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn probabilities_are_those_of_the_cpu(
        kv_heads in 1usize..3, share in 1usize..3, first in 0usize..20, queries in 1usize..5, window in 1usize..30, windowed: bool,
        softcap in proptest::option::of(5f32..50.0), sunk: bool, seed in 0u64..1000,
    ) {
        let window = if windowed { window } else { u32::MAX as usize };
        let (scale, rows) = (0.6, queries * share);
        let low = (first + 1).saturating_sub(window);
        let keys = first + queries - low;
        let mut random = random(seed);
        let scores: Vec<f32> = (0..kv_heads * rows * keys).map(|_| (random() * 20.0) as f32).collect();
        let sinks: Vec<f32> = (0..kv_heads * share).map(|_| random() as f32).collect();
        for (kind, round) in KINDS {
            let (mut out, mut work) = (vec![0u32; scores.len()], scores.clone());
            let sinks_of = if sunk { of(&sinks) } else { Arg::Pointer(std::ptr::null_mut()) };
            let args = [
                to(&mut out), to(&mut work), sinks_of, number(rows), number(keys), number(share), number(first), number(low),
                number(window), Arg::F32(scale), Arg::F32(softcap.unwrap_or(0.0)), Arg::I32(kind),
            ];
            run("softmax", (rows * 256, kv_heads), 256, &args);
            let out = widened(kind, &out, scores.len());
            for (i, (ours, row)) in out.chunks_exact(keys).zip(scores.chunks_exact(keys)).enumerate() {
                let (query, head) = (first + i % rows / share, i / rows * share + i % share);
                let seen = (query + 1).saturating_sub(window).max(low) - low..query + 1 - low;
                let mut expected = row.to_vec();
                elementwise::softmax(&mut expected[seen.clone()], scale, softcap, sunk.then(|| sinks[head]));
                for (key, (ours, expected)) in ours.iter().zip(expected).enumerate() {
                    let expected = if seen.contains(&key) { round(expected) } else { 0.0 };
                    // In f32 the soft cap's tanh has an error of 2^-23, which a cap of 50 multiplies, on either side; in 16 bits, a unit
                    // of the kind, where the two round to either side.
                    let tolerance = [1.2e-5, 2f32.powi(-7), 2f32.powi(-10)][kind as usize];
                    prop_assert!((ours - expected).abs() <= tolerance * expected.max(1e-3), "{ours} {expected}");
                }
            }
        }
    }
}
