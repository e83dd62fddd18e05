//! What runs on a device, run on the CPU: each program against the CPU's own kernels, and whole runs.

use crate::mixtures;
use crate::quantize::{StopAfter, job, run};
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use quantflow::device::{Placement, attention, factor, solver, sums};
use quantflow::error::Error;
use quantflow::memory::Room;
use quantflow::numerics::attention::{AttentionShape, attention as attention_kernel};
use quantflow::numerics::factor::{ColumnOrder, Factor, Factoring, shift};
use quantflow::numerics::solver::{GptqOptions, SolvedRows, gptq, output_error, round_to_nearest};
use quantflow::numerics::{Grid, ScaleDtype};
use quantflow::operators::Halt;
use quantflow::pipelines::quantize::{Job, quantize};
use quantflow::pipelines::verify::verify;
use quantflow::recipe::{Method, Recipe};
use quantflow::report::Observer;
use quantflow::statistics::{Accumulator, Exponents, Product, SiteStatistics};
use std::sync::Arc;

/// Two ways to the same f64 sum.
const RELATIVE: f64 = 1e-9;
/// The energy is summed in single precision.
const SINGLE: f64 = 1e-5;

fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 / (1u64 << 52) as f64 - 1.0) as f32
    }
}

fn tensor(values: &[f32], width: usize) -> Tensor {
    Tensor::from_slice(values, (values.len() / width, width), &Device::Cpu).unwrap()
}

/// Whole numbers, so that every product is exact whatever its order.
#[test]
fn sums_are_those_of_the_cpu_and_are_taken_away_again() {
    // More than a panel of either kind.
    for width in [5, 300, 1100] {
        let mut random = random(width as u64);
        let mut input =
            |tokens: usize| -> Vec<f32> { (0..tokens * width).map(|_| (random() * 8.0).round()).collect() };
        let (a, b, original) = (input(7), input(4), input(7));
        let exponents = Exponents::from_probe(&a, width);
        let products = [Product::Gram, Product::Cross, Product::Sum, Product::HeldOut];
        let zeros = SiteStatistics::new(exponents.clone(), &products, &Room::Memory).unwrap();
        let host = Accumulator::from(zeros.clone());
        for precision in [DType::F32, DType::BF16] {
            let sums = sums::Sums::new(exponents.clone(), &products, precision, &Device::Cpu).unwrap();
            let [x, y, matched] = [&a, &b, &original].map(|values| tensor(values, width));
            sums.add(&x, Some(&matched), 3).unwrap();
            sums.add_held_out(&y, 2).unwrap();
            if precision == DType::F32 {
                host.add(&a, Some(&original), 3).unwrap();
                host.add_held_out(&b, 2).unwrap();
            }
            let statistics = sums.to_statistics(&Room::Memory).unwrap();
            let back = sums::Sums::from_statistics(&statistics, precision, &Device::Cpu).unwrap();
            assert_eq!(back.to_statistics(&Room::Memory).unwrap(), statistics);
            assert_ne!(statistics, zeros);
            sums.add(&x, Some(&matched), -3).unwrap();
            sums.add_held_out(&y, -2).unwrap();
            assert_eq!(sums.to_statistics(&Room::Memory).unwrap(), zeros);
            // Again, for the comparison with the CPU's.
            sums.add(&x, Some(&matched), 3).unwrap();
            sums.add_held_out(&y, 2).unwrap();
            sums.check().unwrap();
            let (kept, expected) = (sums.to_statistics(&Room::Memory).unwrap(), &statistics);
            assert_eq!(&kept, expected);
        }
        let host = host.finish().unwrap();
        let sums = sums::Sums::from_statistics(&host, DType::F32, &Device::Cpu).unwrap();
        let fresh = sums::Sums::new(exponents, &products, DType::BF16, &Device::Cpu).unwrap();
        fresh
            .add(&tensor(&a, width), Some(&tensor(&original, width)), 3)
            .unwrap();
        fresh.add_held_out(&tensor(&b, width), 2).unwrap();
        for product in products {
            let values = |sums: &sums::Sums| {
                let sums = sums.product(product).unwrap().to_vec2::<i64>().unwrap();
                // Below the diagonal nothing is promised.
                let below = |(row, values): (usize, Vec<i64>)| match product {
                    Product::Gram | Product::HeldOut => values[row..].to_vec(),
                    Product::Cross | Product::Sum => values,
                };
                sums.into_iter().enumerate().map(below).collect::<Vec<_>>()
            };
            assert_eq!(values(&fresh), values(&sums), "{product:?} of {width}");
        }
    }
}

#[test]
fn what_cannot_be_summed_is_an_error() {
    let x = [1.0, f32::NAN, 2.0, 3.0];
    let exponents = Exponents::from_probe(&[1.0, 1.0, 2.0, 3.0], 2);
    let sums = sums::Sums::new(exponents, &[Product::Gram], DType::F32, &Device::Cpu).unwrap();
    let error = sums.add(&tensor(&x, 2), None, 1).unwrap_err().to_string();
    assert!(error.contains("not finite"), "{error}");
    assert!(sums.add(&tensor(&x, 2), None, 1 << 20).is_err());
}

