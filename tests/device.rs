//! What runs on a device: each program against the CPU's own kernels, and whole runs. All of it runs on the CPU, operation for operation, and
//! again on a CUDA device where this build and this machine have one.

mod artifacts;
mod groups;

use crate::mixtures;
use crate::quantize::{calibrate, job, named_budget, run};
use crate::reference;
use crate::watch::Watch;
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use quantflow::device::codes::dequantize;
use quantflow::device::{DeviceChoice, Placement, attention, factor, solver, sums};
use quantflow::error::Error;
use quantflow::memory::Room;
use quantflow::model::ops;
use quantflow::numerics::attention::{AttentionShape, attention as attention_kernel};
use quantflow::numerics::factor::{ColumnOrder, Factor, Factoring, shift};
use quantflow::numerics::predict::predicted_loss;
use quantflow::numerics::solver::{GptqOptions, SolvedRows, gptq, output_error, round_to_nearest};
use quantflow::numerics::{Grid, QuantizedWeight, ScaleDtype, bits};
use quantflow::pipelines::job::Job;
use quantflow::pipelines::quantize::quantize;
use quantflow::pipelines::verify::verify;
use quantflow::recipe::{Method, Recipe};
use quantflow::statistics::{Accumulator, Exponents, Product, SiteStatistics};
use std::sync::Arc;

/// The CPU as a device, and the first CUDA device.
fn placements() -> Vec<Placement> {
    let cuda = Placement::open(DeviceChoice::Cuda(0));
    if let Err(why) = &cuda {
        eprintln!("SKIPPED on a CUDA device: {why}");
    }
    [Placement::cpu_as_device()].into_iter().chain(cuda).collect()
}

/// Two ways to the same f64 sum.
const RELATIVE: f64 = 1e-9;
/// The energy is summed in single precision.
const SINGLE: f64 = 1e-5;

fn random(seed: u64) -> impl FnMut() -> f32 {
    let mut random = reference::random(seed);
    move || random() as f32
}

fn tensor(values: &[f32], width: usize, device: &Device) -> Tensor {
    Tensor::from_slice(values, (values.len() / width, width), device).unwrap()
}

/// The same sums; names the first that is not.
fn assert_sums(ours: &SiteStatistics, expected: &SiteStatistics) {
    assert_eq!(ours.tokens(), expected.tokens());
    for (a, b) in ours.panels().iter().zip(expected.panels()) {
        let different = (a.sums.read().iter())
            .zip(&*b.sums.read())
            .position(|(a, b)| a != b);
        let place = different.map(|at| (at / ours.columns(a), at % ours.columns(a)));
        assert_eq!(place, None, "{:?} from row {}", a.product, a.first_row);
    }
    assert!(ours == expected);
}

/// Whole numbers, so that every product is exact whatever its order.
#[test]
fn sums_are_those_of_the_cpu_and_are_taken_away_again() {
    let products = [Product::Gram, Product::Cross, Product::Sum, Product::HeldOut];
    // More than a panel of either kind.
    for (placement, width) in placements()
        .iter()
        .flat_map(|p| [5, 300, 1100].map(|width| (p, width)))
    {
        let device = &placement.device;
        let mut random = random(width as u64);
        let mut input =
            |tokens: usize| -> Vec<f32> { (0..tokens * width).map(|_| (random() * 8.0).round()).collect() };
        let (a, b, original) = (input(7), input(4), input(7));
        let exponents = Exponents::from_probe(&a, width);
        let zeros = SiteStatistics::new(exponents.clone(), &products, &Room::Memory).unwrap();
        let host = Accumulator::from(zeros.clone());
        host.add(&a, Some(&original), 3).unwrap();
        host.add_held_out(&b, 2).unwrap();
        let host = host.finish().unwrap();
        assert_ne!(host, zeros);
        for precision in [DType::F32, DType::BF16] {
            let sums = sums::Sums::new(exponents.clone(), &products, precision, device).unwrap();
            let [x, y, matched] = [&a, &b, &original].map(|values| tensor(values, width, device));
            sums.add(&x, Some(&matched), 3).unwrap();
            sums.add_held_out(&y, 2).unwrap();
            sums.check().unwrap();
            assert_sums(&sums.to_statistics(&Room::Memory).unwrap(), &host);
            let back = sums::Sums::from_statistics(&host, precision, device).unwrap();
            assert_sums(&back.to_statistics(&Room::Memory).unwrap(), &host);
            sums.add(&x, Some(&matched), -3).unwrap();
            sums.add_held_out(&y, -2).unwrap();
            assert_sums(&sums.to_statistics(&Room::Memory).unwrap(), &zeros);
        }
    }
}

