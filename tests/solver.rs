//! The solver against textbook GPTQ, and the promises of each step.

use crate::reference::{self, random};
use proptest::prelude::*;
use quantflow::error::Result;
use quantflow::memory::Room;
use quantflow::numerics::factor::{self, ColumnOrder, Factor, Factoring};
use quantflow::numerics::panels::{Panels, Shape};
use quantflow::numerics::solver::{GptqOptions, SolvedRows, gptq, round_to_nearest};
use quantflow::numerics::{Grid, ScaleDtype};
use std::sync::Arc;

const PLAIN: GptqOptions = GptqOptions {
    match_original: 0.0,
    refine_rounds: 0,
};
/// Two ways to the same f64 sum.
const RELATIVE: f64 = 1e-9;
/// The energy is summed over outputs in single precision: 2^-24 an operation, with errors that partly cancel.
const SINGLE: f64 = 1e-6;

struct Layer {
    width: usize,
    weights: Vec<f32>,
    gram: Vec<f64>,
    cross: Vec<f64>,
}

/// Correlated activations, a few loud channels, and an original stream close to them.
fn layer(width: usize, rows: usize, tokens: usize, seed: u64) -> Layer {
    let mut random = random(seed);
    let mut x = vec![0.0; tokens * width];
    for row in x.chunks_exact_mut(width) {
        let shared = random();
        for (i, value) in row.iter_mut().enumerate() {
            *value = (random() + 0.7 * shared) * if i % 11 == 3 { 6.0 } else { 1.0 };
        }
    }
    let original: Vec<f64> = x.iter().map(|v| v + 0.2 * random()).collect();
    let product = |left: &[f64]| -> Vec<f64> {
        (0..width * width)
            .map(|k| {
                (0..tokens)
                    .map(|t| left[t * width + k / width] * x[t * width + k % width])
                    .sum()
            })
            .collect()
    };
    Layer {
        width,
        gram: product(&x),
        cross: product(&original),
        weights: (0..rows * width).map(|_| random() as f32 * 0.3).collect(),
    }
}

/// Panels of a whole matrix.
fn panels(square: &[f64], shape: Shape) -> Panels {
    let width = square.len().isqrt();
    let stored = |row: usize, values: &mut [f64]| {
        let first = if shape == Shape::Upper {
            width - values.len()
        } else {
            0
        };
        values.copy_from_slice(&square[row * width + first..][..values.len()]);
    };
    Panels::from_rows(width, shape, &Room::Memory, stored).unwrap()
}

/// The factor of `gram`, its Hessian kept.
fn factored(gram: &[f64], cross: Option<&[f64]>, damp: f64, order: ColumnOrder) -> Result<Factor> {
    let gram = panels(gram, Shape::Upper);
    let shift = cross.map(|cross| Arc::new(factor::shift(panels(cross, Shape::Full), &gram)));
    // A scratch file, and one thread or two: neither changes anything.
    let folder = tempfile::tempdir().unwrap();
    let wide = gram.width() > 64;
    let room = match wide {
        true => Room::Scratch(folder.path().into()),
        false => Room::Memory,
    };
    let how = Factoring {
        damp_percent: damp,
        column_order: order,
        room: &room,
        threads: 1 + usize::from(wide),
    };
    let factor = Factor::new("model.layers.3.mlp.down_proj", &gram, shift, how)?;
    Ok(factor.with_gram(Arc::new(gram.into_full(&room)?)))
}

/// The damped Hessian, `[width, width]`.
fn hessian(factor: &Factor) -> Vec<f64> {
    let (gram, width) = (factor.gram.as_ref().unwrap(), factor.width());
    let damped = |k: usize| match k / width == k % width {
        true => gram.at(k / width, k / width) + factor.damping[k / width],
        false => gram.at(k / width, k % width),
    };
    (0..width * width).map(damped).collect()
}

/// Six panels: more than are factored together.
#[test]
fn a_wide_factor_is_one_and_the_same_in_files_and_by_any_threads() {
    let (width, tokens) = (1100, 300);
    let mut random = random(7);
    let x: Vec<f64> = (0..tokens * width).map(|_| random()).collect();
    let x = faer::MatRef::from_row_major_slice(&x, tokens, width);
    let product = x.transpose() * x;
    let square: Vec<f64> = (0..width * width)
        .map(|k| product[(k / width, k % width)])
        .collect();
    let gram = panels(&square, Shape::Upper);
    let folder = tempfile::tempdir().unwrap();
    let factor = |room: &Room, threads| {
        let how = Factoring {
            damp_percent: 0.01,
            column_order: ColumnOrder::Static,
            room,
            threads,
        };
        Factor::new("down", &gram, None, how).unwrap()
    };
    let one = factor(&Room::Memory, 1);
    let files = Room::Scratch(folder.path().into());
    for (room, threads) in [(&files, 1), (&files, 3), (&Room::Memory, 2)] {
        assert!(
            factor(room, threads).lower == one.lower,
            "{room:?}, {threads} threads"
        );
    }
    // L Lᵀ is the damped matrix, in the factor's order.
    let at = |i: usize, j: usize| if j <= i { one.lower.at(i, j) } else { 0.0 };
    let lower = faer::Mat::from_fn(width, width, at);
    let back = &lower * lower.transpose();
    let scale = square[0];
    for (i, j) in (0..width).flat_map(|i| (0..=i).map(move |j| (i, j))) {
        let (row, column) = (one.column(i), one.column(j));
        let damping = if i == j { one.damping[row] } else { 0.0 };
        let expected = square[row * width + column] + damping;
        assert!(
            (back[(i, j)] - expected).abs() <= 1e-12 * scale * tokens as f64,
            "{i} {j}"
        );
    }
}

