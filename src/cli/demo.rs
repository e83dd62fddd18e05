//! `demo`: the shipped tiny multimodal model, quantized with text alone, before and after.

use super::arguments::{DemoArguments, workers};
use super::text::{bytes, seconds};
use super::{Outcome, print_json, progress};
use crate::calibration::{self, Source};
use crate::error::{Error, IoContext, Result};
use crate::operators::Halt;
use crate::pipelines::evaluate::{Evaluation, evaluate};
use crate::pipelines::job::Job;
use crate::pipelines::quantize::quantize;
use crate::recipe::{Method, Recipe};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The tiny model was trained on sequences of this length.
const LENGTH: usize = 256;

pub(super) fn run(arguments: &DemoArguments, halt: &Arc<Halt>) -> Result<Outcome> {
    let shipped = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-vl");
    let folder = arguments.model.clone().unwrap_or_else(shipped);
    let model = folder.join("model");
    if !model.is_dir() {
        return Err(Error::invalid(
            model.display().to_string(),
            "is not there",
            "run the demo from a clone of the repository, or point --model at its tests/fixtures/tiny-vl",
        ));
    }
    let temporary = tempfile::tempdir().context("create a folder in", &std::env::temp_dir())?;
    let output = |name: &str| -> PathBuf {
        arguments
            .output
            .clone()
            .map_or_else(|| temporary.path().join(name), |output| output.join(name))
    };
    let vocab_size = super::inputs::vocab_size(&model)?;
    let source = Source {
        names: vec![folder.join("data/text_calib.jsonl").display().to_string()],
        samples: 128,
        length: LENGTH,
        ..Source::default()
    };
    let calibration = calibration::load(&source, &model, vocab_size)?;
    let mut table = Vec::new();
    let mut shown = Vec::new();
    for (name, method) in [("round-to-nearest", Method::Rtn), ("quantflow", Method::Gptq)] {
        let recipe = Recipe {
            bits: arguments.bits,
            group_size: 64,
            method,
            ..Recipe::default()
        };
        let job = Job {
            calibration: calibration.clone(),
            workers: workers(None)?,
            fresh: true,
            ..Job::new(model.clone(), output(name), recipe)
        };
        let observer = progress::observer(false);
        let summary = quantize(&job, &observer, halt)?;
        let windows =
            calibration::read_texts(&folder.join("data/text_eval.jsonl"), &model, LENGTH, vocab_size)?;
        let evaluation = Evaluation {
            model: job.output.clone(),
            reference: model.clone(),
            windows,
            workers: job.workers,
            placement: job.placement.clone(),
        };
        let scores = evaluate(evaluation, &observer, halt)?;
        table.push(format!(
            "{name:<18} {:>9} {:>11.3} {:>9.4} {:>8.2} % {:>9}",
            bytes(summary.output_bytes),
            scores.perplexity,
            scores.kl_mean,
            scores.top1_agreement * 100.0,
            seconds(summary.elapsed_seconds)
        ));
        shown.push((name, summary, scores));
    }
    if arguments.json {
        let rows: Vec<_> = shown.iter().map(|(name, summary, scores)| serde_json::json!({"name": name, "quantize": summary, "evaluate": scores})).collect();
        print_json(&rows)?;
        return Ok(Outcome::Fine);
    }
    let (_, summary, scores) = &shown[0];
    println!(
        "\ntiny Qwen3-VL, {}-bit text tower, vision tower untouched, calibrated with {} tokens of text\n",
        arguments.bits, calibration.usage.tokens_used
    );
    println!(
        "{:<18} {:>9} {:>11} {:>9} {:>10} {:>9}",
        "", "size", "perplexity", "mean KL", "top-1", "time"
    );
    println!(
        "{:<18} {:>9} {:>11.3} {:>9} {:>10} {:>9}",
        "original",
        bytes(summary.source_bytes),
        scores.reference_perplexity,
        "0",
        "100.00 %",
        ""
    );
    table.iter().for_each(|line| println!("{line}"));
    println!(
        "\non {} held-out positions. Next: quantflow quantize MODEL -o OUT --calibration TEXT.jsonl",
        scores.tokens
    );
    Ok(Outcome::Fine)
}
