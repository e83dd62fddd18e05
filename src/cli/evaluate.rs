//! `evaluate`, and the hidden `logits`.

use super::arguments::{EvaluateArguments, LogitsArguments, workers};
use super::inputs::{vocab_size, windows};
use super::text::{bytes, seconds};
use super::{Outcome, print_json, progress};
use crate::calibration;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::operators::Halt;
use crate::pipelines::evaluate::{Evaluation, evaluate, write_logits};
use std::sync::Arc;

pub(super) fn run(arguments: &EvaluateArguments, halt: &Arc<Halt>) -> Result<Outcome> {
    let windows = windows(&arguments.reference, &arguments.windows)?;
    let windows = windows
        .ok_or_else(|| Error::usage("--text", "is missing", "name a text file, or --tokens FILE.npy"))?;
    let job = Evaluation {
        model: arguments.model.clone(),
        reference: arguments.reference.clone(),
        windows,
        workers: workers(arguments.workers)?,
        placement: Placement::open(arguments.device)?,
    };
    let scores = evaluate(job, &progress::observer(false), halt)?;
    if arguments.json {
        print_json(&scores)?;
        return Ok(Outcome::Fine);
    }
    let error = scores
        .kl_standard_error
        .map(|e| format!(" ± {e:.4}"))
        .unwrap_or_default();
    println!("                  {:>10} {:>10}", "original", "quantized");
    println!(
        "perplexity        {:>10.3} {:>10.3}",
        scores.reference_perplexity, scores.perplexity
    );
    println!("mean KL           {:>21.4}{error}", scores.kl_mean);
    println!("99th percentile   {:>21.4}", scores.kl_p99);
    println!("top-1 agreement   {:>20.2} %", scores.top1_agreement * 100.0);
    println!(
        "on {} positions, in {}, {} peak",
        scores.tokens,
        seconds(scores.elapsed_seconds),
        bytes(scores.peak_host_bytes)
    );
    Ok(Outcome::Fine)
}

pub(super) fn logits(arguments: &LogitsArguments) -> Result<Outcome> {
    let windows = calibration::from_npy(&arguments.tokens, vocab_size(&arguments.model)?)?;
    write_logits(&arguments.model, &windows, &arguments.output)?;
    Ok(Outcome::Fine)
}
