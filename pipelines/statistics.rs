//! The statistics artifact: the calibration set as a collection that changes, its sums by full-precision forward passes.
//!
//! ```text
//! documents held ─┐
//! documents ± 1 ──┴─► groups (differential) ─► groups ± 1 ─► batches ± 1
//!                                                              │ exchange
//!          (what is done) replay ◄─ embed ◄────────────────────┘
//!                             │ Go
//!   ┌──── time = step, a position in the plan ───────────────────────────────┐
//!   │                         ▼                                              │
//!   │  ┌──────────────────► concat ─► forward ─► accumulate ─[frontier]─┐    │
//!   │  │                                      sums, on the block's owner │    │
//!   │  └─ step + 1 ◄────────broadcast───────── keep ◄────────────────────┘    │
//!   └────────────────────────────────────────────┼───────────────────────────┘
//!                                                ▼
//!                             block files, synced ─► ledger ─► statistics.json
//! ```
//! Only the batches that come or go are run. Sums are integers: what is taken away leaves no trace.

use super::folder::WORK_FOLDER;
use super::run;
use crate::artifact::{Artifact, FULL_PRECISION, HEADER, Header, Held, Origin};
use crate::calibration::{
    self, Batch, ContentId, Documents, PROBE_TOKENS, Placed, Tokens, Usage, tokenizer_digest,
};
use crate::checkpoint::hex;
use crate::device::Placement;
use crate::error::{Error, IoContext, Result};
use crate::ledger::Record;
use crate::memory::Room;
use crate::model::Tower;
use crate::operators::accumulate::accumulate;
use crate::operators::embed::embed;
use crate::operators::forward::forward;
use crate::operators::groups::changed_groups;
use crate::operators::keep::keep;
use crate::operators::local::Output;
use crate::operators::replay::replay;
use crate::operators::{Halt, Local, Pass, Shared};
use crate::plan::{Graph, Load, Plan};
use crate::report::Observer;
use crate::storage::{self, FolderLock};
use crate::system;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use timely::dataflow::operators::vec::ToStream;
use timely::dataflow::operators::{Concat, ConnectLoop, Feedback};
use timely::worker::Worker;

/// What to do with the documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Begin an artifact with them.
    Collect,
    /// Add them to the artifact.
    Add,
    /// Take them out of it.
    Retract,
}

/// A change of an artifact.
#[derive(Clone, Debug)]
pub struct Job {
    /// The checkpoint's directory.
    pub model: PathBuf,
    /// The artifact's directory.
    pub folder: PathBuf,
    /// What to do.
    pub change: Change,
    /// With these.
    pub documents: Documents,
    /// Share of the batches to keep apart, with [`Change::Collect`]; else the artifact says.
    pub held_out: f64,
    /// Sum each expert's statistics over all tokens, with [`Change::Collect`]; else the artifact says.
    pub all_experts: bool,
    /// Worker threads.
    pub workers: usize,
    /// Budget of resident bytes.
    pub memory: Option<u64>,
    /// Where activations spill; `None` for the artifact's folder.
    pub scratch: Option<PathBuf>,
    /// Forget an unfinished change; with [`Change::Collect`], an earlier artifact, too.
    pub fresh: bool,
    /// Where tensors are, and who works on them.
    pub placement: Placement,
    /// Budget on the device; `None` for what it has free.
    pub device_memory: Option<u64>,
}

impl Job {
    /// `change` of the artifact `folder` of `model` by `documents`, by one worker: what else is wanted is set on top.
    pub fn new(model: PathBuf, folder: PathBuf, change: Change, documents: Documents) -> Self {
        Self {
            model,
            folder,
            change,
            documents,
            held_out: 0.0,
            all_experts: false,
            workers: 1,
            memory: None,
            scratch: None,
            fresh: false,
            placement: Placement::cpu(),
            device_memory: None,
        }
    }
}

