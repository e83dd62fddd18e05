//! Mixtures of experts and latent attention through whole pipelines: quantized, verified, and evaluated against the original.

#![allow(clippy::disallowed_methods)] // made-up checkpoints are the point

mod command;
mod gptq;
mod statistics;

use crate::families::fixtures;
use crate::quantize::run;
use candle_core::{DType, Device};
use quantflow::calibration::{Calibration, batches};
use quantflow::device::Placement;
use quantflow::operators::Halt;
use quantflow::pipelines::evaluate::{Evaluation, Scores, evaluate, write_logits};
use quantflow::pipelines::folder::REPORT;
use quantflow::pipelines::job::Job;
use quantflow::pipelines::verify::verify;
use quantflow::recipe::{Method, Recipe, Scheme};
use quantflow::report::{Observer, Row, Silent};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const FAMILIES: [&str; 10] = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_vl_moe",
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_fp8",
    "deepseek_v3_w4",
    "gpt_oss",
];

pub(crate) fn model(name: &str) -> PathBuf {
    fixtures().join("families").join(name)
}

/// The tokens of a fixture's golden file.
pub(crate) fn windows(name: &str) -> Calibration {
    let golden =
        candle_core::safetensors::load(model(name).join("golden.safetensors"), &Device::Cpu).unwrap();
    let (_, length) = golden["tokens"].dims2().unwrap();
    let tokens = golden["tokens"].to_dtype(DType::U32).unwrap();
    let tokens: Vec<u32> = tokens.flatten_all().unwrap().to_vec1().unwrap();
    Calibration {
        batches: batches(&tokens, length),
        ..Calibration::default()
    }
}

/// Windows of pseudo-random tokens, none of which is special.
pub(crate) fn text(windows: usize, length: usize, seed: u64) -> Calibration {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let tokens: Vec<u32> = (0..windows * length)
        .map(|_| 3 + random.next_u32() % 117)
        .collect();
    Calibration {
        batches: batches(&tokens, length),
        ..Calibration::default()
    }
}

/// The rows of an output's report.
fn read_rows(output: &Path) -> Vec<Row> {
    let report = std::fs::read_to_string(output.join(REPORT)).unwrap();
    let lines = report.lines();
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// 4 bits a row, but 8 where a width does not hold whole words of 4-bit codes; gpt-oss without its experts.
pub(crate) fn recipe(name: &str, match_original: f64) -> Recipe {
    let uneven = match name {
        "mixtral" => Some(r"experts\..*w2$"),
        "qwen3_vl_moe" => Some(r"experts\..*down_proj$"),
        "deepseek_v2" | "deepseek_v3" | "deepseek_v3_fp8" | "deepseek_v3_w4" => Some("q_b_proj$"),
        _ => None,
    };
    let eight = |target: &str| Scheme {
        targets: vec![target.into()],
        bits: Some(8),
        ..Scheme::default()
    };
    Recipe {
        group_size: 0,
        match_original,
        ignore: (name == "gpt_oss")
            .then(|| r"mlp\.experts".into())
            .into_iter()
            .collect(),
        schemes: uneven.map(eight).into_iter().collect(),
        ..Recipe::default()
    }
}

/// Round to nearest, 8 bits, one scale a row.
pub(crate) fn rtn(model: &Path, output: &Path, workers: usize) -> Job {
    let recipe = Recipe {
        bits: 8,
        group_size: 0,
        method: Method::Rtn,
        ..Recipe::default()
    };
    Job {
        workers,
        ..Job::new(model.to_owned(), output.to_owned(), recipe)
    }
}

pub(crate) fn compare(model: &Path, reference: &Path, windows: Calibration, workers: usize) -> Scores {
    let job = Evaluation {
        model: model.to_owned(),
        reference: reference.to_owned(),
        windows,
        workers,
        placement: Placement::cpu(),
    };
    let observer: Arc<dyn Observer> = Arc::new(Silent);
    evaluate(job, &observer, &Arc::<Halt>::default()).unwrap()
}

#[test]
fn a_model_evaluates_as_itself() {
    for name in FAMILIES {
        let scores = compare(&model(name), &model(name), windows(name), 2);
        assert_eq!((scores.kl_mean, scores.top1_agreement), (0.0, 1.0), "{name}");
        assert!(scores.perplexity.is_finite());
    }
}

#[test]
fn rounded_to_nearest_verified_and_close() {
    let folder = tempfile::tempdir().unwrap();
    for name in FAMILIES.into_iter().filter(|name| *name != "gpt_oss") {
        let output = folder.path().join(name);
        let summary = run(&rtn(&model(name), &output, 2)).unwrap();
        let found = verify(&output, &model(name)).unwrap();
        assert_eq!(found.problems, Vec::<String>::new(), "{name}");
        assert_eq!(found.quantized, summary.linears, "{name}");
        let scores = compare(&output, &model(name), windows(name), 2);
        // Random weights route close calls another way now and then; a wrong layout would cost everything (about 3).
        assert!(
            scores.kl_mean > 0.0 && scores.kl_mean < 0.1,
            "{name}: {}",
            scores.kl_mean
        );

        let again = folder.path().join(format!("{name}-1"));
        let alone = run(&rtn(&model(name), &again, 1)).unwrap();
        assert_eq!(alone.output_digest, summary.output_digest, "{name}");
    }
}

#[test]
fn tensors_of_all_experts_are_quantized_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let error = run(&rtn(&model("gpt_oss"), &folder.path().join("rtn"), 1)).unwrap_err();
    assert!(error.to_string().contains("interleaved"), "{error}");
    let mut partly = rtn(&model("qwen3_vl_moe"), &folder.path().join("partly"), 1);
    partly.recipe.ignore.push(r"experts\.3\.".into());
    let error = run(&partly).unwrap_err();
    assert!(error.to_string().contains("unquantized"), "{error}");
}

#[test]
fn gpt_oss_keeps_its_experts_where_they_are_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let mut job = rtn(&model("gpt_oss"), &output, 2);
    job.recipe.ignore.push(r"mlp\.experts".into());
    let summary = run(&job).unwrap();
    assert_eq!(summary.linears, 3 * 4);
    assert_eq!(
        verify(&output, &model("gpt_oss")).unwrap().problems,
        Vec::<String>::new()
    );
    let scores = compare(&output, &model("gpt_oss"), windows("gpt_oss"), 1);
    assert!(scores.kl_mean > 0.0 && scores.kl_mean < 0.1, "{}", scores.kl_mean);
    write_logits(
        &output,
        &windows("gpt_oss"),
        &folder.path().join("logits.safetensors"),
    )
    .unwrap();
}
