//! `plan`: what a run would do, hold and take. Runs nothing.

use super::arguments::QuantizeArguments;
use super::quantize::job;
use super::text::{bytes, ranges, seconds};
use super::{Outcome, print_json};
use crate::device;
use crate::error::{Error, Result};
use crate::formats::Reader;
use crate::model::{SiteKind, Tower};
use crate::numerics::speed::Speed;
use crate::plan::{Fit, Plan};
use serde::Serialize;
use std::collections::BTreeMap;

/// What all steps of one kind take.
#[derive(Debug, Default, Serialize)]
struct Site {
    steps: u64,
    peak_host_bytes: u64,
    seconds: f64,
    /// Of the steps, those whose matrices lie in scratch files.
    spilled: u64,
}

pub(super) fn run(arguments: &QuantizeArguments) -> Result<Outcome> {
    if arguments.allocation.average_bits.is_some() {
        return Err(Error::usage(
            "--average-bits",
            "is decided by measurements, and plan runs nothing",
            "solve with it once; then: quantflow plan MODEL --recipe OUT/quantflow_recipe.toml",
        ));
    }
    let job = job(arguments)?;
    let (tower, plan) = job.plan()?;
    let fit = job.fit(&plan)?;
    let speed = match job.placement.on_device {
        true => device::speed::measure(&job.placement.device, tower.precision())?,
        false => Speed::measure(),
    };
    let sites = sites(speed, &plan, &fit);
    let total: f64 = sites.values().map(|site| site.seconds).sum();
    let spilled: u64 = sites.values().map(|site| site.spilled).sum();
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
            "architecture": tower.spec.architecture, "blocks": plan.blocks(), "linears": linears, "sites": sites,
            "plan_peak_host_bytes": fit.peak_host_bytes, "plan_peak_device_bytes": fit.peak_device_bytes, "resident_activation_bytes": fit.resident_activation_bytes,
            "experts_per_step": plan.experts_per_step(), "scratch_bytes": fit.scratch_bytes, "steps": plan.steps(), "spilled_steps": spilled, "seconds": total,
            "source_quantization": tower.reader().map(Reader::describe),
            "dequantized": plan.dequantized.iter().map(|coded| &coded.spec.name).collect::<Vec<_>>(),
            "output_bytes": output, "calibration_tokens": job.calibration.usage.tokens_used,
        }))?;
        return Ok(Outcome::Fine);
    }
    println!(
        "{}: {} blocks, {} linears to quantize",
        tower.spec.architecture,
        plan.blocks(),
        quantized.len()
    );
    print_linears(&tower, &plan);
    println!("  {} tensors are copied as they are", plan.copied.len());
    if let Some(reader) = tower.reader() {
        println!(
            "  the source is quantized: {}; {} weights that are left alone are written as their values",
            reader.describe(),
            plan.dequantized.len()
        );
    }
    for (name, site) in &sites {
        println!(
            "  {name:<20} {:>5} steps, at most {} each, {}{}",
            site.steps,
            bytes(site.peak_host_bytes),
            seconds(site.seconds),
            if site.spilled > 0 {
                ", from scratch files"
            } else {
                ""
            }
        );
    }
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
        bytes(fit.peak_host_bytes),
        job.load().workers
    );
    if job.placement.on_device {
        println!("on device     {} predicted", bytes(fit.peak_device_bytes));
    }
    println!(
        "scratch       {}, with the matrices of {spilled} of {} steps",
        bytes(fit.scratch_bytes),
        plan.steps()
    );
    println!("time          {} of products and searches", seconds(total));
    println!(
        "output        {} ({} now), {}",
        bytes(output),
        bytes(tower.checkpoint.byte_len()),
        plan.format.name()
    );
    Ok(Outcome::Fine)
}

/// Linears that differ by their block, or by their expert, alone are one line.
fn print_linears(tower: &Tower, plan: &Plan) {
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
                // After the shared expert's.
                let any = kind.replacen(&format!(".{expert}."), ".*.", 1);
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
}

/// By the name of what is at the site; all routed experts are one.
fn sites(speed: Speed, plan: &Plan, fit: &Fit) -> BTreeMap<&'static str, Site> {
    let mut sites: BTreeMap<&str, Site> = BTreeMap::new();
    for step in 0..plan.steps() {
        let site = sites.entry(name(plan.step(step).1)).or_default();
        site.steps += 1;
        site.peak_host_bytes = site.peak_host_bytes.max(plan.step_bytes(fit, step));
        site.seconds += plan.work(&fit.load, speed, step).seconds() / fit.load.workers as f64;
        site.spilled += u64::from(fit.is_spilled(step));
    }
    sites
}

fn name(site: SiteKind) -> &'static str {
    match site {
        SiteKind::Qkv => "qkv",
        SiteKind::QB => "q_b",
        SiteKind::KvB => "kv_b",
        SiteKind::O => "o",
        SiteKind::GateUp => "gate_up",
        SiteKind::Down => "down",
        SiteKind::ExpertDown(_) => "expert_down",
    }
}
