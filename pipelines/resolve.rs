//! `solve` into a folder that holds an output already: what the recipe and the statistics still ask for is copied from there, the
//! rest is solved. The new output grows beside the old one, which stays whole until then.
//!
//! ```text
//! OUT/                       the old output, until the new one is complete
//! OUT/.quantflow/next/       the new one
//! OUT/.quantflow/replace     its files: from here on the old ones go and the new ones come, whatever breaks off
//! ```

use super::quantize::{self, Job, PROVENANCE, REPORT, Summary, WORK_FOLDER};
use crate::artifact::Artifact;
use crate::checkpoint::{Checkpoint, OutputWriter, hex, read_json};
use crate::error::{Error, IoContext, Result};
use crate::formats::TensorSpec;
use crate::operators::Halt;
use crate::operators::kept::{Solved, kept};
use crate::plan::{Plan, PlannedLinear};
use crate::report::{Observer, Row};
use crate::storage::{self, FolderLock};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the new output grows, in the work folder.
const NEXT: &str = "next";
/// Names of the new output's files, in the work folder, once it is complete.
const REPLACE: &str = "replace";

/// Runs `job`, which has statistics.
///
/// # Errors
/// As [`quantize::quantize`]. The old output stays whole until the new one is, and the same job continues where this one stopped.
pub fn solve(job: &Job, observer: &Arc<dyn Observer>, halt: &Arc<Halt>) -> Result<Summary> {
    let work = job.output.join(WORK_FOLDER);
    if job.fresh {
        return quantize::quantize(job, observer, halt);
    }
    if work.join(REPLACE).is_file() {
        let _lock = FolderLock::acquire(&work, "lock")?;
        replace(&job.output)?;
    }
    let finished = job.output.join(PROVENANCE).is_file() && job.output.join("config.json").is_file();
    if !finished {
        return quantize::quantize(job, observer, halt);
    }
    storage::create_folder(&work)?;
    let lock = FolderLock::acquire(&work, "lock")?;
    let next = Job {
        output: work.join(NEXT),
        ..job.clone()
    };
    let mut summary = quantize::run(&next, Some(&Earlier::open(&job.output)?), observer, halt)?;
    let files: Vec<String> = files(&next.output)?.into_iter().collect();
    storage::write_whole(&work.join(REPLACE), files.join("\n").as_bytes())?;
    replace(&job.output)?;
    drop(lock);
    summary.output.clone_from(&job.output);
    Ok(summary)
}

/// Whether `output` holds a new output that is not yet in place.
pub(super) fn is_under_way(output: &Path) -> bool {
    let work = output.join(WORK_FOLDER);
    work.join(NEXT).exists() || work.join(REPLACE).exists()
}

/// Puts the new output in the place of the old one. May break off anywhere and be called again.
fn replace(output: &Path) -> Result<()> {
    let work = output.join(WORK_FOLDER);
    let list = work.join(REPLACE);
    let names = std::fs::read_to_string(&list).context("read", &list)?;
    let names: BTreeSet<&str> = names.lines().collect();
    let from = |name: &str| work.join(NEXT).join(name);
    // Nothing loads the folder while files of both lie in it; the new config.json is moved last.
    if from("config.json").exists() {
        storage::remove(&output.join("config.json"))?;
    }
    for name in files(output)? {
        if !names.contains(name.as_str()) {
            storage::remove(&output.join(name))?;
        }
    }
    let (last, others): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| **name == "config.json");
    for name in others.into_iter().chain(last) {
        if from(name).exists() {
            storage::rename(&from(name), &output.join(name))?;
        }
    }
    storage::remove(&work)
}

/// Names of what lies in a folder, the work folder aside.
fn files(folder: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(folder).context("list", folder)? {
        let name = entry.context("list", folder)?.file_name();
        names.extend(name.into_string().ok().filter(|name| name != WORK_FOLDER));
    }
    Ok(names)
}

/// A finished output, from which linears are kept.
pub(super) struct Earlier {
    folder: PathBuf,
    checkpoint: Checkpoint,
    held: Vec<Solved>,
}

impl Earlier {
    fn open(folder: &Path) -> Result<Self> {
        let provenance = read_json(&folder.join(PROVENANCE))?;
        // An output of another command, or of another version, holds nothing that can be kept.
        let held = provenance.get("solved").and_then(|solved| solved.as_object());
        let held = held.into_iter().flatten();
        Ok(Self {
            folder: folder.to_owned(),
            checkpoint: Checkpoint::open(folder)?,
            held: held
                .filter_map(|(name, key)| Some((name.clone(), key.as_str()?.to_owned())))
                .collect(),
        })
    }

    /// Marks what `plan` need not solve, and gives its rows of the report by name.
    pub(super) fn keep(&self, plan: &mut Plan, wanted: Vec<Solved>) -> Result<BTreeMap<String, Row>> {
        let kept = kept(wanted, self.held.clone());
        let path = self.folder.join(REPORT);
        let report = std::fs::read_to_string(&path).context("read", &path)?;
        let rows = report
            .lines()
            .filter_map(|line| serde_json::from_str::<Row>(line).ok());
        let mut rows: BTreeMap<String, Row> = rows.map(|row| (row.name.clone(), row)).collect();
        rows.retain(|name, _| kept.contains(name));
        let is_there = |spec: &TensorSpec| self.checkpoint.spec(&spec.name).as_ref() == Some(spec);
        let keep = |linear: &PlannedLinear| {
            rows.contains_key(&linear.name) && plan.tensors(linear).iter().all(is_there)
        };
        let kept: Vec<bool> = plan.linears.iter().map(keep).collect();
        for (linear, kept) in plan.linears.iter_mut().zip(kept) {
            linear.kept = kept;
            if !kept {
                rows.remove(&linear.name);
            }
        }
        Ok(rows)
    }

    /// Copies the tensors of what is kept.
    pub(super) fn copy(&self, plan: &Plan, writer: &OutputWriter) -> Result<()> {
        for linear in plan.linears.iter().filter(|linear| linear.kept) {
            let Some(grid) = linear.grid else { continue };
            let specs = plan.format.specs(&linear.name, linear.rows, linear.columns, grid);
            for spec in specs {
                writer.copy(&spec.name, &self.checkpoint)?;
            }
        }
        Ok(())
    }
}

/// Name and key of every linear that is to have codes: the key is a digest of all that decides them.
///
/// # Errors
/// The artifact has no statistics of a block.
pub(super) fn keys(plan: &Plan, artifact: &Artifact) -> Result<Vec<Solved>> {
    let key = |linear: &PlannedLinear| -> Result<Solved> {
        let file = artifact.header.blocks.get(linear.block).ok_or_else(|| {
            Error::invalid(
                artifact.folder().display().to_string(),
                format!("has no statistics of block {}", linear.block),
                "it is empty, or of a model with fewer blocks",
            )
        })?;
        let recipe = &plan.recipe;
        let decides = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": artifact.header.origin.model,
            "block": file,
            "site": linear.site,
            "grid": linear.grid,
            "actorder": recipe.actorder,
            "damp_percent": recipe.damp_percent,
            "refine_rounds": recipe.refine_rounds(),
            "method": recipe.method,
            "format": recipe.format,
        });
        let digest = hex(&Sha256::digest(decides.to_string()));
        Ok((linear.name.clone(), digest))
    };
    let quantized = plan.linears.iter().filter(|linear| linear.grid.is_some());
    quantized.map(key).collect()
}
