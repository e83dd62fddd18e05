//! Several schemes solved from one artifact, and what each costs in size and quality: `solve` and, where windows are given, `evaluate`,
//! one scheme after another. No graph of its own.

use super::evaluate::{Evaluation, Scores, evaluate};
use super::folder::REPORT;
use super::job::{Job, Summary};
use super::resolve;
use crate::allocation::effective_bits;
use crate::calibration::Calibration;
use crate::error::{Error, IoContext, Result};
use crate::operators::Halt;
use crate::report::{Observer, Row};
use crate::storage;
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;

/// What to try.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// Model, statistics, resources, and what all schemes share; its output is the folder under which each has one.
    pub base: Job,
    /// Bit widths …
    pub bits: Vec<u32>,
    /// … and group sizes to try with each.
    pub group_sizes: Vec<usize>,
    /// Windows to compare each result on; none: sizes and errors alone.
    pub windows: Option<Calibration>,
    /// Outputs stay.
    pub keep: bool,
}

/// One scheme's size and quality.
#[derive(Clone, Debug, Serialize)]
pub struct Tried {
    /// Bits of a code.
    pub bits: u32,
    /// Inputs that share a scale; 0: one scale a row.
    pub group_size: usize,
    /// Bits a quantized weight, scales and zero points included.
    pub effective_bits: f64,
    /// Bytes of the output's tensors.
    pub output_bytes: u64,
    /// Mean over the linears.
    pub relative_error_mean: f64,
    /// The same on statistics that were kept apart, if there are some.
    pub held_out_error_mean: Option<f64>,
    /// Linears of which the report warns.
    pub fallbacks: usize,
    /// Wall clock of the solve.
    pub solve_seconds: f64,
    /// Comparison with the original.
    pub scores: Option<Scores>,
    /// Of the output's tensors.
    pub output_digest: String,
}

/// Tries every scheme; `tried` is told of each as it is done.
///
/// # Errors
/// As [`resolve::solve`] and [`evaluate`]; a scheme that the model cannot have is an error before the first is tried.
pub fn sweep(
    sweep: &Sweep,
    observer: &Arc<dyn Observer>,
    halt: &Arc<Halt>,
    mut tried: impl FnMut(&Tried),
) -> Result<Vec<Tried>> {
    let jobs: Vec<Job> = jobs(sweep);
    if jobs.is_empty() {
        return Err(Error::usage(
            "--bits",
            "there is no scheme to try",
            "name one or more, such as 4,3",
        ));
    }
    for job in &jobs {
        job.recipe.check()?;
        job.plan()?;
    }
    let mut all = Vec::with_capacity(jobs.len());
    for job in &jobs {
        let (_, plan) = job.plan()?;
        let summary = resolve::solve(job, observer, halt)?;
        let scores = sweep.windows.as_ref().map(|windows| {
            let job = Evaluation {
                model: job.output.clone(),
                reference: job.model.clone(),
                windows: windows.clone(),
                workers: job.workers,
                placement: job.placement.clone(),
            };
            evaluate(job, observer, halt)
        });
        let row = row(job, effective_bits(&plan), summary, scores.transpose()?)?;
        if !sweep.keep {
            storage::remove(&job.output)?;
        }
        tried(&row);
        all.push(row);
    }
    Ok(all)
}

fn jobs(sweep: &Sweep) -> Vec<Job> {
    let pairs = sweep
        .bits
        .iter()
        .flat_map(|&bits| sweep.group_sizes.iter().map(move |&size| (bits, size)));
    let job = |(bits, group_size): (u32, usize)| {
        let mut job = sweep.base.clone();
        job.output = sweep.base.output.join(format!("w{bits}-g{group_size}"));
        (job.recipe.bits, job.recipe.group_size) = (bits, group_size);
        job
    };
    pairs.map(job).collect()
}

fn row(job: &Job, effective_bits: f64, summary: Summary, scores: Option<Scores>) -> Result<Tried> {
    Ok(Tried {
        bits: job.recipe.bits,
        group_size: job.recipe.group_size,
        effective_bits,
        output_bytes: summary.output_bytes,
        relative_error_mean: summary.relative_error_mean,
        held_out_error_mean: held_out_error_mean(&job.output)?,
        fallbacks: summary.fallbacks,
        solve_seconds: summary.elapsed_seconds,
        scores,
        output_digest: summary.output_digest,
    })
}

/// Mean over an output's linears, where all have one.
fn held_out_error_mean(output: &Path) -> Result<Option<f64>> {
    let path = output.join(REPORT);
    let report = std::fs::read_to_string(&path).context("read", &path)?;
    let rows = report.lines().map(|line| {
        let row: Row = serde_json::from_str(line)
            .map_err(|error| Error::invalid(path.display().to_string(), error.to_string(), ""))?;
        Ok(row.held_out_error)
    });
    let errors: Option<Vec<f64>> = rows.collect::<Result<Vec<_>>>()?.into_iter().collect();
    Ok(errors
        .filter(|errors| !errors.is_empty())
        .map(|errors| errors.iter().sum::<f64>() / errors.len() as f64))
}
