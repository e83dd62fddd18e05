//! An output's folder: what lies there, and whose it is.

use super::job::Job;
use crate::error::{Error, IoContext, Result};
use crate::ledger::LEDGER;
use crate::model::Tower;
use crate::storage;
use std::path::Path;

/// What an unfinished run keeps in the output folder.
pub const WORK_FOLDER: &str = ".quantflow";
/// Provenance of a finished output.
pub const PROVENANCE: &str = "quantflow.json";
/// A row a linear.
pub const REPORT: &str = "quantization_report.jsonl";
/// Where the new output grows, in the work folder.
pub(super) const NEXT: &str = "next";
/// Names of the new output's files, in the work folder, once it is complete.
pub(super) const REPLACE: &str = "replace";

/// Makes the output's folder, or refuses one that holds something else.
pub(super) fn expect_own(job: &Job) -> Result<()> {
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
pub(super) fn prepare(job: &Job) -> Result<()> {
    let output = &job.output;
    expect_own(job)?;
    // An unfinished run has begun its ledger.
    let finished = output.join(PROVENANCE).is_file() && !output.join(WORK_FOLDER).join(LEDGER).is_file();
    if (finished || is_under_way(output)) && !job.fresh {
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

/// Whether `output` holds a new output that is not yet in place.
fn is_under_way(output: &Path) -> bool {
    let work = output.join(WORK_FOLDER);
    work.join(NEXT).exists() || work.join(REPLACE).exists()
}

/// Files of a source that an output has, too: tokenizer, processor, chat template, ….
///
/// # Errors
/// The folder cannot be listed.
pub(super) fn side_files(source: &Tower) -> Result<Vec<String>> {
    let mut names = source.checkpoint.side_files()?;
    names.retain(|name| {
        let replaced = ["config.json", "quantize_config.json", PROVENANCE];
        // llm-compressor's record of how the source was quantized would not be true of the output.
        let untrue = source.reader().is_some() && name == "recipe.yaml";
        !replaced.contains(&name.as_str()) && !untrue
    });
    Ok(names)
}