/// What was done, and what the artifact holds now.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The artifact's directory.
    pub folder: PathBuf,
    /// Of the sums and batch ids.
    pub digest: String,
    /// Held now.
    pub documents: usize,
    /// Held now, each as often as it counts.
    pub batches: u64,
    /// Held now.
    pub tokens: u64,
    /// Batches that were run for this change.
    pub batches_run: usize,
    /// Blocks that an earlier run of this command had finished.
    pub resumed_blocks: usize,
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
    /// What the plan predicted for the device.
    pub plan_peak_device_bytes: u64,
    /// The most that operators had asked for at a time: the plan's promise is that it is no more than that.
    pub asked_peak_host_bytes: u64,
    /// What was read and what was left out.
    pub calibration: Usage,
    /// Seconds by operator: see [`crate::report::Clock`].
    pub operators: BTreeMap<&'static str, f64>,
}

/// Builds the graph on a worker.
fn build(worker: &mut Worker, local: &Rc<Local>, artifact: &Arc<Artifact>, work: &Path) {
    let batches: Vec<(u64, usize)> = match local.index {
        0 => (0..local.shared.batches.len())
            .map(|at| (at as u64, at))
            .collect(),
        _ => Vec::new(),
    };
    let local = || Rc::clone(local);
    worker.dataflow_named("statistics", |scope| {
        let (next, cycle) = scope.feedback(1);
        let begun = replay(embed(batches.to_stream(scope), local()), local());
        let steps = begun.concat(cycle);
        let inputs = forward(steps, local());
        let sums = accumulate(inputs, local());
        keep(sums, local(), Arc::clone(artifact), work.to_owned()).connect_loop(next);
    });
}

/// Runs `job`.
///
/// # Errors
/// Documents that are already held, or are not; another model's artifact; whatever can go wrong on the way. The artifact is then as
/// it was, and the same job continues where this one stopped.
pub fn update(job: &Job, observer: &Arc<dyn Observer>, halt: &Arc<Halt>) -> Result<Summary> {
    let begin = (Instant::now(), system::process_cpu());
    let tower = Tower::open(&job.model, job.placement.clone())?;
    let mut plan = Plan::for_statistics(&tower, job.all_experts)?;
    let mut artifact = open(job, origin(&tower, job)?)?;
    plan.recipe.all_experts = artifact.header.origin.all_experts;
    let separator = separator(&job.model, tower.spec.vocab_size)?;
    let groups = changed_groups(artifact.header.documents.clone(), changes(job, &artifact.header)?);
    let mut batches = batches(&groups, &job.documents, separator)?;
    for batch in &mut batches {
        batch.held_out = batch.id.is_held_out(artifact.header.origin.held_out);
    }
    let after = header_after(&artifact, &groups, &batches)?;
    let length = batches.iter().map(|batch| batch.length).max().unwrap_or(0);
    tower.expect_length(length)?;
    let tokens: Vec<usize> = batches.iter().map(|batch| batch.tokens.len()).collect();
    let load = Load {
        graph: Graph::Statistics {
            held_out: artifact.header.origin.holds_out(),
        },
        workers: job.placement.workers(job.workers),
        batch_tokens: tokens.iter().copied().max().unwrap_or(0).max(PROBE_TOKENS),
        tokens: tokens.iter().sum(),
        streams: 1,
    };
    plan.arrange(&load, job.memory, job.device_memory, &job.placement);
    let fit = plan.fit(&load, job.memory, system::available_host_bytes())?;
    let fit = plan.fit_device(fit, job.device_memory, &job.placement)?;
    // What is made of damaged sums would have a name that vouches for them. All of them are read: after what is refused at once.
    artifact.verify()?;
    let planned = (fit.peak_host_bytes, fit.peak_device_bytes);
    let work = job.folder.join(WORK_FOLDER);
    if job.fresh {
        storage::remove(&work)?;
    }
    storage::create_folder(&work)?;
    let _lock = FolderLock::acquire(&work, "lock")?;
    let fingerprint = fingerprint(&artifact.header, &batches);
    let output = Output::open(&work, &fingerprint)?;
    let resumed_blocks = output.resume(plan.blocks(), observer.as_ref());
    let scratch = job.scratch.as_deref().unwrap_or(&work);
    let shared = Arc::new(Shared {
        batches,
        pass: Pass::Original(artifact.header.origin.products()),
        ..Shared::new((tower, length), (plan, fit), scratch, output, observer, halt)?
    });
    if resumed_blocks < shared.plan.blocks() && !shared.batches.is_empty() {
        shared.begin("statistics", shared.plan.block_steps(resumed_blocks).start);
        let (base, folder) = (Arc::new(artifact.clone()), work.clone());
        run::with_locals(&shared, move |worker, local| {
            build(worker, local, &base, &folder);
        })?;
    }
    let blocks = files(&shared.output, shared.plan.blocks())?;
    artifact.commit(Header { blocks, ..after })?;
    storage::remove(&work)?;
    let header = &artifact.header;
    Ok(Summary {
        folder: job.folder.clone(),
        digest: header.digest(),
        documents: header.documents.len(),
        batches: header.batch_count(),
        tokens: header.tokens(),
        batches_run: shared.batches.len(),
        resumed_blocks,
        elapsed_seconds: begin.0.elapsed().as_secs_f64(),
        cpu_seconds: (system::process_cpu() - begin.1).as_secs_f64(),
        peak_host_bytes: system::peak_host_bytes(),
        peak_device_bytes: job.placement.peak_bytes(),
        plan_peak_host_bytes: planned.0,
        plan_peak_device_bytes: planned.1,
        asked_peak_host_bytes: shared.budget.peak(),
        calibration: job.documents.usage.clone(),
        operators: shared.clock.seconds(),
    })
}

