//! Scales and codes.

use super::{Arg, number, of, run, to};
use crate::reference::random;
use proptest::prelude::*;
use quantflow::memory::Room;
use quantflow::numerics::factor::{ColumnOrder, Factor, Factoring};
use quantflow::numerics::panels::{Panels, Shape};
use quantflow::numerics::scales::search;
use quantflow::numerics::solver::{GptqOptions, gptq, round_to_nearest};
use quantflow::numerics::{Grid, QuantizedWeight, ScaleDtype};

/// As in src/device/solver.rs.
const BLOCK: usize = 64;

fn kind(dtype: ScaleDtype) -> Arg {
    Arg::I32(match dtype {
        ScaleDtype::F32 => 0,
        ScaleDtype::Bf16 => 1,
        ScaleDtype::F16 => 2,
    })
}

fn grids() -> impl Strategy<Value = Grid> {
    let (bits, sizes) = (vec![2u32, 3, 4, 8], vec![16usize, 32]);
    let dtypes = vec![ScaleDtype::Bf16, ScaleDtype::F16, ScaleDtype::F32];
    let parts = (
        prop::sample::select(bits),
        prop::sample::select(sizes),
        any::<bool>(),
        prop::sample::select(dtypes),
    );
    parts.prop_map(|(bits, group_size, symmetric, scale_dtype)| Grid {
        bits,
        group_size,
        symmetric,
        scale_dtype,
    })
}

fn transposed(weights: &[f32], width: usize) -> Vec<f64> {
    let lanes = weights.len() / width;
    (0..weights.len())
        .map(|i| f64::from(weights[i % lanes * width + i / lanes]))
        .collect()
}

/// Scales, then zero points, `[groups, lanes]` each.
fn searched(target: &[f64], importance: &[f64], grid: Grid) -> Vec<f64> {
    let (lanes, groups) = (
        target.len() / importance.len(),
        importance.len() / grid.group_size,
    );
    let mut scales = vec![0.0; 2 * groups * lanes];
    let args = [
        to(&mut scales),
        of(target),
        of(importance),
        Arg::U32(grid.symmetric.into()),
        kind(grid.scale_dtype),
        number(importance.len()),
        number(lanes),
        number(grid.group_size),
        Arg::F64(f64::from(grid.max_code())),
    ];
    run("search", (lanes, groups), 32, &args);
    scales
}

