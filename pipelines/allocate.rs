//! From an average of bits to a width for each linear, measured on this model, and then the quantized checkpoint.
//!
//! ```text
//! statistics ─┬─ predict ─────► what each linear would lose at each width ──────────────┐
//!             └─ solve at 3 bits ─► codes ─┐                                            ▼
//! windows ─────────────────────────────────┴─ sensitivity ─► KL of each unit alone ─► knapsack ─► recipe ─► solve
//! ```
//! What was measured is kept beside the output and serves for other averages. The graphs are in `predict`, `solve` and `sensitivity`; the
//! arithmetic is in [`crate::allocation`].

use super::folder::{self, WORK_FOLDER};
use super::job::{Job, Summary};
use super::sensitivity::{Measurement, measure};
use super::{predict, resolve};
use crate::allocation::{self, Measured, Sensitivity, Unit};
use crate::artifact::Artifact;
use crate::calibration::{self, Calibration, ContentId};
use crate::checkpoint::{hex, read_json};
use crate::error::{Error, Result};
use crate::model::Tower;
use crate::operators::Halt;
use crate::plan::Plan;
use crate::recipe::{Damping, Method, Recipe};
use crate::report::{Observer, Silent};
use crate::storage;
use crate::system;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The recipe of an output whose widths were chosen here, to be used again.
pub const RECIPE: &str = "quantflow_recipe.toml";
/// What was measured for it.
pub const SENSITIVITY: &str = "quantflow_sensitivity.json";

/// What is wanted, beside a [`Job`] that has statistics.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Code bits a quantized weight.
    pub average_bits: f64,
    /// Where from to know what each unit costs.
    pub measured: From,
}

/// See [`Wanted`].
#[derive(Clone, Debug)]
pub enum From {
    /// Forward passes over these windows.
    Windows(Calibration),
    /// The [`SENSITIVITY`] of an earlier output.
    File(PathBuf),
}

/// What was chosen.
#[derive(Clone, Debug, Serialize)]
pub struct Allocation {
    /// As it was asked for.
    pub wanted_bits: f64,
    /// Code bits a quantized weight.
    pub average_bits: f64,
    /// The same with scales and zero points.
    pub effective_bits: f64,
    /// Width at which the KL was measured.
    pub probe_bits: u32,
    /// Positions over which the KL is a mean.
    pub positions: u64,
    /// Predicted peak of resident bytes while it was measured; 0 where it was not.
    pub plan_peak_host_bytes: u64,
    /// Estimated KL of the whole.
    pub predicted_kl: f64,
    /// In the order of the model.
    pub units: Vec<Chosen>,
    /// What `solve` was given.
    #[serde(skip)]
    pub recipe: Recipe,
    /// What it was chosen from.
    #[serde(skip)]
    pub sensitivity: Sensitivity,
}

/// A set of linears with one width.
#[derive(Clone, Debug, Serialize)]
pub struct Chosen {
    /// Decoder layer.
    pub block: usize,
    /// Module names.
    pub linears: Vec<String>,
    /// Weights.
    pub parameters: u64,
    /// The width.
    pub bits: u32,
    /// KL where it alone has codes of `probe_bits`.
    pub kl: Option<f64>,
    /// Estimated KL of it alone at its width.
    pub predicted_kl: f64,
}

/// Some whole sequences of `windows`, at most `count`, evenly spaced from the first to the last: what is measured on costs a forward pass
/// a unit.
pub fn sample(windows: &Calibration, count: usize) -> Calibration {
    let length = windows.length_max();
    let sequences: Vec<&[u32]> = (windows.batches.iter())
        .filter(|batch| batch.length == length)
        .flat_map(|batch| batch.tokens.chunks_exact(length.max(1)))
        .collect();
    let count = count.min(sequences.len());
    let spread = |i: usize| match count {
        0 | 1 => 0,
        count => i * (sequences.len() - 1) / (count - 1),
    };
    let tokens: Vec<u32> = (0..count)
        .flat_map(|i| sequences[spread(i)].iter().copied())
        .collect();
    // One sequence a batch: the unit that is dealt over the workers.
    let batches = tokens
        .chunks(length.max(1))
        .enumerate()
        .flat_map(|(index, tokens)| {
            let mut batches = calibration::batches(tokens, length);
            batches.iter_mut().for_each(|batch| batch.index = index);
            batches
        });
    Calibration {
        batches: batches.collect(),
        usage: windows.usage.clone(),
    }
}

