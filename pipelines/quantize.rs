//! One quantization run from directory to directory: opens, plans, picks the graph, drives it, finishes the output.

use super::earlier::{Earlier, keys};
use super::finish::{Made, finish};
use super::folder::{self, WORK_FOLDER};
use super::job::{Job, Summary};
use super::statistics::{self, Change};
use super::{data_free, run as workers, sequential, solve};
use crate::artifact::{Artifact, HEADER};
use crate::calibration::{Calibration, ContentId, Documents};
use crate::checkpoint::{OutputLayout, OutputWriter};
use crate::error::{Error, Result};
use crate::ledger::Record;
use crate::model::Tower;
use crate::operators::local::Output;
use crate::operators::{Halt, Pass, Shared};
use crate::plan::Plan;
use crate::recipe::{Damping, Method};
use crate::report::Observer;
use crate::storage::{self, FolderLock};
use crate::system;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// Runs `job`.
///
/// # Errors
/// Bad input, a full disk, an interrupt: what is finished stays, and the same job continues there.
pub fn quantize(job: &Job, observer: &Arc<dyn Observer>, halt: &Arc<Halt>) -> Result<Summary> {
    run(job, None, observer, halt)
}

/// As [`quantize`], with what can be kept of an earlier output.
pub(super) fn run(
    job: &Job,
    earlier: Option<&Earlier>,
    observer: &Arc<dyn Observer>,
    halt: &Arc<Halt>,
) -> Result<Summary> {
    let begin = (Instant::now(), system::process_cpu());
    let (tower, mut plan) = job.plan()?;
    if job.recipe.method == Method::Gptq && job.calibration.batches.is_empty() && job.statistics.is_none() {
        return Err(Error::usage(
            "--calibration",
            "GPTQ needs calibration text",
            "name a file, or use --method rtn",
        ));
    }
    if let Some(artifact) = &job.statistics {
        let subject = artifact.folder().display().to_string();
        artifact
            .header
            .expect_model(&subject, &tower.checkpoint.digest())?;
        if job.recipe.all_experts && !artifact.header.origin.all_experts {
            return Err(Error::invalid(
                subject,
                "has the sums of each expert over the tokens that were sent to it alone",
                "collect it anew with: quantflow statistics collect --all-experts; or take all_experts out of the recipe",
            ));
        }
    }
    let measured = (job.statistics.as_ref()).is_some_and(|artifact| artifact.header.origin.holds_out());
    if job.recipe.damp_percent == Damping::Auto && !measured {
        return Err(Error::usage(
            "--damp-percent",
            "auto needs held-out statistics",
            "collect them with: quantflow statistics collect --held-out 0.1; then quantflow solve",
        ));
    }
    let fit = job.fit(&plan)?;
    let planned = (fit.peak_host_bytes, fit.peak_device_bytes);
    let solved = match &job.statistics {
        Some(artifact) => keys(&plan, artifact)?,
        None => Vec::new(),
    };
    let kept = match earlier {
        Some(earlier) => earlier.keep(&mut plan, solved.clone())?,
        None => BTreeMap::new(),
    };
    if !kept.is_empty() {
        observer.note(&format!(
            "kept: {} of {} linears are what is wanted",
            kept.len(),
            solved.len()
        ));
    }
    if let Some(first) = plan.dequantized.first() {
        observer.note(&format!(
            "the source has {} weights quantized that the recipe leaves alone: they are written as their values in {:?}, {} first",
            plan.dequantized.len(),
            first.spec.dtype,
            first.spec.name
        ));
    }
    folder::prepare(job)?;
    let work = job.output.join(WORK_FOLDER);
    storage::create_folder(&work)?;
    let _lock = FolderLock::acquire(&work, "lock")?;
    let fingerprint = job.fingerprint(&tower)?;
    // The ledger first: it tells another run's folder from a damaged one.
    let mut output = Output::open(&work, &fingerprint)?;
    let layout = OutputLayout::new(&plan.output, job.shard_bytes_max)?;
    output.writer = Some(OutputWriter::open(&job.output, layout)?);
    let resumed_blocks = output.resume(plan.blocks(), observer.as_ref());
    let length = job.calibration.length_max();
    tower.expect_length(length)?;
    let scratch = job.scratch.as_deref().unwrap_or(&work);
    let shared = Arc::new(Shared {
        batches: job.calibration.batches.clone(),
        pass: match fit.load.streams {
            2 => Pass::Both,
            _ => Pass::Quantized,
        },
        ..Shared::new((tower, length), (plan, fit), scratch, output, observer, halt)?
    });
    let copy = || copy_untouched(&shared.tower, &shared.plan, earlier, &shared.output);
    let drive = || match resumed_blocks < shared.plan.blocks() {
        true => drive(job, &shared),
        false => Ok(()),
    };
    match job.placement.on_device {
        true => beside(halt, copy, drive)?,
        false => copy().and_then(|()| drive())?,
    }
    let made = Made {
        fingerprint,
        solved,
        kept,
    };
    let summary = finish(job, shared, made, |summary| {
        summary.elapsed_seconds = begin.0.elapsed().as_secs_f64();
        summary.cpu_seconds = (system::process_cpu() - begin.1).as_secs_f64();
        (summary.plan_peak_host_bytes, summary.plan_peak_device_bytes) = planned;
        summary.resumed_blocks = resumed_blocks;
    })?;
    storage::remove(&work)?;
    Ok(summary)
}