/// Codes of a solved weight as `[width, lanes]`.
fn codes_of(weight: &QuantizedWeight) -> Vec<f64> {
    let codes: Vec<f32> = weight.unpacked().into_iter().map(f32::from).collect();
    transposed(&codes, weight.columns)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn scales_and_plain_codes_are_those_of_the_cpu(grid in grids(), groups in 1usize..4, lanes in 1usize..40, seed in 0u64..1000) {
        let mut random = random(seed);
        let width = groups * grid.group_size;
        let weights: Vec<f32> = (0..lanes * width).map(|_| (random() * 0.3) as f32).collect();
        let importance: Vec<f64> = (0..width).map(|_| random().abs() + 0.01).collect();
        let target = transposed(&weights, width);
        let expected = search(&target, lanes, &importance, grid);
        let expected: Vec<f64> = expected.scale.into_iter().chain(expected.zero).collect();
        prop_assert_eq!(searched(&target, &importance, grid), expected);

        let scales = searched(&target, &vec![1.0; width], grid);
        let mut state = vec![0.0; (width + 3) * lanes];
        let args = [
            to(&mut state), of(&target), of(&scales), number(width), number(lanes), number(grid.group_size),
            Arg::F64(f64::from(grid.max_code())),
        ];
        run("round_plainly", (lanes, 1), 32, &args);
        let expected = round_to_nearest(&weights, width, grid);
        let by_lane = (0..lanes * groups).map(|i| scales[i % groups * lanes + i / groups] as f32);
        prop_assert_eq!(by_lane.collect::<Vec<_>>(), &expected.weight.scales[..]);
        prop_assert_eq!(&state[..width * lanes], &codes_of(&expected.weight)[..]);
        let tally = |row: usize| state[(width + row) * lanes..][..lanes].iter().sum::<f64>();
        prop_assert!((tally(0) - expected.error).abs() <= 1e-9 * expected.energy);
        prop_assert!((tally(1) - expected.energy).abs() <= 1e-9 * expected.energy);
        prop_assert_eq!(tally(2), expected.clipped as f64);
    }

    /// Block by block, with what earlier columns feed to a block summed here.
    #[test]
    fn swept_codes_are_those_of_the_cpu(grid in grids(), groups in 1usize..6, lanes in 1usize..70, ordered: bool, seed in 0u64..1000) {
        let mut random = random(seed);
        let width = groups * grid.group_size;
        let weights: Vec<f32> = (0..lanes * width).map(|_| (random() * 0.3) as f32).collect();
        let x: Vec<f64> = (0..2 * width * width).map(|i| random() * if i % width % 11 == 3 { 6.0 } else { 1.0 }).collect();
        let gram = Panels::from_rows(width, Shape::Upper, &Room::Memory, |row, values| {
            let first = width - values.len();
            for (k, value) in values.iter_mut().enumerate() {
                *value = x.chunks_exact(width).map(|x| x[row] * x[first + k]).sum();
            }
        }).unwrap();
        let column_order = if ordered { ColumnOrder::Static } else { ColumnOrder::None };
        let how = Factoring { damp_percent: 0.01, column_order, room: &Room::Memory, threads: 1 };
        let factor = Factor::new("site", &gram, None, how).unwrap();
        let expected = gptq(&weights, &factor, grid, GptqOptions { match_original: 0.0, refine_rounds: 0 });

        let lower: Vec<f64> = (0..width * width)
            .map(|i| if i % width <= i / width { factor.lower.at(i / width, i % width) } else { 0.0 })
            .collect();
        let columns: Vec<u32> = (0..width).map(|row| factor.column(row) as u32).collect();
        let original = transposed(&weights, width);
        let scales = searched(&original, &factor.importance(), grid);
        let mut state = original;
        state.resize((2 * width + 2) * lanes, 0.0);
        for begin in (0..width).step_by(BLOCK).rev() {
            let rows = BLOCK.min(width - begin);
            let carried: Vec<f64> = (0..rows * lanes).map(|i| {
                (begin + rows..width).map(|row| state[(width + row) * lanes + i % lanes] * lower[row * width + begin + i / lanes]).sum()
            }).collect();
            let block: Vec<f64> = (0..rows * rows).map(|i| lower[(begin + i / rows) * width + begin + i % rows]).collect();
            let args = [
                to(&mut state), of(&carried), of(&block), of(&scales), of(&columns), number(begin), number(rows), number(width),
                number(lanes), number(grid.group_size), Arg::F64(f64::from(grid.max_code())),
            ];
            run("sweep", (lanes, 1), 64, &args);
        }
        prop_assert_eq!(&state[..width * lanes], codes_of(&expected.weight));
        let tally = |row: usize| state[(2 * width + row) * lanes..][..lanes].iter().sum::<f64>();
        prop_assert!((tally(0) - expected.error).abs() <= 1e-9 * expected.energy);
        prop_assert_eq!(tally(1), expected.clipped as f64);
    }

    /// The gradient of the later columns of the block sees each move at once.
    #[test]
    fn each_code_goes_to_its_conditional_minimum(grid in grids(), lanes in 1usize..70, begin in 0usize..40, rows in 1usize..=BLOCK, seed in 0u64..1000) {
        let mut random = random(seed);
        let width = (begin + rows).next_multiple_of(grid.group_size);
        let half: Vec<f64> = (0..width * width).map(|_| random()).collect();
        let hessian: Vec<f64> = (0..width * width).map(|i| half[i] + half[i % width * width + i / width]).collect();
        let damping: Vec<f64> = (0..width).map(|_| 20.0 + random()).collect();
        let weights: Vec<f64> = (0..width * lanes).map(|_| random() * 0.3).collect();
        let scales = searched(&weights, &vec![1.0; width], grid);
        let gradient: Vec<f64> = (0..rows * lanes).map(|_| random()).collect();
        let max_code = f64::from(grid.max_code());
        let before: Vec<f64> = (0..2 * width * lanes).map(|i| (i % (grid.max_code() as usize + 1)) as f64).collect();
        let mut state = before.clone();
        let gram = &hessian[begin * width..][..rows * width];
        let args = [
            to(&mut state), of(&gradient), of(gram), of(&damping), of(&scales), number(begin), number(rows), number(width),
            number(lanes), number(grid.group_size), Arg::F64(max_code),
        ];
        run("descend", (lanes, 1), 64, &args);
        let groups = width / grid.group_size;
        let mut expected = before;
        for lane in 0..lanes {
            let mut slopes: Vec<f64> = (0..rows).map(|i| gradient[i * lanes + lane]).collect();
            for i in 0..rows {
                let column = begin + i;
                let g = column / grid.group_size;
                let (scale, zero) = (scales[g * lanes + lane], scales[(groups + g) * lanes + lane]);
                let code = expected[column * lanes + lane];
                let wanted = (code - zero) * scale + slopes[i] / (hessian[column * width + column] + damping[column]);
                let next = (wanted / scale + zero).round_ties_even().clamp(0.0, max_code);
                let step = (next - code) * scale;
                expected[column * lanes + lane] = next;
                expected[(width + column) * lanes + lane] = step;
                for (k, slope) in slopes.iter_mut().enumerate().skip(i + 1) {
                    *slope -= step * hessian[column * width + begin + k];
                }
            }
        }
        prop_assert_eq!(state, expected);
    }

    #[test]
    fn a_refitted_scale_lowers_the_error_or_stays(lanes in 1usize..70, dtype in prop::sample::select(vec![ScaleDtype::Bf16, ScaleDtype::F16, ScaleDtype::F32]), seed in 0u64..1000) {
        let mut random = random(seed);
        let before: Vec<f64> = (0..lanes).map(|_| dtype.round(random().abs() * 0.1)).collect();
        let slope: Vec<f64> = (0..lanes).map(|_| random()).collect();
        let curvature: Vec<f64> = (0..lanes).map(|_| random() * 20.0 + 10.0).collect();
        let mut scales = before.clone();
        run("refit", (lanes, 1), 32, &[to(&mut scales), of(&slope), of(&curvature), number(lanes), kind(dtype)]);
        for (lane, (&ours, &old)) in scales.iter().zip(&before).enumerate() {
            let change = |new: f64| curvature[lane] * (new - old).powi(2) - 2.0 * slope[lane] * (new - old);
            let wanted = old + slope[lane] / curvature[lane];
            let new = dtype.round(wanted);
            let moves = curvature[lane] > 0.0 && wanted > 0.0 && change(new) < 0.0;
            prop_assert_eq!(ours, if moves { new } else { old });
        }
    }
}