/// Chooses widths and solves `job` with them; the recipe and what it was chosen from are kept in the output.
///
/// # Errors
/// As [`allocate`] and [`resolve::solve`].
pub fn solve(
    job: &Job,
    wanted: &Wanted,
    observer: &Arc<dyn Observer>,
    halt: &Arc<Halt>,
) -> Result<(Summary, Allocation)> {
    let allocation = allocate(job, wanted, observer, halt)?;
    let job = Job {
        recipe: allocation.recipe.clone(),
        ..job.clone()
    };
    let mut summary = resolve::solve(&job, observer, halt)?;
    let measuring = allocation.plan_peak_host_bytes;
    summary.plan_peak_host_bytes = summary.plan_peak_host_bytes.max(measuring);
    storage::write_whole(&job.output.join(RECIPE), allocation.recipe.to_toml()?.as_bytes())?;
    write(&job.output.join(SENSITIVITY), &allocation.sensitivity)?;
    Ok((summary, allocation))
}

/// Chooses the width of each linear of `job`, whose recipe's own width does not matter.
///
/// # Errors
/// A job without statistics or with another method than GPTQ, an average that cannot be, an earlier measurement of something else;
/// whatever can go wrong while it is measured.
pub fn allocate(
    job: &Job,
    wanted: &Wanted,
    observer: &Arc<dyn Observer>,
    halt: &Arc<Halt>,
) -> Result<Allocation> {
    let Some(artifact) = job
        .statistics
        .as_ref()
        .filter(|_| job.recipe.method == Method::Gptq)
    else {
        return Err(Error::usage(
            "--average-bits",
            "needs GPTQ and statistics of the original model, by which the widths are chosen",
            "use quantflow solve, or quantize --activations independent; its quantflow_recipe.toml then serves any run",
        ));
    };
    let (tower, plan) = job.plan()?;
    let units = allocation::units(&plan)?;
    allocation::expect_average(&units, wanted.average_bits)?;
    artifact.header.expect_model(
        &artifact.folder().display().to_string(),
        &tower.checkpoint.digest(),
    )?;
    let model = Model {
        tower: &tower,
        plan: &plan,
        units: &units,
    };
    let (sensitivity, peak) = match &wanted.measured {
        From::File(path) => (read(path, &digest(&plan, artifact))?, 0),
        From::Windows(windows) => sense(job, artifact, &model, windows, observer, halt)?,
    };
    let widths = allocation::allocate(&units, &sensitivity, wanted.average_bits)?;
    let recipe = allocation::recipe(&plan, &tower, &units, &widths)?;
    describe(&model, &widths, wanted, recipe, sensitivity, peak)
}

/// What widths are chosen for.
struct Model<'a> {
    tower: &'a Tower,
    plan: &'a Plan,
    units: &'a [Unit],
}

/// Predicts, solves at one width into the work folder, and measures each unit that has a choice. What an unfinished run of the same
/// command has measured is taken from there. With the predicted peak of resident bytes, or 0 where nothing was left to measure.
fn sense(
    job: &Job,
    artifact: &Arc<Artifact>,
    model: &Model<'_>,
    windows: &Calibration,
    observer: &Arc<dyn Observer>,
    halt: &Arc<Halt>,
) -> Result<(Sensitivity, u64)> {
    let (plan, units) = (model.plan, model.units);
    let work = job.output.join(WORK_FOLDER).join("allocation");
    let kept = work.join(SENSITIVITY);
    let ids: Vec<ContentId> = windows.batches.iter().map(|batch| batch.id).collect();
    if kept.is_file() {
        let found = read(&kept, &digest(plan, artifact));
        if let Some(found) = found.ok().filter(|found| found.windows == ids) {
            return Ok((found, 0));
        }
    }
    // It may be refused: before anything is done.
    let streams = 1 + units.iter().filter(|unit| unit.widths.len() > 1).count();
    let available = system::available_host_bytes();
    let workers = job.placement.workers(job.workers);
    let fit = plan.fit_measurement(model.tower, windows, streams, workers, job.memory, available)?;
    folder::expect_own(job)?;
    storage::create_folder(&work)?;
    let probe_bits = allocation::probe_bits(units)?;
    let mut recipe = job.recipe.clone();
    recipe.bits = probe_bits;
    recipe.refine_rounds = Some(0);
    // One factor a site is enough to compare widths.
    if recipe.damp_percent == Damping::Auto {
        recipe.damp_percent = Damping::Fixed(0.01);
    }
    let probe = Job {
        output: work.join("probe"),
        recipe,
        fresh: false,
        ..job.clone()
    };
    let widths = crate::recipe::BITS;
    let losses = predict::losses(&probe, artifact, &widths, &work, observer, halt)?;
    observer.note(&format!(
        "solving once at {probe_bits} bits, to measure what each part costs alone"
    ));
    // Its report is no result of this run.
    resolve::solve(&probe, &(Arc::new(Silent) as Arc<dyn Observer>), halt)?;
    let open: Vec<&Unit> = units.iter().filter(|unit| unit.widths.len() > 1).collect();
    let name = |&at: &usize| plan.linears[at].name.clone();
    let parts = open
        .iter()
        .map(|unit| (unit.block, unit.linears.iter().map(name).collect::<BTreeSet<_>>()));
    let (kl, positions) = measure(
        Measurement {
            reference: job.model.clone(),
            model: probe.output,
            parts: parts.collect(),
            windows: windows.clone(),
            scratch: work.clone(),
            workers,
            fit,
            placement: job.placement.clone(),
            device_memory: job.device_memory,
        },
        observer,
        halt,
    )?;
    let mut kl = kl.into_iter();
    let measured = units.iter().map(|unit| {
        let loss = |position: usize| unit.linears.iter().map(|&at| losses[at][position]).sum::<f64>();
        let losses = widths
            .iter()
            .enumerate()
            .map(|(position, &bits)| (bits, loss(position)));
        Measured {
            linears: unit.linears.iter().map(name).collect(),
            parameters: unit.parameters,
            kl: if unit.widths.len() > 1 { kl.next() } else { None },
            losses: losses.filter(|(bits, _)| unit.widths.contains(bits)).collect(),
        }
    });
    let measured = Sensitivity {
        of: digest(plan, artifact),
        probe_bits,
        windows: ids,
        positions,
        units: measured.collect(),
    };
    storage::remove(&work)?;
    storage::create_folder(&work)?;
    write(&kept, &measured)?;
    Ok((measured, fit.peak_host_bytes))
}