fn grid(bits: u32, group_size: usize, symmetric: bool) -> Grid {
    Grid {
        bits,
        group_size,
        symmetric,
        scale_dtype: ScaleDtype::Bf16,
    }
}

fn errors(layer: &Layer, solved: &SolvedRows) -> Vec<f64> {
    let values = solved.weight.dequantize();
    layer
        .weights
        .iter()
        .zip(values)
        .map(|(&w, q)| f64::from(w) - f64::from(q))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn codes_are_those_of_textbook_gptq(
        groups in 1usize..5, group in prop::sample::select(vec![16usize, 32]), rows in 1usize..12,
        bits in prop::sample::select(vec![2u32, 3, 4, 8]), symmetric: bool, ordered: bool, seed in 0u64..10_000,
    ) {
        let layer = layer(groups * group, rows, 3 * groups * group, seed);
        let order = if ordered { ColumnOrder::Static } else { ColumnOrder::None };
        let factor = factored(&layer.gram, None, 0.01, order).unwrap();
        let grid = grid(bits, group, symmetric);
        let solved = gptq(&layer.weights, &factor, grid, PLAIN);
        let weights: Vec<f64> = layer.weights.iter().map(|&w| f64::from(w)).collect();
        let groups = layer.width / group;
        let codes = reference::gptq(&weights, &hessian(&factor), &factor.order, f64::from(grid.max_code()), |row, column| {
            let at = row * groups + column / group;
            (f64::from(solved.weight.scales[at]), f64::from(solved.weight.zeros[at]))
        });
        let ours: Vec<f64> = solved.weight.unpacked().into_iter().map(f64::from).collect();
        prop_assert_eq!(ours, codes);
        // The reported error is the damped loss of these codes; the energy that of the weights.
        let loss = reference::loss(&errors(&layer, &solved), &hessian(&factor), layer.width);
        prop_assert!((solved.error - loss).abs() <= RELATIVE * loss.max(solved.energy), "{} {loss}", solved.error);
        let energy = reference::loss(&weights, &hessian(&factor), layer.width);
        prop_assert!((solved.energy - energy).abs() <= SINGLE * energy);
    }

    #[test]
    fn refinement_never_raises_the_loss_and_reports_it(
        seed in 0u64..10_000, bits in prop::sample::select(vec![2u32, 3, 4]), symmetric: bool, rounds in 1usize..4,
    ) {
        let layer = layer(96, 9, 300, seed);
        let factor = factored(&layer.gram, None, 0.01, ColumnOrder::Static).unwrap();
        let grid = grid(bits, 32, symmetric);
        let plain = gptq(&layer.weights, &factor, grid, PLAIN);
        let refined = gptq(&layer.weights, &factor, grid, GptqOptions { refine_rounds: rounds, ..PLAIN });
        let loss = reference::loss(&errors(&layer, &refined), &hessian(&factor), layer.width);
        prop_assert!((refined.error - loss).abs() <= 1e-6 * loss, "{} {loss}", refined.error);
        prop_assert!(refined.error <= plain.error * (1.0 + RELATIVE), "{} {}", refined.error, plain.error);
    }

    #[test]
    fn rows_do_not_interact(seed in 0u64..10_000, cut in 1usize..7) {
        let layer = layer(64, 8, 200, seed);
        let factor = factored(&layer.gram, Some(&layer.cross), 0.01, ColumnOrder::Static).unwrap();
        let options = GptqOptions { match_original: 0.5, refine_rounds: 0 };
        let solve = |weights: &[f32]| gptq(weights, &factor, grid(4, 32, false), options).weight;
        let whole = solve(&layer.weights);
        let (top, bottom) = layer.weights.split_at(cut * 64);
        let parts = [solve(top), solve(bottom)];
        prop_assert_eq!(whole.codes, [&parts[0].codes[..], &parts[1].codes].concat());
        prop_assert_eq!(whole.scales, [&parts[0].scales[..], &parts[1].scales].concat());
    }

    #[test]
    fn target_is_the_closed_form(seed in 0u64..10_000, alpha in 0.1f64..1.0) {
        let layer = layer(24, 3, 90, seed);
        let n = layer.width;
        let factor = factored(&layer.gram, Some(&layer.cross), 0.01, ColumnOrder::Static).unwrap();
        let transposed: Vec<f64> = (0..n * 3).map(|k| f64::from(layer.weights[k % 3 * n + k / 3])).collect();
        let ours = factor.target(&transposed, alpha);
        // W* = W [(1 − α) H + α M + λI] H_d⁻¹
        let lambda = hessian(&factor)[0] - layer.gram[0];
        let middle: Vec<f64> = (0..n * n)
            .map(|k| (1.0 - alpha) * layer.gram[k] + alpha * layer.cross[k] + if k / n == k % n { lambda } else { 0.0 })
            .collect();
        let inverse = reference::invert(&hessian(&factor), n);
        for row in 0..3 {
            let w: Vec<f64> = layer.weights[row * n..][..n].iter().map(|&v| f64::from(v)).collect();
            let times = |v: &[f64], m: &[f64]| -> Vec<f64> {
                (0..n).map(|j| (0..n).map(|i| v[i] * m[i * n + j]).sum()).collect()
            };
            let want = times(&times(&w, &middle), &inverse);
            for i in 0..n {
                prop_assert!((ours[i * 3 + row] - want[i]).abs() < 1e-8, "{} {}", ours[i * 3 + row], want[i]);
            }
        }
    }
}