/// More than one side of a grid has.
#[test]
fn rows_may_be_many() {
    let (rows, columns) = (70_000, 32);
    let grid = Grid {
        bits: 4,
        group_size: columns,
        symmetric: false,
        scale_dtype: ScaleDtype::F32,
    };
    let of_row = |factor: usize| (0..rows).map(move |row| row * factor % 13);
    let weight = QuantizedWeight {
        grid,
        rows,
        columns,
        codes: (0..rows * bits::words(columns, 4))
            .map(|i| i as u32 * 2_654_435_761)
            .collect(),
        scales: of_row(5).map(|scale| scale as f32 + 1.0).collect(),
        zeros: of_row(3).map(|zero| zero as u8).collect(),
    };
    let expected = weight.dequantize();
    for Placement { device, .. } in placements() {
        let values = dequantize(&weight, DType::F32, &device).unwrap();
        assert!(values.flatten_all().unwrap().to_vec1::<f32>().unwrap() == expected);
        // Added to twice as many rows, to every other one.
        let sum = Tensor::zeros((2 * rows, columns), DType::F32, &device).unwrap();
        let tokens = Tensor::arange_step(0u32, 2 * rows as u32, 2, &device).unwrap();
        let gates = Tensor::full(-0.5f32, rows, &device).unwrap();
        ops::add_gated_rows(&sum, &values, &tokens, &gates).unwrap();
        let sum = sum.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (two, row) in sum.chunks(2 * columns).zip(expected.chunks(columns)) {
            let added: Vec<f32> = row.iter().map(|value| -0.5 * value).collect();
            assert!(two[..columns] == added && two[columns..] == vec![0.0; columns]);
        }
    }
}

