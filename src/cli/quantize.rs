//! `quantize` and `plan`.

use super::arguments::{CalibrationArguments, FinishArguments, QuantizeArguments, SolveArguments};
use super::statistics::documents;
use super::text::{bytes, ranges, seconds};
use super::{Outcome, print_json, progress};
use crate::artifact::Artifact;
use crate::calibration::{self, Calibration, Source, Usage};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::model::{SiteKind, families};
use crate::operators::Halt;
use crate::pipelines::quantize::{Job, Summary, independent, quantize};
use crate::pipelines::resolve;
use crate::recipe::Method;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

pub(super) fn run(arguments: &QuantizeArguments, halt: &Arc<Halt>) -> Result<Outcome> {
    if arguments.output.is_none() {
        return Err(Error::usage(
            "--output",
            "is missing",
            "say where the quantized checkpoint goes: -o OUT",
        ));
    }
    let observer = progress::observer(!arguments.finish.json);
    let job = job(arguments)?;
    print_notes(&job.calibration.usage);
    let summary = match arguments.collects() {
        true => {
            let documents = documents(&arguments.calibration, &arguments.model)?;
            print_notes(&documents.usage);
            independent(&job, documents, &observer, halt)?
        }
        false => quantize(&job, &observer, halt)?,
    };
    tell(&job, &summary, &arguments.finish)
}

/// What the user should know of the calibration before the work begins.
pub(super) fn print_notes(usage: &Usage) {
    usage.notes.iter().for_each(|note| eprintln!("note: {note}"));
}

fn tell(job: &Job, summary: &Summary, flags: &FinishArguments) -> Result<Outcome> {
    if flags.json {
        print_json(summary)?;
    } else {
        print_summary(job, summary);
    }
    Ok(if summary.fallbacks > 0 && !flags.no_strict {
        Outcome::Warnings
    } else {
        Outcome::Fine
    })
}

pub(super) fn plan(arguments: &QuantizeArguments) -> Result<Outcome> {
    let job = job(arguments)?;
    let (tower, plan) = job.plan()?;
    let (peak, resident) = job.predict(&plan)?;
    let quantized: Vec<_> = plan
        .linears
        .iter()
        .filter(|linear| linear.grid.is_some())
        .collect();
    let output: u64 = plan.output.iter().map(|spec| spec.byte_len() as u64).sum();
    if arguments.finish.json {
        let linears: Vec<_> = quantized
            .iter()
            .map(|l| serde_json::json!({"name": l.name, "rows": l.rows, "columns": l.columns, "scheme": l.scheme(), "fallback": l.fallback}))
            .collect();
        print_json(&serde_json::json!({
            "architecture": tower.spec.architecture, "blocks": plan.blocks(), "linears": linears,
            "plan_peak_host_bytes": peak, "resident_activation_bytes": resident,
            "experts_per_step": plan.experts_per_step(), "output_bytes": output, "calibration_tokens": job.calibration.usage.tokens_used,
        }))?;
        return Ok(Outcome::Fine);
    }
    println!(
        "{}: {} blocks, {} linears to quantize",
        tower.spec.architecture,
        plan.blocks(),
        quantized.len()
    );
    // Linears that differ by their block, or by their expert, alone are one line.
    let mut kinds: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for linear in &plan.linears {
        let prefix = tower.block_prefix(linear.block);
        let kind = linear.name.strip_prefix(&prefix).unwrap_or(&linear.name);
        let (site, slot, kind) = match (linear.expert(), &linear.spec.fused) {
            (Some(expert), Some(slice)) => {
                let site = match linear.site {
                    SiteKind::ExpertDown(_) => SiteKind::ExpertDown(0),
                    site => site,
                };
                let any = kind.replacen(&format!(".{expert}."), ".*.", 1);
                // After the shared expert's.
                (site, (1, slice.part), any)
            }
            _ => (linear.site, (0, linear.slot), kind.to_owned()),
        };
        let key = (site, slot, kind, linear.rows, linear.columns, linear.scheme());
        kinds.entry(key).or_default().push(linear.block);
    }
    for ((_, _, name, rows, columns, scheme), mut blocks) in kinds {
        blocks.dedup();
        println!(
            "  {name:<20} {rows:>6} x {columns:<6} {scheme:<20} blocks {}",
            ranges(&blocks)
        );
    }
    println!("  {} tensors are copied as they are", plan.copied.len());
    if let Some(mixture) = &tower.spec.block.mixture {
        println!(
            "experts       {} a layer, {} at a time",
            mixture.routing.experts,
            plan.experts_per_step()
        );
    }
    println!("calibration   {} tokens", job.calibration.usage.tokens_used);
    println!(
        "peak memory   {} predicted, with {} workers",
        bytes(peak),
        job.workers
    );
    println!(
        "output        {} ({} now), {}",
        bytes(output),
        bytes(tower.checkpoint.byte_len()),
        plan.format.name()
    );
    Ok(Outcome::Fine)
}

