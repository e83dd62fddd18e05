//! `quantize` and `solve`.

use super::arguments::{FinishArguments, QuantizeArguments, SolveArguments};
use super::inputs::{calibrate, documents, print_notes};
use super::text::{bytes, seconds};
use super::{Outcome, allocation, print_json, progress};
use crate::artifact::Artifact;
use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::operators::Halt;
use crate::pipelines::allocate::{self, Allocation};
use crate::pipelines::folder::REPORT;
use crate::pipelines::job::{Job, Summary};
use crate::pipelines::quantize::{collected, quantize};
use crate::pipelines::resolve;
use crate::recipe::Method;
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
    let wanted = allocation::while_quantizing(arguments)?;
    let job = job(arguments)?;
    print_notes(&job.calibration.usage);
    if !arguments.collects() {
        let summary = quantize(&job, &observer, halt)?;
        return tell(&job, &summary, None, &arguments.finish);
    }
    let documents = documents(&arguments.calibration, &arguments.model)?;
    print_notes(&documents.usage);
    let job = collected(&job, documents, &observer, halt)?;
    let (summary, chosen) = match wanted {
        Some(wanted) => {
            let (summary, chosen) = allocate::solve(&job, &wanted, &observer, halt)?;
            (summary, Some(chosen))
        }
        None => (quantize(&job, &observer, halt)?, None),
    };
    tell(&job, &summary, chosen.as_ref(), &arguments.finish)
}

fn tell(
    job: &Job,
    summary: &Summary,
    chosen: Option<&Allocation>,
    flags: &FinishArguments,
) -> Result<Outcome> {
    match (flags.json, chosen) {
        (true, None) => print_json(summary)?,
        (true, Some(chosen)) => print_json(&allocation::Told {
            summary,
            allocation: chosen,
        })?,
        (false, chosen) => {
            if let Some(chosen) = chosen {
                allocation::print(chosen);
            }
            print_summary(job, summary);
        }
    }
    Ok(if summary.fallbacks > 0 && !flags.no_strict {
        Outcome::Warnings
    } else {
        Outcome::Fine
    })
}

pub(super) fn job(arguments: &QuantizeArguments) -> Result<Job> {
    let recipe = arguments.resolve()?;
    let calibration = match recipe.method {
        Method::Gptq if !arguments.collects() => calibrate(&arguments.calibration, &arguments.model)?,
        _ => Calibration::default(),
    };
    let output = arguments.output.clone().unwrap_or_default();
    Ok(Job {
        calibration,
        placement: arguments.resources.placement()?,
        workers: arguments.resources.workers()?,
        device_memory: arguments.resources.device_memory,
        memory: arguments.resources.memory,
        scratch: arguments.resources.scratch.clone(),
        shard_bytes_max: arguments.scheme.max_shard_size,
        fresh: arguments.finish.fresh,
        ..Job::new(arguments.model.clone(), output, recipe)
    })
}

pub(super) fn solve(arguments: &SolveArguments, halt: &Arc<Halt>) -> Result<Outcome> {
    let artifact = Artifact::open(&arguments.statistics)?;
    let (model, output) = (arguments.model.clone(), arguments.output.clone());
    let job = Job {
        statistics: Some(Arc::new(artifact)),
        placement: arguments.resources.placement()?,
        workers: arguments.resources.workers()?,
        device_memory: arguments.resources.device_memory,
        memory: arguments.resources.memory,
        scratch: arguments.resources.scratch.clone(),
        shard_bytes_max: arguments.scheme.max_shard_size,
        fresh: arguments.finish.fresh,
        ..Job::new(model, output, arguments.resolve()?)
    };
    let observer = progress::observer(!arguments.finish.json);
    let (summary, chosen) = match allocation::while_solving(arguments)? {
        Some(wanted) => {
            let (summary, chosen) = allocate::solve(&job, &wanted, &observer, halt)?;
            (summary, Some(chosen))
        }
        None => (resolve::solve(&job, &observer, halt)?, None),
    };
    tell(&job, &summary, chosen.as_ref(), &arguments.finish)
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
    if s.dequantized > 0 {
        println!(
            "  dequantized  {} weights that the source has quantized and the recipe leaves alone",
            s.dequantized
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
    if s.plan_peak_device_bytes > 0 {
        println!(
            "  on device    {} ({} planned)",
            bytes(s.peak_device_bytes),
            bytes(s.plan_peak_device_bytes)
        );
    }
    if s.fallbacks > 0 {
        println!(
            "  warnings     {} linears: see {}",
            s.fallbacks,
            job.output.join(REPORT).display()
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