#[test]
fn gptq_loses_less_than_rounding_and_matching_less_toward_the_original() {
    let layer = layer(128, 32, 500, 7);
    let factor = factored(&layer.gram, Some(&layer.cross), 0.01, ColumnOrder::Static).unwrap();
    let grid = grid(3, 32, true);
    let loss = |solved: &SolvedRows| reference::loss(&errors(&layer, solved), &hessian(&factor), 128);
    let (rounded, solved) = (
        round_to_nearest(&layer.weights, 128, grid),
        gptq(&layer.weights, &factor, grid, PLAIN),
    );
    assert!(
        loss(&solved) < 0.7 * loss(&rounded),
        "{} {}",
        loss(&solved),
        loss(&rounded)
    );
}

#[test]
fn a_dead_channel_is_rounded_plainly_and_a_singular_hessian_is_damped() {
    let mut layer = layer(32, 4, 100, 3);
    for k in 0..32 {
        layer.gram[5 * 32 + k] = 0.0;
        layer.gram[k * 32 + 5] = 0.0;
    }
    let factor = factored(&layer.gram, None, 0.01, ColumnOrder::Static).unwrap();
    assert_eq!(factor.dead, 1);
    let solved = gptq(&layer.weights, &factor, grid(4, 32, true), PLAIN).weight;
    for row in 0..4 {
        let (w, s) = (layer.weights[row * 32 + 5], solved.scales[row]);
        let plain = (f64::from(w) / f64::from(s) + 8.0)
            .round_ties_even()
            .clamp(0.0, 15.0);
        assert_eq!(f64::from(solved.unpacked()[row * 32 + 5]), plain);
    }
    // Rank one, no damping asked for: retries are counted, and it ends well.
    let rank_one: Vec<f64> = (0..16).map(|k| ((k / 4 + 1) * (k % 4 + 1)) as f64).collect();
    let factor = factored(&rank_one, None, 0.0, ColumnOrder::None).unwrap();
    assert!(factor.retries > 0 && factor.damp_percent > 0.0);
    let error = factored(&[f64::NAN; 16], None, 0.01, ColumnOrder::None);
    assert!(error.unwrap_err().to_string().contains("down_proj"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn output_error_is_the_error_of_the_outputs(rows in 1usize..9, width in 1usize..20, tokens in 1usize..30, seed in 0u64..1000) {
        let random = |n: usize, salt: u64| -> Vec<f64> {
            let mut state = seed * 31 + salt;
            (0..n).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
            }).collect()
        };
        let (w, q, x) = (random(rows * width, 1), random(rows * width, 2), random(tokens * width, 3));
        let narrow = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
        let (w, q) = (narrow(&w), narrow(&q));
        let mut hessian = vec![0.0; width * width];
        for token in x.chunks_exact(width) {
            for i in 0..width {
                for j in 0..width {
                    hessian[i * width + j] += token[i] * token[j];
                }
            }
        }
        let (mut lost, mut energy) = (0.0, 0.0);
        for token in x.chunks_exact(width) {
            for (w, q) in w.chunks_exact(width).zip(q.chunks_exact(width)) {
                let out = |values: &[f32]| -> f64 { values.iter().zip(token).map(|(&v, t)| f64::from(v) * t).sum() };
                lost += (out(w) - out(q)).powi(2);
                energy += out(w).powi(2);
            }
        }
        let (found_lost, found_energy) = quantflow::numerics::solver::output_error(&w, &q, &panels(&hessian, Shape::Upper));
        prop_assert!((found_lost - lost).abs() <= 1e-9 * (1.0 + lost));
        prop_assert!((found_energy - energy).abs() <= 1e-9 * (1.0 + energy));
    }
}