fn write(path: &Path, sensitivity: &Sensitivity) -> Result<()> {
    let value = serde_json::to_value(sensitivity);
    let value = value.map_err(|error| Error::invalid(SENSITIVITY, error.to_string(), ""))?;
    storage::write_json(path, &value)
}

/// A digest of what is measured: checkpoint, statistics, and each linear's grid but for its width.
fn digest(plan: &Plan, artifact: &Artifact) -> String {
    let linears = plan.linears.iter().filter_map(|linear| {
        let grid = linear.grid?;
        Some(serde_json::json!([
            linear.name,
            grid.group_size,
            grid.symmetric,
            grid.scale_dtype
        ]))
    });
    let decides = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": artifact.header.origin.model,
        "statistics": artifact.header.digest(),
        "actorder": plan.recipe.actorder,
        "linears": linears.collect::<Vec<_>>(),
    });
    hex(&Sha256::digest(decides.to_string()))
}

fn read(path: &Path, of: &str) -> Result<Sensitivity> {
    let subject = path.display().to_string();
    let sensitivity: Sensitivity = serde_json::from_value(read_json(path)?).map_err(|error| {
        Error::invalid(
            subject.clone(),
            error.to_string(),
            format!("give the {SENSITIVITY} of an output that was made with --average-bits"),
        )
    })?;
    match sensitivity.of == of {
        true => Ok(sensitivity),
        false => Err(Error::invalid(
            subject,
            "was measured with another checkpoint, other statistics or other groups",
            "measure anew: give --tokens or --text instead of --sensitivity",
        )),
    }
}

fn describe(
    model: &Model<'_>,
    widths: &[u32],
    wanted: &Wanted,
    recipe: Recipe,
    sensitivity: Sensitivity,
    plan_peak_host_bytes: u64,
) -> Result<Allocation> {
    let Model { tower, plan, units } = *model;
    let chosen = Plan::new(recipe.clone(), tower)?;
    let mut rows = Vec::new();
    for ((unit, &bits), measured) in units.iter().zip(widths).zip(&sensitivity.units) {
        for &at in &unit.linears {
            if chosen.linears[at].grid.map(|grid| grid.bits) != Some(bits) {
                return Err(Error::Worker(format!(
                    "the recipe does not give {} its {bits} bits; this is a bug in quantflow: please report it",
                    plan.linears[at].name
                )));
            }
        }
        rows.push(Chosen {
            block: unit.block,
            linears: measured.linears.clone(),
            parameters: unit.parameters,
            bits,
            kl: measured.kl,
            predicted_kl: measured.cost(sensitivity.probe_bits, bits),
        });
    }
    Ok(Allocation {
        wanted_bits: wanted.average_bits,
        average_bits: allocation::average_bits(units, widths),
        effective_bits: allocation::effective_bits(&chosen),
        probe_bits: sensitivity.probe_bits,
        positions: sensitivity.positions,
        plan_peak_host_bytes,
        predicted_kl: rows.iter().map(|row| row.predicted_kl).sum(),
        units: rows,
        recipe,
        sensitivity,
    })
}
