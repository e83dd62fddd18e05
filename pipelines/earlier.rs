//! What an output that is there already holds of a new one.

use super::folder::{PROVENANCE, REPORT};
use crate::artifact::Artifact;
use crate::checkpoint::{Checkpoint, OutputWriter, hex, read_json};
use crate::error::{Error, IoContext, Result};
use crate::formats::TensorSpec;
use crate::operators::kept::{Solved, kept};
use crate::plan::{Plan, PlannedLinear};
use crate::report::Row;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A finished output, from which linears are kept.
pub(super) struct Earlier {
    folder: PathBuf,
    checkpoint: Checkpoint,
    held: Vec<Solved>,
}

impl Earlier {
    pub(super) fn open(folder: &Path) -> Result<Self> {
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
