//! One quantization run from directory to directory: opens, plans, picks the graph, drives it, finishes the output.

use super::finish::{Made, finish};
use super::resolve::{self, Earlier};
use super::statistics::{self, Change};
use super::{data_free, run as workers, sequential, solve};
use crate::artifact::{Artifact, HEADER};
use crate::calibration::{Calibration, ContentId, Documents, PROBE_TOKENS, Usage};
use crate::checkpoint::{OutputLayout, OutputWriter, hex};
use crate::device::Placement;
use crate::error::{Error, IoContext, Result};
use crate::ledger::Record;
use crate::model::Tower;
use crate::operators::local::Output;
use crate::operators::{Halt, Pass, Shared};
use crate::plan::{Fit, Graph, Load, Plan};
use crate::recipe::{Damping, Method, Recipe};
use crate::report::Observer;
use crate::storage::{self, FolderLock};
use crate::system;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// What an unfinished run keeps in the output folder.
pub const WORK_FOLDER: &str = ".quantflow";
/// Provenance of a finished output.
pub const PROVENANCE: &str = "quantflow.json";
/// A row a linear.
pub const REPORT: &str = "quantization_report.jsonl";

/// What to do.
#[derive(Clone, Debug)]
pub struct Job {
    /// The checkpoint's directory.
    pub model: PathBuf,
    /// The output's directory.
    pub output: PathBuf,
    /// Scheme, method, format.
    pub recipe: Recipe,
    /// Batches; empty for round-to-nearest, and where there are statistics.
    pub calibration: Calibration,
    /// Statistics to solve from, instead of forward passes.
    pub statistics: Option<Arc<Artifact>>,
    /// Worker threads.
    pub workers: usize,
    /// Budget of resident bytes; `None` for what the run needs with a small store of activations.
    pub memory: Option<u64>,
    /// Where activations spill; `None` for the output folder.
    pub scratch: Option<PathBuf>,
    /// Bytes of tensor data in a shard.
    pub shard_bytes_max: u64,
    /// Forget an unfinished run, or an earlier output of quantflow, in the output folder.
    pub fresh: bool,
    /// Order in which batches are announced; `None` for their own. Any order gives the same output.
    pub arrival: Option<Vec<usize>>,
    /// Where tensors are, and who works on them.
    pub placement: Placement,
    /// Budget on the device; `None` for what it has free.
    pub device_memory: Option<u64>,
}

/// What was done; `quantize --json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The output's directory.
    pub output: PathBuf,
    /// Name of its format.
    pub format: String,
    /// Wall clock.
    pub elapsed_seconds: f64,
    /// All threads.
    pub cpu_seconds: f64,
    /// Peak resident bytes of the process.
    pub peak_host_bytes: u64,
    /// Peak bytes on the device; 0 on a CPU.
    pub peak_device_bytes: u64,
    /// What the plan predicted.
    pub plan_peak_host_bytes: u64,
    /// The most that operators had asked for at a time: the plan's promise is that it is no more than that.
    pub asked_peak_host_bytes: u64,
    /// What the plan predicted for the device.
    pub plan_peak_device_bytes: u64,
    /// Tokens of the calibration.
    pub calibration_tokens: u64,
    /// Quantized linears.
    pub linears: usize,
    /// Rows that depart from the recipe or lost too much.
    pub fallbacks: usize,
    /// Mean of the rows' relative errors.
    pub relative_error_mean: f64,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Bytes of the output's tensors.
    pub output_bytes: u64,
    /// Blocks that an earlier run of this command had finished.
    pub resumed_blocks: usize,
    /// Linears that were copied from the output that was there before.
    pub reused_linears: usize,
    /// Weights that the source has quantized and the recipe leaves alone, written as their values.
    pub dequantized: usize,
    /// SHA-256 over the bytes of the output's tensors in name order.
    pub output_digest: String,
    /// What the calibration used and left out.
    pub calibration: Usage,
    /// Seconds by operator: see [`crate::report::Clock`].
    pub operators: BTreeMap<&'static str, f64>,
}

impl Job {
    /// From `model` to a new folder `output`, by one worker, without calibration: what else is wanted is set on top.
    pub fn new(model: PathBuf, output: PathBuf, recipe: Recipe) -> Self {
        Self {
            model,
            output,
            recipe,
            calibration: Calibration::default(),
            statistics: None,
            workers: 1,
            memory: None,
            scratch: None,
            shard_bytes_max: 5_000_000_000,
            fresh: false,
            arrival: None,
            placement: Placement::cpu(),
            device_memory: None,
        }
    }