/// The same sums for both: correlated inputs with a few loud channels, and an original close to them.
fn statistics(width: usize, seed: u64) -> SiteStatistics {
    let (mut random, tokens) = (random(seed), 3 * width);
    let mut x = vec![0.0; tokens * width];
    for row in x.chunks_exact_mut(width) {
        let shared = random();
        for (i, value) in row.iter_mut().enumerate() {
            *value = (random() + 0.7 * shared) * if i % 11 == 3 { 6.0 } else { 1.0 };
        }
    }
    let original: Vec<f32> = x.iter().map(|value| value + 0.2 * random()).collect();
    let products = [Product::Gram, Product::Cross, Product::HeldOut];
    let zeros = SiteStatistics::new(Exponents::from_probe(&x, width), &products, &Room::Memory).unwrap();
    let sums = Accumulator::from(zeros);
    sums.add(&x, Some(&original), 1).unwrap();
    sums.add_held_out(&original, 1).unwrap();
    sums.finish().unwrap()
}

/// Codes may differ where a target lies within rounding errors of the middle of two grid points; nothing else may.
fn assert_same(ours: &SolvedRows, expected: &SolvedRows) {
    let (a, b) = (&ours.weight, &expected.weight);
    assert_eq!((a.grid, a.rows, a.columns), (b.grid, b.rows, b.columns));
    let different = a.codes.iter().zip(&b.codes).filter(|(a, b)| a != b).count();
    assert_eq!(different, 0, "of {} codes", a.codes.len());
    assert_eq!((&a.scales, &a.zeros), (&b.scales, &b.zeros));
    assert_eq!(ours.clipped, expected.clipped);
    let near = |a: f64, b: f64, tolerance: f64| (a - b).abs() <= tolerance * expected.energy;
    assert!(
        near(ours.error, expected.error, RELATIVE),
        "{} {}",
        ours.error,
        expected.error
    );
    assert!(
        near(ours.energy, expected.energy, SINGLE),
        "{} {}",
        ours.energy,
        expected.energy
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn codes_are_those_of_the_cpu(
        groups in 1usize..7, group in prop::sample::select(vec![16usize, 32]), rows in 1usize..12,
        bits in prop::sample::select(vec![2u32, 3, 4, 8]), symmetric: bool, ordered: bool, seed in 0u64..10_000,
        rounds in 0usize..3, alpha in prop::sample::select(vec![0.0, 0.5, 1.0]),
        scale_dtype in prop::sample::select(vec![ScaleDtype::Bf16, ScaleDtype::F16, ScaleDtype::F32]),
    ) {
        let width = groups * group;
        let summed = statistics(width, seed);
        let column_order = if ordered { ColumnOrder::Static } else { ColumnOrder::None };
        let grid = Grid { bits, group_size: group, symmetric, scale_dtype };
        let options = GptqOptions { match_original: alpha, refine_rounds: rounds };
        let mut random = random(seed + 1);
        let weights: Vec<f32> = (0..rows * width).map(|_| random() * 0.3).collect();
        let on_device = tensor(&weights, width);

        let sums = sums::Sums::from_statistics(&summed, DType::F32, &Device::Cpu).unwrap();
        let products = summed.into_products();
        let gram = products.gram.unwrap().into_full(&Room::Memory).unwrap();
        let shift = products.cross.map(|cross| Arc::new(shift(cross, &gram)));
        let gram = Arc::new(gram);
        let how = Factoring { damp_percent: 0.01, column_order, room: &Room::Memory, threads: 1 };
        let expected = Factor::new("site", &gram, shift, how).unwrap().with_gram(Arc::clone(&gram));
        let expected = gptq(&weights, &expected, grid, options);
        let factor = factor::Factor::new("site", &sums, 0.01, column_order, rounds > 0).unwrap();
        let ours = solver::gptq(&on_device, &factor, grid, options).unwrap();
        assert_same(&ours, &expected);

        let values = ours.weight.dequantize();
        let expected = output_error(&weights, &values, &products.held_out.unwrap());
        let held_out = factor::held_out(&sums).unwrap().unwrap();
        let ours = solver::output_error(&on_device, &ours.weight, &held_out).unwrap();
        for (ours, theirs) in [(ours.0, expected.0), (ours.1, expected.1)] {
            prop_assert!((ours - theirs).abs() <= RELATIVE * expected.1, "{ours} {theirs}");
        }
        assert_same(&solver::round_to_nearest(&on_device, grid).unwrap(), &round_to_nearest(&weights, width, grid));
    }

    #[test]
    fn attention_is_that_of_the_cpu(
        length in 1usize..40, sequences in 1usize..3, kv_heads in 1usize..3, share in 1usize..4, value_dim in 4usize..10,
        window in proptest::option::of(1usize..30), softcap in proptest::option::of(5f32..50.0), seed in 0u64..1000, sunk: bool,
        precision in prop::sample::select(vec![DType::F32, DType::BF16, DType::F16]),
    ) {
        let head_dim = 8;
        let heads = kv_heads * share;
        let shape = AttentionShape { length, heads, kv_heads, head_dim, value_dim, scale: 0.6, softcap, window };
        let mut random = random(seed);
        // Values that every precision has.
        let mut input = |width: usize| -> Vec<f32> {
            (0..sequences * length * width).map(|_| (random() * 64.0).round() / 64.0).collect()
        };
        let (q, k, v) = (input(heads * head_dim), input(kv_heads * head_dim), input(kv_heads * value_dim));
        let sinks: Vec<f32> = input(heads)[..heads].to_vec();
        let sinks = sunk.then_some(&sinks[..]);
        let expected = attention_kernel(&q, &k, &v, sinks, shape);
        let [q, k, v] = [(&q, heads * head_dim), (&k, kv_heads * head_dim), (&v, kv_heads * value_dim)].map(|(x, w)| tensor(x, w));
        let ours = attention::attention(&q, &k, &v, sinks, shape, precision).unwrap();
        let ours = ours.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        // Probabilities, which add up to 1, are rounded to 8 or 11 bits.
        let tolerance = match precision { DType::F32 => 1e-5, DType::BF16 => 4e-3, _ => 5e-4 };
        prop_assert_eq!(ours.len(), expected.len());
        for (ours, theirs) in ours.iter().zip(&expected) {
            prop_assert!((ours - theirs).abs() <= tolerance, "{ours} {theirs}");
        }
    }
}

/// A run as on a device.
fn on_device(job: Job) -> Job {
    Job {
        placement: Placement::cpu_as_device(),
        ..job
    }
}

#[test]
fn a_run_is_as_good_as_on_the_cpu_and_always_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for (name, recipe) in [
        (
            "matched",
            Recipe {
                group_size: 64,
                ..Recipe::default()
            },
        ),
        (
            "plain",
            Recipe {
                group_size: 64,
                match_original: 0.0,
                bits: 3,
                ..Recipe::default()
            },
        ),
        (
            "rounded",
            Recipe {
                group_size: 64,
                method: Method::Rtn,
                ..Recipe::default()
            },
        ),
    ] {
        let at = |kind: &str| folder.path().join(format!("{name}-{kind}"));
        let job = |kind: &str| Job {
            recipe: recipe.clone(),
            ..job(&at(kind))
        };
        let cpu = run(&job("cpu")).unwrap();
        let whole = run(&on_device(job("whole"))).unwrap();
        let found = verify(&at("whole"), &job("whole").model).unwrap();
        assert_eq!(found.problems, Vec::<String>::new());
        let ratio = whole.relative_error_mean / cpu.relative_error_mean;
        assert!((0.97..1.03).contains(&ratio), "{name}: {ratio}");
        assert!(whole.plan_peak_device_bytes > 0 && cpu.plan_peak_device_bytes == 0);

        // With no room for activations on the device.
        let least = Job {
            device_memory: Some(1),
            ..on_device(job("least"))
        };
        let hint = run(&least).unwrap_err().hint().unwrap();
        let smallest = hint
            .split_whitespace()
            .find_map(|word| word.parse().ok())
            .unwrap();
        let least = Job {
            device_memory: Some(smallest),
            ..least
        };
        assert_eq!(run(&least).unwrap().output_digest, whole.output_digest, "{name}");

        // Broken off and continued; the CPU does not continue it.
        let halt = Arc::new(Halt::default());
        let stop: Arc<dyn Observer> = Arc::new(StopAfter {
            left: 9.into(),
            halt: Arc::clone(&halt),
        });
        let broken = quantize(&on_device(job("parts")), &stop, &halt);
        assert!(matches!(broken, Err(Error::Interrupted)), "{name}");
        assert!(run(&job("parts")).is_err());
        let continued = run(&on_device(job("parts"))).unwrap();
        assert!(continued.resumed_blocks > 0 || name == "rounded");
        assert_eq!(continued.output_digest, whole.output_digest, "{name}");
    }
}

#[test]
fn mixtures_and_latent_attention_run_on_a_device() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["qwen3_moe", "deepseek_v3", "gpt_oss"] {
        let job = |kind: &str| Job {
            calibration: mixtures::text(64, 24, 1),
            ..Job::new(
                mixtures::model(name),
                folder.path().join(format!("{name}-{kind}")),
                mixtures::recipe(name, 0.5),
            )
        };
        let (cpu, device) = (run(&job("cpu")).unwrap(), run(&on_device(job("device"))).unwrap());
        assert_eq!(cpu.linears, device.linears);
        let ratio = device.relative_error_mean / cpu.relative_error_mean;
        assert!((0.95..1.05).contains(&ratio), "{name}: {ratio}");
    }
}