/// `job` with statistics of the original model over `documents`, which lie in the output's work folder.
///
/// # Errors
/// As [`quantize`]; what is finished stays, and the same job continues there.
pub fn collected(
    job: &Job,
    documents: Documents,
    observer: &Arc<dyn Observer>,
    halt: &Arc<Halt>,
) -> Result<Job> {
    folder::prepare(job)?;
    let folder = job.output.join(WORK_FOLDER).join("statistics");
    let usage = documents.usage.clone();
    let mut given: Vec<ContentId> = documents.placed.iter().map(|document| document.id).collect();
    if !folder.join(HEADER).is_file() {
        let collect = statistics::Job {
            all_experts: job.recipe.all_experts,
            workers: job.workers,
            memory: job.memory,
            scratch: job.scratch.clone(),
            placement: job.placement.clone(),
            device_memory: job.device_memory,
            ..statistics::Job::new(job.model.clone(), folder.clone(), Change::Collect, documents)
        };
        statistics::update(&collect, observer, halt)?;
    }
    let artifact = Artifact::open(&folder)?;
    let mut held: Vec<ContentId> = artifact
        .header
        .documents
        .iter()
        .map(|document| document.id)
        .collect();
    given.sort_unstable();
    held.sort_unstable();
    if given != held {
        return Err(Error::invalid(
            job.output.display().to_string(),
            "the unfinished run in this folder has another calibration",
            "repeat its command to continue it, or pass --fresh to forget it",
        ));
    }
    Ok(Job {
        calibration: Calibration {
            batches: Vec::new(),
            usage,
        },
        statistics: Some(Arc::new(artifact)),
        fresh: false,
        ..job.clone()
    })
}

/// Copies while the device is driven. Where the copy fails, the run halts.
fn beside(
    halt: &Halt,
    copy: impl FnOnce() -> Result<()> + Send,
    drive: impl FnOnce() -> Result<()>,
) -> Result<()> {
    std::thread::scope(|scope| {
        let copying = scope.spawn(|| copy().unwrap_or_else(|error| halt.raise(error)));
        let driven = drive();
        let joined = copying.join();
        driven?;
        match (joined, halt.take()) {
            (_, Some(error)) => Err(error),
            (Err(_), None) => Err(Error::Worker("it panicked while it copied".into())),
            (Ok(()), None) => Ok(()),
        }
    })
}

fn copy_untouched(tower: &Tower, plan: &Plan, earlier: Option<&Earlier>, output: &Output) -> Result<()> {
    let done = output
        .records
        .lock()
        .is_ok_and(|records| records.contains(&Record::Copied));
    if done {
        return Ok(());
    }
    let writer = output.writer()?;
    for name in &plan.copied {
        writer.copy(name, &tower.checkpoint)?;
    }
    for coded in &plan.dequantized {
        writer.write_pieces(&coded.spec.name, |write| tower.dequantize(coded, write))?;
    }
    if let Some(earlier) = earlier {
        earlier.copy(plan, writer)?;
    }
    writer.sync()?;
    output.note(Record::Copied)
}

fn drive(job: &Job, shared: &Arc<Shared>) -> Result<()> {
    let first = shared.plan.block_steps(shared.output.blocks_done()).start;
    shared.begin("quantize", first);
    let order = job
        .arrival
        .clone()
        .unwrap_or_else(|| (0..shared.batches.len()).collect());
    let (method, statistics) = (job.recipe.method, job.statistics.clone());
    workers::with_locals(shared, move |worker, local| match (method, &statistics) {
        (Method::Rtn, _) => data_free::run(worker, local),
        (Method::Gptq, Some(artifact)) => solve::run(worker, local, artifact),
        (Method::Gptq, None) => sequential::build(worker, local, &order),
    })
}