#[test]
fn what_cannot_be_summed_is_an_error() {
    for Placement { device, .. } in placements() {
        let x = tensor(&[1.0, f32::NAN, 2.0, 3.0], 2, &device);
        let exponents = Exponents::from_probe(&[1.0, 1.0, 2.0, 3.0], 2);
        let sums = sums::Sums::new(exponents, &[Product::Gram], DType::F32, &device).unwrap();
        let error = sums.add(&x, None, 1).and_then(|()| sums.check()).unwrap_err();
        assert!(error.to_string().contains("not finite"), "{error}");
        assert!(sums.add(&x, None, 1 << 20).is_err());
    }
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
    let (codes, wanted) = (a.unpacked(), b.unpacked());
    let different = codes.iter().zip(&wanted).filter(|(a, b)| a != b).count();
    assert_eq!(different, 0, "of {} codes", codes.len());
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

/// Codes, losses and errors of random weights are those of the CPU's kernels.
fn assert_codes(
    (rows, width): (usize, usize),
    grid: Grid,
    options: GptqOptions,
    column_order: ColumnOrder,
    seed: u64,
) {
    let summed = statistics(width, seed);
    let mut random = random(seed + 1);
    let weights: Vec<f32> = (0..rows * width).map(|_| random() * 0.3).collect();
    let on_devices: Vec<_> = (placements().into_iter())
        .map(|placement| {
            let sums = sums::Sums::from_statistics(&summed, DType::F32, &placement.device).unwrap();
            (tensor(&weights, width, &placement.device), sums)
        })
        .collect();
    let products = summed.into_products();
    let gram = products.gram.unwrap().into_full(&Room::Memory).unwrap();
    let shift = products.cross.map(|cross| Arc::new(shift(cross, &gram)));
    let gram = Arc::new(gram);
    let how = Factoring {
        damp_percent: 0.01,
        column_order,
        room: &Room::Memory,
        threads: 1,
    };
    let expected = Factor::new("site", &gram, shift, how)
        .unwrap()
        .with_gram(Arc::clone(&gram));
    let predicted = predicted_loss(&weights, &expected.importance(), grid);
    let expected = gptq(&weights, &expected, grid, options);
    let held_out = products.held_out.unwrap();
    for (on_device, sums) in on_devices {
        let refined = options.refine_rounds > 0;
        let factors = factor::Factor::by_damping("site", &sums, [0.01], column_order, refined);
        let factor = factors.unwrap().remove(0);
        let ours = solver::gptq(&on_device, &factor, grid, options).unwrap();
        let rows = ours.to_rows().unwrap();
        assert_same(&rows, &expected);
        let loss = solver::predicted_loss(&on_device, &factor.importance().unwrap(), grid).unwrap();
        assert!(
            (loss - predicted).abs() <= RELATIVE * predicted,
            "{loss} {predicted}"
        );
        let values = rows.weight.dequantize();
        let expected = output_error(&weights, &values, &held_out);
        let held_out = factor::held_out(&sums).unwrap().unwrap();
        let ours = solver::output_error(&on_device, &ours, &held_out).unwrap();
        for (ours, theirs) in [(ours.0, expected.0), (ours.1, expected.1)] {
            assert!((ours - theirs).abs() <= RELATIVE * expected.1, "{ours} {theirs}");
        }
        let rounded = solver::round_to_nearest(&on_device, grid).unwrap();
        assert_same(
            &rounded.to_rows().unwrap(),
            &round_to_nearest(&weights, width, grid),
        );
    }
}

/// Panels are as the properties below never have them: several, and the last one not whole.
#[test]
fn codes_of_several_panels_are_those_of_the_cpu() {
    let grid = Grid {
        bits: 4,
        group_size: 32,
        symmetric: false,
        scale_dtype: ScaleDtype::Bf16,
    };
    for (match_original, refine_rounds) in [(0.0, 0), (0.5, 1)] {
        let options = GptqOptions {
            match_original,
            refine_rounds,
        };
        assert_codes((5, 2 * 960 + 64), grid, options, ColumnOrder::Static, 7);
    }
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
        let column_order = if ordered { ColumnOrder::Static } else { ColumnOrder::None };
        let grid = Grid { bits, group_size: group, symmetric, scale_dtype };
        let options = GptqOptions { match_original: alpha, refine_rounds: rounds };
        assert_codes((rows, groups * group), grid, options, column_order, seed);
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
        // Probabilities, which add up to 1, are rounded to 8 or 11 bits.
        let tolerance = match precision { DType::F32 => 1e-5, DType::BF16 => 4e-3, _ => 5e-4 };
        for Placement { device, .. } in placements() {
            let inputs = [(&q, heads * head_dim), (&k, kv_heads * head_dim), (&v, kv_heads * value_dim)];
            let [q, k, v] = inputs.map(|(values, width)| tensor(values, width, &device));
            let ours = attention::attention(&q, &k, &v, sinks, shape, precision).unwrap();
            let ours = ours.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            prop_assert_eq!(ours.len(), expected.len());
            for (ours, theirs) in ours.iter().zip(&expected) {
                prop_assert!((ours - theirs).abs() <= tolerance, "{ours} {theirs}");
            }
        }
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
        let cpu = Job {
            recipe: recipe.clone(),
            ..job(&folder.path().join(format!("{name}-cpu")))
        };
        let expected = run(&cpu).unwrap();
        for (index, placement) in placements().into_iter().enumerate() {
            let at = |kind: &str| folder.path().join(format!("{name}-{index}-{kind}"));
            let job = |kind: &str| Job {
                output: at(kind),
                placement: placement.clone(),
                ..cpu.clone()
            };
            let whole = run(&job("whole")).unwrap();
            let found = verify(&at("whole"), &cpu.model).unwrap();
            assert_eq!(found.problems, Vec::<String>::new());
            let ratio = whole.relative_error_mean / expected.relative_error_mean;
            assert!((0.97..1.03).contains(&ratio), "{name}: {ratio}");
            assert!(whole.plan_peak_device_bytes > 0 && expected.plan_peak_device_bytes == 0);

            // With no room for activations on the device: an MLP's inner ones are made twice.
            let tight = |kind: &str| Job {
                device_memory: smallest(&job(kind)),
                ..job(kind)
            };
            let least = run(&tight("least")).unwrap();
            assert_eq!(least.output_digest, whole.output_digest, "{name}");

            // Broken off and continued; the CPU does not continue it.
            let broken = Watch::until(|seen| seen.linears > 9)
                .over(|observer, halt| quantize(&job("parts"), observer, halt));
            assert!(matches!(broken, Err(Error::Interrupted)), "{name}");
            assert!(
                run(&Job {
                    placement: Placement::cpu(),
                    ..job("parts")
                })
                .is_err()
            );
            let continued = run(&tight("parts")).unwrap();
            assert!(continued.resumed_blocks > 0 || name == "rounded");
            assert_eq!(continued.output_digest, whole.output_digest, "{name}");
        }
    }
}