/// Adds the artifacts in `parts` up into a new one in `folder`.
///
/// # Errors
/// They are of different models, or share a document or a batch; `folder` is not empty.
pub fn merge_artifacts(parts: &[PathBuf], folder: &Path, fresh: bool) -> Result<Artifact> {
    let parts: Vec<Artifact> = parts
        .iter()
        .map(|part| Artifact::open(part))
        .collect::<Result<_>>()?;
    let Some((first, others)) = parts.split_first() else {
        return Err(Error::usage("DIR", "names no artifact", "name two or more"));
    };
    let subject = |part: &Artifact| part.folder().display().to_string();
    // --fresh empties the folder: it must not be what is read.
    let place = folder.canonicalize().ok();
    if place.is_some()
        && parts
            .iter()
            .any(|part| part.folder().canonicalize().ok() == place)
    {
        return Err(Error::usage(
            "--output",
            "is one of the parts",
            "choose another folder",
        ));
    }
    let mut header = first.header.clone();
    for part in others {
        header.expect(&subject(part), &part.header.origin)?;
        if header.blocks.len() != part.header.blocks.len() {
            return Err(Error::invalid(subject(part), "has another number of blocks", ""));
        }
        for (id, held) in &part.header.batches {
            if header.batches.insert(*id, *held).is_some() {
                return Err(held_already(&subject(part), *id));
            }
        }
        let shift = sources(&header);
        // Token ids may come as often as they like; their batches are told apart above.
        let texts = |header: &Header| -> BTreeSet<ContentId> {
            let texts = header.documents.iter().filter(|document| !document.exact);
            texts.map(|document| document.id).collect()
        };
        let held = texts(&header);
        for document in &part.header.documents {
            if !document.exact && held.contains(&document.id) {
                return Err(Error::invalid(
                    subject(part),
                    format!("holds document {}, which another part holds, too", document.id),
                    "retract it from one of them first",
                ));
            }
            header.documents.push(Placed {
                source: document.source + shift,
                ..*document
            });
        }
    }
    parts.iter().try_for_each(Artifact::verify)?;
    prepare_new(folder, fresh)?;
    // Until it is whole, the folder is known as ours.
    let work = folder.join(WORK_FOLDER);
    storage::create_folder(&work)?;
    let _lock = FolderLock::acquire(&work, "lock")?;
    let mut merged = Artifact::new(folder, header.clone());
    let room = Room::Scratch(work.as_path().into());
    for block in 0..header.blocks.len() {
        let sites = first.sites(block)?;
        let mut file = merged.block_writer(&work, block, sites.clone())?;
        for (site, _) in sites {
            let mut total = first.site(block, site, &room)?;
            for part in others {
                total.merge(&part.site(block, site, &room)?)?;
            }
            file.add(site, &total)?;
        }
        header.blocks[block] = file.finish()?;
    }
    merged.commit(header)?;
    storage::remove(&work)?;
    Ok(merged)
}