    /// Plans the run; reads headers only.
    pub fn plan(&self) -> Result<(Tower, Plan)> {
        let tower = Tower::open(&self.model, self.placement.clone())?;
        let mut plan = Plan::new(self.recipe.clone(), &tower)?;
        plan.arrange(&self.load(), self.memory, self.device_memory, &self.placement);
        Ok((tower, plan))
    }

    /// What the run carries.
    pub fn load(&self) -> Load {
        let graph = match (self.recipe.method, &self.statistics) {
            (Method::Rtn, _) => Graph::DataFree,
            (Method::Gptq, None) => Graph::Sequential,
            (Method::Gptq, Some(artifact)) => Graph::Solve {
                held_out: artifact.header.origin.holds_out(),
            },
        };
        let tokens = self.calibration.batches.iter().map(|batch| batch.tokens.len());
        Load {
            graph,
            workers: self.placement.workers(self.workers),
            batch_tokens: self.calibration.batch_tokens_max().max(PROBE_TOKENS),
            tokens: tokens.sum(),
            streams: 1 + usize::from(graph == Graph::Sequential && self.recipe.match_original > 0.0),
        }
    }

    /// How the run fits into its budget, or into what the machine has.
    ///
    /// # Errors
    /// `--memory` or `--device-memory` is less than what the run needs without a single resident activation.
    pub fn fit(&self, plan: &Plan) -> Result<Fit> {
        let load = self.load();
        let fit = plan.fit(&load, self.memory, system::available_host_bytes())?;
        plan.fit_device(fit, self.device_memory, &self.placement)
    }

    /// Tokens behind the statistics.
    pub fn calibration_tokens(&self) -> u64 {
        let kept = self.statistics.as_ref();
        let kept = kept.map(|artifact| artifact.header.calibration_tokens());
        kept.unwrap_or(self.calibration.usage.tokens_used)
    }

    /// A digest of everything that decides the output's bytes.
    fn fingerprint(&self, tower: &Tower) -> Result<String> {
        let mut hash = Sha256::new();
        let text = |value: &serde_json::Value| value.to_string();
        hash.update(tower.checkpoint.digest());
        let recipe = serde_json::to_value(&self.recipe);
        hash.update(text(
            &recipe.map_err(|error| Error::invalid("recipe", error.to_string(), ""))?,
        ));
        hash.update(self.shard_bytes_max.to_le_bytes());
        if self.placement.on_device {
            // Other arithmetic: a run that was begun elsewhere is not continued here.
            hash.update(format!("{:?}\n", tower.precision()));
        }
        for batch in &self.calibration.batches {
            hash.update(format!("{}\n", batch.id));
        }
        if let Some(artifact) = &self.statistics {
            hash.update(artifact.header.digest());
        }
        Ok(hex(&hash.finalize()))
    }
}

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
        Some(artifact) => resolve::keys(&plan, artifact)?,
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
    prepare_folder(job)?;
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
    prepare_folder(job)?;
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

/// Makes the output's folder, or refuses one that holds something else.
pub(super) fn expect_own_folder(job: &Job) -> Result<()> {
    let output = &job.output;
    if job.model.canonicalize().ok() == output.canonicalize().ok() && output.exists() {
        return Err(Error::usage(
            "--output",
            "is the checkpoint itself",
            "choose another folder",
        ));
    }
    if !output.exists() {
        return storage::create_folder(output);
    }
    let mut entries = std::fs::read_dir(output).context("list", output)?;
    let ours = output.join(WORK_FOLDER).is_dir() || output.join(PROVENANCE).is_file();
    match entries.next().is_some() && !ours {
        false => Ok(()),
        true => Err(Error::invalid(
            output.display().to_string(),
            "is not empty and not an output of quantflow",
            "choose a new or empty folder",
        )),
    }
}

/// Refuses a folder that holds something else; forgets what `fresh` says.
fn prepare_folder(job: &Job) -> Result<()> {
    let output = &job.output;
    expect_own_folder(job)?;
    // An unfinished run has begun its ledger.
    let finished = output.join(PROVENANCE).is_file() && !output.join(WORK_FOLDER).join("ledger").is_file();
    if (finished || resolve::is_under_way(output)) && !job.fresh {
        return Err(Error::invalid(
            output.display().to_string(),
            "holds a finished checkpoint",
            "choose another folder, or pass --fresh to replace it",
        ));
    }
    if job.fresh {
        for entry in std::fs::read_dir(output).context("list", output)? {
            storage::remove(&entry.context("list", output)?.path())?;
        }
    }
    Ok(())
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
    workers::with_locals(shared.fit.load.workers, shared, move |worker, local| {
        match (method, &statistics) {
            (Method::Rtn, _) => data_free::run(worker, local),
            (Method::Gptq, Some(artifact)) => solve::run(worker, local, artifact),
            (Method::Gptq, None) => sequential::build(worker, local, &order),
        }
    })
}