/// The smallest `--device-memory` of a job, as the refusal of less tells it.
fn smallest(job: &Job) -> Option<u64> {
    let refused = run(&Job {
        device_memory: Some(1),
        ..job.clone()
    });
    Some(named_budget(&refused.unwrap_err()))
}

/// Where the device has room for all activations, the probe's among them, or the memory has: no file can be made in this scratch folder.
#[test]
#[cfg(target_os = "linux")]
fn activations_stay_where_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    for (index, placement) in placements().into_iter().enumerate() {
        // Batches of more tokens than the probe.
        let job = |name: &str| Job {
            placement: placement.clone(),
            calibration: calibrate(4, 1024),
            scratch: Some("/proc".into()),
            ..job(&folder.path().join(format!("{index}-{name}")))
        };
        let whole = run(&job("device")).unwrap();
        let in_memory = Job {
            device_memory: smallest(&job("memory")),
            ..job("memory")
        };
        assert_eq!(run(&in_memory).unwrap().output_digest, whole.output_digest);
        let fit = in_memory.fit(&in_memory.plan().unwrap().1).unwrap();
        // Neither on the device nor in memory.
        let error = run(&Job {
            memory: Some((fit.peak_host_bytes - fit.resident_activation_bytes) * 10 / 9 + 64),
            output: folder.path().join(format!("{index}-nowhere")),
            ..in_memory
        });
        assert!(error.is_err_and(|error| error.to_string().contains("scratch")));
    }
}

#[test]
fn mixtures_and_latent_attention_run_on_a_device() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["qwen3_moe", "deepseek_v3", "gpt_oss"] {
        let job = |kind: &str, placement: &Placement| Job {
            calibration: mixtures::text(64, 24, 1),
            placement: placement.clone(),
            ..Job::new(
                mixtures::model(name),
                folder.path().join(format!("{name}-{kind}")),
                mixtures::recipe(name, 0.5),
            )
        };
        let cpu = run(&job("cpu", &Placement::cpu())).unwrap();
        for (index, placement) in placements().iter().enumerate() {
            let device = run(&job(&index.to_string(), placement)).unwrap();
            assert_eq!(cpu.linears, device.linears);
            let ratio = device.relative_error_mean / cpu.relative_error_mean;
            assert!((0.95..1.05).contains(&ratio), "{name}: {ratio}");
            let least = run(&Job {
                device_memory: smallest(&job("least", placement)),
                ..job(&format!("{index}-least"), placement)
            })
            .unwrap();
            assert_eq!(least.output_digest, device.output_digest, "{name}");
        }
    }
}