fn job(arguments: &QuantizeArguments) -> Result<Job> {
    let recipe = arguments.resolve()?;
    let calibration = match recipe.method {
        Method::Gptq if !arguments.collects() => calibrate(&arguments.calibration, &arguments.model)?,
        _ => Calibration::default(),
    };
    let output = arguments.output.clone().unwrap_or_default();
    Ok(Job {
        calibration,
        workers: arguments.resources.workers()?,
        memory: arguments.resources.memory,
        scratch: arguments.resources.scratch.clone(),
        shard_bytes_max: arguments.scheme.max_shard_size,
        fresh: arguments.finish.fresh,
        ..Job::new(arguments.model.clone(), output, recipe)
    })
}

/// `solve`.
pub(super) fn solve(arguments: &SolveArguments, halt: &Arc<Halt>) -> Result<Outcome> {
    let artifact = Artifact::open(&arguments.statistics)?;
    let (model, output) = (arguments.model.clone(), arguments.output.clone());
    let job = Job {
        statistics: Some(Arc::new(artifact)),
        workers: arguments.resources.workers()?,
        memory: arguments.resources.memory,
        scratch: arguments.resources.scratch.clone(),
        shard_bytes_max: arguments.scheme.max_shard_size,
        fresh: arguments.finish.fresh,
        ..Job::new(model, output, arguments.resolve()?)
    };
    let summary = resolve::solve(&job, &progress::observer(!arguments.finish.json), halt)?;
    tell(&job, &summary, &arguments.finish)
}

fn calibrate(arguments: &CalibrationArguments, model: &Path) -> Result<Calibration> {
    let vocab_size = vocab_size(model)?;
    match &arguments.calibration_tokens {
        Some(file) => calibration::from_npy(file, vocab_size),
        None => calibration::load(&source(arguments)?, model, vocab_size),
    }
}

/// What the calibration flags name.
pub(super) fn source(arguments: &CalibrationArguments) -> Result<Source> {
    if arguments.calibration.is_empty() {
        return Err(Error::usage(
            "--calibration",
            "is missing",
            "name a text file (.jsonl, .json, .txt, .csv, .parquet); quantize --method rtn needs none",
        ));
    }
    Ok(Source {
        names: arguments.calibration.clone(),
        dataset_dir: arguments.dataset_dir.clone(),
        samples: arguments.samples,
        length: arguments.length,
        seed: arguments.seed,
        ..Source::default()
    })
}

/// Rows of a checkpoint's embedding, from its config.
pub(super) fn vocab_size(model: &Path) -> Result<usize> {
    Ok(families::parse(Checkpoint::open(model)?.config())?.vocab_size)
}

fn print_summary(job: &Job, s: &Summary) {
    let usage = &s.calibration;
    println!("\nquantized {} linears of {}", s.linears, job.model.display());
    if let Some(artifact) = &job.statistics {
        println!(
            "  statistics   {} tokens of {} documents, from {}",
            s.calibration_tokens,
            artifact.header.documents.len(),
            artifact.folder().display()
        );
    } else if s.calibration_tokens > 0 {
        println!(
            "  calibration  {} tokens from {} of {} documents",
            s.calibration_tokens, usage.documents_used, usage.documents_found
        );
        for (reason, count) in &usage.left_out {
            println!("               left out: {count} × {reason}");
        }
    }
    if s.reused_linears > 0 {
        println!(
            "  kept         {} linears of the output that was there; the others were solved",
            s.reused_linears
        );
    }
    println!(
        "  quality      mean output error {:.3} %; measure it: quantflow evaluate",
        s.relative_error_mean * 100.0
    );
    let ratio = s.source_bytes as f64 / s.output_bytes.max(1) as f64;
    println!(
        "  size         {} → {} ({ratio:.1} times smaller), {}",
        bytes(s.source_bytes),
        bytes(s.output_bytes),
        s.format
    );
    println!(
        "  time         {} ({} of CPU)",
        seconds(s.elapsed_seconds),
        seconds(s.cpu_seconds)
    );
    println!(
        "  peak memory  {} ({} planned)",
        bytes(s.peak_host_bytes),
        bytes(s.plan_peak_host_bytes)
    );
    if s.fallbacks > 0 {
        println!(
            "  warnings     {} linears: see {}",
            s.fallbacks,
            job.output.join("quantization_report.jsonl").display()
        );
    }
    println!("  output       {}", s.output.display());
    println!(
        "\nnext:  quantflow evaluate {} --reference {} --text FILE",
        s.output.display(),
        job.model.display()
    );
    println!("serve: vllm serve {}", s.output.display());
}