/// What decides whether sums add up.
///
/// # Errors
/// The tokenizer cannot be read.
fn origin(tower: &Tower, job: &Job) -> Result<Origin> {
    let model = &job.model;
    if !(0.0..=0.5).contains(&job.held_out) {
        return Err(Error::usage(
            "--held-out",
            "must be between 0 and 0.5",
            "0.1 keeps a tenth apart",
        ));
    }
    let tokenizer = model.join("tokenizer.json").is_file();
    Ok(Origin {
        model: tower.checkpoint.digest(),
        tokenizer: tokenizer.then(|| tokenizer_digest(model)).transpose()?,
        prefix: FULL_PRECISION.into(),
        arithmetic: tower.placement().arithmetic(),
        probe_tokens: PROBE_TOKENS,
        held_out: job.held_out,
        all_experts: job.all_experts,
    })
}

fn open(job: &Job, origin: Origin) -> Result<Artifact> {
    if job.change == Change::Collect {
        prepare_new(&job.folder, job.fresh)?;
        return Ok(Artifact::new(&job.folder, Header::new(origin)));
    }
    let artifact = Artifact::open(&job.folder)?;
    let Origin {
        held_out,
        all_experts,
        ..
    } = artifact.header.origin;
    let origin = Origin {
        held_out,
        all_experts,
        ..origin
    };
    artifact
        .header
        .expect(&job.folder.display().to_string(), &origin)?;
    Ok(artifact)
}

/// A folder for a new artifact: not there, empty, or holding an unfinished collection.
fn prepare_new(folder: &Path, fresh: bool) -> Result<()> {
    storage::create_folder(folder)?;
    let subject = || folder.display().to_string();
    let held = folder.join(HEADER).is_file();
    let unfinished = folder.join(WORK_FOLDER).is_dir();
    if held && !fresh {
        return Err(Error::invalid(
            subject(),
            "holds an artifact already",
            "quantflow statistics add puts documents into it; --fresh replaces it",
        ));
    }
    let entries = std::fs::read_dir(folder).context("list", folder)?;
    let names: Vec<PathBuf> = entries
        .map(|entry| Ok(entry.context("list", folder)?.path()))
        .collect::<Result<_>>()?;
    if !names.is_empty() && !held && !unfinished {
        return Err(Error::invalid(
            subject(),
            "is not empty and holds no artifact",
            "choose a new or empty folder",
        ));
    }
    if fresh {
        names.iter().try_for_each(|path| storage::remove(path))?;
    }
    Ok(())
}

/// The token between documents of a group.
fn separator(model: &Path, vocab_size: usize) -> Result<Option<u32>> {
    match model.join("tokenizer.json").is_file() {
        true => Ok(Tokens::open(model, vocab_size)?.eos()),
        // Without a tokenizer only token ids can be given, which are never joined.
        false => Ok(None),
    }
}

/// Numbers of sources that are taken.
fn sources(header: &Header) -> u32 {
    let highest = header.documents.iter().map(|document| document.source).max();
    highest.map_or(0, |source| source + 1)
}

/// The documents that come and go.
fn changes(job: &Job, header: &Header) -> Result<Vec<(Placed, isize)>> {
    let given = &job.documents.placed;
    if job.change != Change::Retract {
        let shift = sources(header);
        let shifted = |document: &Placed| Placed {
            source: document.source + shift,
            ..*document
        };
        return Ok(given.iter().map(|document| (shifted(document), 1)).collect());
    }
    let mut held: BTreeMap<(ContentId, bool), Vec<Placed>> = BTreeMap::new();
    for document in header.documents.iter().rev() {
        held.entry((document.id, document.exact))
            .or_default()
            .push(*document);
    }
    let absent = |document: &Placed| {
        Error::invalid(
            job.folder.display().to_string(),
            format!(
                "does not hold document {} (row {} of what was given, {} tokens)",
                document.id, document.row, document.tokens
            ),
            "give the same files and flags with which the documents were added",
        )
    };
    let find = |document: &Placed| {
        let found = held.get_mut(&(document.id, document.exact)).and_then(Vec::pop);
        Ok((found.ok_or_else(|| absent(document))?, -1))
    };
    given.iter().map(find).collect()
}

