//! `solve` into a folder that holds an output already: what the recipe and the statistics still ask for is copied from there, the
//! rest is solved. The new output grows beside the old one, which stays whole until then.
//!
//! ```text
//! OUT/                       the old output, until the new one is complete
//! OUT/.quantflow/next/       the new one
//! OUT/.quantflow/replace     its files: from here on the old ones go and the new ones come, whatever breaks off
//! ```

use super::earlier::Earlier;
use super::folder::{NEXT, PROVENANCE, REPLACE, WORK_FOLDER};
use super::job::{Job, Summary};
use super::quantize;
use crate::error::{IoContext, Result};
use crate::operators::Halt;
use crate::report::Observer;
use crate::storage::{self, FolderLock};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

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
