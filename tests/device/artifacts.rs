//! Statistics that are collected on a device, what is solved from them there, and evaluations.

use super::placements;
use crate::quantize::{self, calibrate, run};
use crate::statistics::{job, run as update, sums, two_files};
use crate::watch::Watch;
use crate::{allocation, mixtures, reference};
use candle_core::Tensor;
use proptest::prelude::*;
use quantflow::artifact::Artifact;
use quantflow::calibration::Calibration;
use quantflow::device::{Placement, divergence};
use quantflow::numerics::divergence::compare;
use quantflow::pipelines::allocate::From;
use quantflow::pipelines::evaluate::{Evaluation, Scores, evaluate};
use quantflow::pipelines::job::Job as Solve;
use quantflow::pipelines::statistics::{self, Change, Job};
use quantflow::pipelines::verify::verify;
use quantflow::recipe::{Damping, Method, Recipe};
use quantflow::report::{Observer, Silent};
use std::path::Path;
use std::sync::Arc;

#[test]
fn sums_of_a_device_add_up_and_are_solved_there() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (a, b) = two_files(folder.path(), 20, 40);
    let collected = |name: &str, placement: &Placement| {
        let collect = Job {
            held_out: 0.2,
            placement: placement.clone(),
            ..job(Change::Collect, &at(name), &[&a, &b])
        };
        update(&collect).unwrap()
    };
    let solved = |name: &str, placement: &Placement| {
        let solve = Solve {
            statistics: Some(Arc::new(Artifact::open(&at(name)).unwrap())),
            placement: placement.clone(),
            workers: 2,
            ..Solve::new(
                job(Change::Add, &at(name), &[&a]).model,
                at(&format!("{name}-solved")),
                Recipe {
                    group_size: 64,
                    match_original: 0.0,
                    damp_percent: Damping::Auto,
                    ..Recipe::default()
                },
            )
        };
        let summary = run(&solve).unwrap();
        assert_eq!(
            verify(&solve.output, &solve.model).unwrap().problems,
            Vec::<String>::new()
        );
        summary
    };
    let cpu = collected("cpu", &Placement::cpu());
    let expected = solved("cpu", &Placement::cpu());
    assert_eq!(cpu.plan_peak_device_bytes, 0);
    for (index, placement) in placements().into_iter().enumerate() {
        let name = format!("whole-{index}");
        let whole = collected(&name, &placement);
        assert_eq!((whole.tokens, whole.batches), (cpu.tokens, cpu.batches));
        assert!(whole.plan_peak_device_bytes > 0);
        let ratio = solved(&name, &placement).relative_error_mean / expected.relative_error_mean;
        assert!((0.97..1.03).contains(&ratio), "{ratio}");

        // In two steps, the second broken off; then taken away again.
        let steps = at(&format!("steps-{index}"));
        let step = |change, files: &[&Path]| Job {
            held_out: 0.2,
            placement: placement.clone(),
            ..job(change, &steps, files)
        };
        let only_a = update(&step(Change::Collect, &[&a])).unwrap();
        // Of four sites a block.
        let pieces = 10 * (whole.batches - only_a.batches) as usize;
        let broken = Watch::until(move |seen| seen.pieces > pieces)
            .over(|observer, halt| statistics::update(&step(Change::Add, &[&b]), observer, halt));
        assert!(broken.is_err());
        let continued = update(&step(Change::Add, &[&b])).unwrap();
        assert!(continued.resumed_blocks > 0);
        assert_eq!(continued.digest, whole.digest);
        assert_eq!(sums(&steps), sums(&at(&name)));
        assert_eq!(
            update(&step(Change::Retract, &[&b])).unwrap().digest,
            only_a.digest
        );

        // The CPU rounds otherwise.
        let elsewhere = Job {
            placement: Placement::cpu(),
            ..step(Change::Add, &[&b])
        };
        let refused = update(&elsewhere).unwrap_err();
        assert!(refused.to_string().contains("another arithmetic"), "{refused}");
    }
}

#[test]
fn evaluations_are_those_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let model = |name: &str| match name {
        "dense" => quantize::job(folder.path()).model,
        mixture => mixtures::model(mixture),
    };
    for name in ["dense", "qwen3_moe", "deepseek_v3", "gpt_oss"] {
        let output = folder.path().join(name);
        let windows = match name {
            "dense" => calibrate(4, 128),
            mixture => mixtures::windows(mixture),
        };
        let recipe = Recipe {
            method: Method::Rtn,
            ..mixtures::recipe(name, 0.0)
        };
        run(&Solve::new(model(name), output.clone(), recipe)).unwrap();
        let scores = |placement: &Placement| scores(&output, &model(name), windows.clone(), placement);
        let cpu = scores(&Placement::cpu());
        assert!(cpu.kl_mean > 0.0 && cpu.peak_device_bytes == 0);
        for placement in placements() {
            let device = scores(&placement);
            assert_eq!(device.tokens, cpu.tokens);
            let near = |ours: f64, theirs: f64, relative: f64| (ours / theirs - 1.0).abs() < relative;
            assert!(
                near(device.perplexity, cpu.perplexity, 0.01),
                "{name}: {device:?} {cpu:?}"
            );
            assert!(
                near(device.reference_perplexity, cpu.reference_perplexity, 0.01),
                "{name}: {device:?} {cpu:?}"
            );
            assert!(
                near(device.kl_mean, cpu.kl_mean, 0.1),
                "{name}: {device:?} {cpu:?}"
            );
            assert_eq!(scores(&placement).kl_mean, device.kl_mean, "{name}");
        }
    }
}