/// The batches of the groups that come and go, by id; those that do both drop out.
fn batches(
    groups: &[(Vec<Placed>, isize)],
    documents: &Documents,
    separator: Option<u32>,
) -> Result<Vec<Batch>> {
    let mut changed: BTreeMap<ContentId, Batch> = BTreeMap::new();
    for (group, diff) in groups {
        let texts = group.iter().map(|document| {
            let tokens = documents.tokens.get(&document.id).map(Vec::as_slice);
            tokens.ok_or_else(|| {
                Error::invalid(
                    format!("document {}", document.id),
                    "is packed with documents that are taken away, and was not given",
                    "retract the files that were added together, then add again what should stay",
                )
            })
        });
        let length = group.first().map_or(0, |document| document.length as usize);
        for batch in calibration::pack(&texts.collect::<Result<Vec<_>>>()?, length, separator) {
            let multiplicity = *diff as i64;
            changed
                .entry(batch.id)
                .and_modify(|known| known.multiplicity += multiplicity)
                .or_insert(Batch {
                    multiplicity,
                    ..batch
                });
        }
    }
    let mut changed: Vec<Batch> = changed
        .into_values()
        .filter(|batch| batch.multiplicity != 0)
        .collect();
    for (index, batch) in changed.iter_mut().enumerate() {
        batch.index = index;
    }
    Ok(changed)
}

/// What the artifact will hold, but for the names of the block files.
fn header_after(artifact: &Artifact, groups: &[(Vec<Placed>, isize)], batches: &[Batch]) -> Result<Header> {
    let mut header = artifact.header.clone();
    let subject = artifact.folder().display().to_string();
    if batches.is_empty() {
        return Err(Error::invalid(
            subject,
            "holds all these documents already",
            "nothing was changed",
        ));
    }
    for batch in batches {
        let (id, held) = (batch.id, header.batches.get(&batch.id).copied());
        let before = held.map_or(0, |held| held.multiplicity);
        if batch.multiplicity > 0 && before > 0 {
            return Err(held_already(&subject, id));
        }
        let Some(multiplicity) = before.checked_add_signed(batch.multiplicity) else {
            return Err(Error::invalid(
                subject,
                format!("does not hold batch {id}"),
                "give the same files and flags with which it was added",
            ));
        };
        let tokens = batch.tokens.len() as u64;
        match multiplicity {
            0 => header.batches.remove(&id),
            _ => header.batches.insert(id, Held { multiplicity, tokens }),
        };
    }
    for (group, _) in groups.iter().filter(|(_, diff)| *diff < 0) {
        header.documents.retain(|document| !group.contains(document));
    }
    for (group, _) in groups.iter().filter(|(_, diff)| *diff > 0) {
        header.documents.extend_from_slice(group);
    }
    header.documents.sort_unstable();
    Ok(header)
}

fn held_already(subject: &str, id: ContentId) -> Error {
    Error::invalid(
        subject,
        format!("holds batch {id} already"),
        "a batch counts once: nothing was changed",
    )
}

fn fingerprint(header: &Header, batches: &[Batch]) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("{:?}\n{}\n", header.origin, header.digest()));
    for batch in batches {
        hash.update(format!("{} {}\n", batch.id, batch.multiplicity));
    }
    hex(&hash.finalize())
}

/// The block files of a finished run.
fn files(output: &Output, blocks: usize) -> Result<Vec<String>> {
    let records = output
        .records
        .lock()
        .map(|records| records.clone())
        .unwrap_or_default();
    let mut files = vec![String::new(); blocks];
    for record in records {
        if let Record::Statistics { block, file } = record
            && let Some(place) = files.get_mut(block as usize)
        {
            *place = file;
        }
    }
    match files.iter().position(String::is_empty) {
        None => Ok(files),
        Some(block) => Err(Error::Worker(format!("block {block} was not finished"))),
    }
}
