//! `statistics`: collect, add, retract, merge, inspect.

use super::arguments::{
    ChangeArguments, CollectArguments, InspectArguments, MergeArguments, ResourceArguments, StatisticsCommand,
};
use super::inputs::{documents, print_notes};
use super::text::{bytes, seconds};
use super::{Outcome, print_json, progress};
use crate::artifact::Artifact;
use crate::device::{DeviceChoice, Placement};
use crate::error::Result;
use crate::operators::Halt;
use crate::pipelines::statistics::{Change, Job, merge_artifacts, update};
use std::path::Path;
use std::sync::Arc;

pub(super) fn run(command: &StatisticsCommand, halt: &Arc<Halt>) -> Result<Outcome> {
    match command {
        StatisticsCommand::Collect(arguments) => collect(arguments, halt),
        StatisticsCommand::Add(arguments) => change(arguments, Change::Add, halt),
        StatisticsCommand::Retract(arguments) => change(arguments, Change::Retract, halt),
        StatisticsCommand::Merge(arguments) => merge(arguments),
        StatisticsCommand::Inspect(arguments) => inspect(arguments),
    }
}

fn collect(arguments: &CollectArguments, halt: &Arc<Halt>) -> Result<Outcome> {
    let job = Job {
        held_out: arguments.held_out,
        all_experts: arguments.all_experts,
        placement: arguments.resources.placement()?,
        workers: arguments.resources.workers()?,
        device_memory: arguments.resources.device_memory,
        memory: arguments.resources.memory,
        scratch: arguments.resources.scratch.clone(),
        fresh: arguments.fresh,
        ..Job::new(
            arguments.model.clone(),
            arguments.output.clone(),
            Change::Collect,
            documents(&arguments.calibration, &arguments.model)?,
        )
    };
    carry_out(&job, arguments.json, halt)
}

fn change(arguments: &ChangeArguments, change: Change, halt: &Arc<Halt>) -> Result<Outcome> {
    let job = Job {
        placement: placement_of(&arguments.statistics, &arguments.resources)?,
        workers: arguments.resources.workers()?,
        device_memory: arguments.resources.device_memory,
        memory: arguments.resources.memory,
        scratch: arguments.resources.scratch.clone(),
        fresh: arguments.fresh,
        ..Job::new(
            arguments.model.clone(),
            arguments.statistics.clone(),
            change,
            documents(&arguments.calibration, &arguments.model)?,
        )
    };
    carry_out(&job, arguments.json, halt)
}

/// `--device auto` goes on where the artifact was begun, as far as that is the CPU: what others sum does not add up with it.
fn placement_of(artifact: &Path, resources: &ResourceArguments) -> Result<Placement> {
    let begun = Artifact::open(artifact)?.header.origin.arithmetic;
    let cpu = Placement::cpu();
    match resources.device {
        DeviceChoice::Auto if begun == cpu.arithmetic() => Ok(cpu),
        _ => resources.placement(),
    }
}

fn carry_out(job: &Job, json: bool, halt: &Arc<Halt>) -> Result<Outcome> {
    print_notes(&job.documents.usage);
    let summary = update(job, &progress::observer(!json), halt)?;
    if json {
        print_json(&summary)?;
        return Ok(Outcome::Fine);
    }
    let usage = &summary.calibration;
    let done = match job.change {
        Change::Collect => "collected",
        Change::Add => "added",
        Change::Retract => "retracted",
    };
    println!(
        "\n{done} {} batches from {} of {} documents",
        summary.batches_run, usage.documents_used, usage.documents_found
    );
    for (reason, count) in &usage.left_out {
        println!("  left out     {count} × {reason}");
    }
    println!(
        "  time         {} ({} of CPU)",
        seconds(summary.elapsed_seconds),
        seconds(summary.cpu_seconds)
    );
    println!(
        "  peak memory  {} ({} planned)",
        bytes(summary.peak_host_bytes),
        bytes(summary.plan_peak_host_bytes)
    );
    if summary.plan_peak_device_bytes > 0 {
        println!(
            "  on device    {} ({} planned)",
            bytes(summary.peak_device_bytes),
            bytes(summary.plan_peak_device_bytes)
        );
    }
    print_content(&Artifact::open(&job.folder)?);
    println!(
        "\nnext:  quantflow solve {} --statistics {} -o OUT",
        job.model.display(),
        job.folder.display()
    );
    Ok(Outcome::Fine)
}

fn merge(arguments: &MergeArguments) -> Result<Outcome> {
    let merged = merge_artifacts(&arguments.parts, &arguments.output, arguments.fresh)?;
    print(&merged, arguments.json)
}

pub(super) fn inspect(arguments: &InspectArguments) -> Result<Outcome> {
    let artifact = Artifact::open(&arguments.path)?;
    artifact.verify()?;
    print(&artifact, arguments.json)
}

fn print(artifact: &Artifact, json: bool) -> Result<Outcome> {
    let header = &artifact.header;
    if json {
        print_json(&serde_json::json!({
            "kind": "statistics", "digest": header.digest(), "documents": header.documents.len(),
            "batches": header.batch_count(),
            "tokens": header.tokens(), "blocks": header.blocks.len(), "origin": header.origin,
        }))?;
    } else {
        print_content(artifact);
    }
    Ok(Outcome::Fine)
}

fn print_content(artifact: &Artifact) {
    let header = &artifact.header;
    println!(
        "  artifact     {}: {} documents in {} batches, {} tokens, {} blocks",
        artifact.folder().display(),
        header.documents.len(),
        header.batch_count(),
        header.tokens(),
        header.blocks.len()
    );
    println!("  digest       {}", header.digest());
}