/// From an artifact of the CPU, so that both choose from the same sums.
#[test]
fn bits_are_chosen_on_a_device() {
    let folder = tempfile::tempdir().unwrap();
    let average = 3.4;
    let chosen = |name: &str, placement: &Placement| {
        let job = Solve {
            placement: placement.clone(),
            ..allocation::job(&folder.path().join(name))
        };
        let windows = From::Windows(allocation::windows(2));
        let (summary, chosen) = allocation::allocated(&job, average, windows).unwrap();
        assert!(chosen.average_bits <= average && chosen.average_bits > average - 0.2);
        assert_eq!(
            verify(&job.output, &job.model).unwrap().problems,
            Vec::<String>::new()
        );
        (summary, chosen)
    };
    let (_, cpu) = chosen("cpu", &Placement::cpu());
    for (index, placement) in placements().into_iter().enumerate() {
        let (summary, device) = chosen(&index.to_string(), &placement);
        assert!(summary.plan_peak_device_bytes > 0);
        assert_eq!(device.positions, cpu.positions);
        let units = device.sensitivity.units.iter().zip(&cpu.sensitivity.units);
        for (ours, theirs) in units {
            assert_eq!(ours.linears, theirs.linears);
            for (ours, theirs) in ours.losses.values().zip(theirs.losses.values()) {
                assert!((ours - theirs).abs() <= 1e-9 * theirs, "{ours} {theirs}");
            }
            let pair = ours.kl.zip(theirs.kl);
            assert_eq!(pair.is_some(), theirs.kl.is_some());
            if let Some((ours, theirs)) = pair {
                // Inputs of 16 bits differ in both models by 2^-9 at most, which costs a position up to 3e-5 of its own.
                assert!((ours - theirs).abs() < 0.05 * theirs + 3e-5, "{ours} {theirs}");
            }
        }
        let ratio = device.predicted_kl / cpu.predicted_kl;
        assert!((0.9..1.1).contains(&ratio), "{ratio}");
    }
}

fn scores(model: &Path, reference: &Path, windows: Calibration, placement: &Placement) -> Scores {
    let job = Evaluation {
        model: model.to_owned(),
        reference: reference.to_owned(),
        windows,
        workers: 2,
        placement: placement.clone(),
    };
    let observer: Arc<dyn Observer> = Arc::new(Silent);
    evaluate(job, &observer, &Arc::default()).unwrap()
}

proptest! {
    #[test]
    fn divergences_are_those_of_the_cpu(
        positions in 1usize..9, vocabulary in 2usize..300, scale in 0.1f32..40.0, apart in 0f32..2.0, seed in 0u64..10_000,
    ) {
        let mut random = reference::random(seed);
        let theirs: Vec<f32> = (0..positions * vocabulary).map(|_| random() as f32 * scale).collect();
        let ours: Vec<f32> = theirs.iter().map(|value| value + random() as f32 * apart).collect();
        let targets: Vec<u32> = (0..positions).map(|i| (i * 7 % vocabulary) as u32).collect();
        let rows = theirs.chunks_exact(vocabulary).zip(ours.chunks_exact(vocabulary)).zip(&targets);
        let expected: Vec<_> = rows.map(|((r, m), &target)| compare(r, m, target as usize)).collect();
        for Placement { device, .. } in placements() {
            let tensor = |values: &[f32]| Tensor::from_slice(values, (positions, vocabulary), &device).unwrap();
            let found = divergence::compare(&tensor(&theirs), &tensor(&ours), &targets).unwrap();
            prop_assert_eq!(found.len(), positions);
            let outside = vec![vocabulary as u32; positions];
            prop_assert!(divergence::compare(&tensor(&theirs), &tensor(&ours), &outside).is_err());
            for (a, b) in found.iter().zip(&expected) {
                // The CPU's kernel takes exponentials in single precision.
                let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * (1.0 + f64::from(scale));
                prop_assert!(near(a.kl, b.kl) && near(a.nll, b.nll) && near(a.reference_nll, b.reference_nll), "{:?} {:?}", a, b);
                prop_assert_eq!(a.top1_equal, b.top1_equal);
            }
        }
    }
}
