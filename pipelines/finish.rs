//! The end of a run: everything gets its final name, `config.json` last, and what was done is told.

use super::folder::{PROVENANCE, REPORT, side_files};
use super::job::{Job, Summary};
use crate::error::{Error, Result};
use crate::formats::{CONFIG_KEYS, Reader};
use crate::ledger::Record;
use crate::operators::Shared;
use crate::operators::kept::Solved;
use crate::operators::local::Output;
use crate::report::{self, Row};
use crate::storage;
use crate::system;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a finished run tells beside its tensors.
pub(super) struct Made {
    pub(super) fingerprint: String,
    /// Key of every linear that was solved from statistics, here or before.
    pub(super) solved: Vec<Solved>,
    /// Rows of the linears that were kept, by name.
    pub(super) kept: BTreeMap<String, Row>,
}

/// Digests, gives everything its final name, writes what readers and people want beside the weights; `config.json` last, without
/// which nothing loads the folder.
pub(super) fn finish(
    job: &Job,
    shared: Arc<Shared>,
    made: Made,
    measure: impl FnOnce(&mut Summary),
) -> Result<Summary> {
    let shared = Arc::into_inner(shared).ok_or_else(|| Error::Worker("a worker is still running".into()))?;
    let Shared {
        tower,
        plan,
        output,
        clock,
        observer,
        budget,
        ..
    } = shared;
    let reused_linears = made.kept.len();
    let mut rows = rows(&output);
    rows.extend(made.kept.into_values());
    let place: BTreeMap<&str, usize> = plan.linears.iter().map(|l| (l.name.as_str(), l.index)).collect();
    rows.sort_by_key(|row| place.get(row.name.as_str()).copied());
    let quantized = plan.linears.iter().filter(|linear| linear.grid.is_some()).count();
    if rows.len() != quantized {
        return Err(Error::Worker(format!(
            "{} of {quantized} linears were finished",
            rows.len()
        )));
    }
    observer.phase("finish", 1);
    let writer = output
        .writer
        .ok_or_else(|| Error::Worker("this run writes no checkpoint".into()))?;
    let output_digest = writer.digest()?;
    let dequantized: Vec<&str> = plan
        .dequantized
        .iter()
        .map(|coded| coded.spec.name.as_str())
        .collect();
    let output_bytes = writer
        .layout()
        .tensors()
        .values()
        .map(|at| at.spec.byte_len() as u64)
        .sum();
    writer.finish()?;
    let layouts = plan.layouts();
    let folder = &job.output;
    for (name, content) in plan.format.side_files(&layouts) {
        storage::write_json(&folder.join(name), &content)?;
    }
    for name in side_files(&tower)? {
        storage::copy_whole(&tower.checkpoint.folder().join(&name), &folder.join(&name))?;
    }
    storage::write_whole(&folder.join(REPORT), report::to_json_lines(&rows)?.as_bytes())?;
    let mut summary = Summary {
        output: folder.clone(),
        format: plan.format.name().into(),
        elapsed_seconds: 0.0,
        cpu_seconds: 0.0,
        peak_host_bytes: system::peak_host_bytes(),
        peak_device_bytes: tower.placement().peak_bytes(),
        plan_peak_host_bytes: 0,
        asked_peak_host_bytes: budget.peak(),
        plan_peak_device_bytes: 0,
        calibration_tokens: job.calibration_tokens(),
        linears: rows.len(),
        fallbacks: rows.iter().filter(|row| row.is_warning()).count(),
        relative_error_mean: rows.iter().map(|row| row.relative_error).sum::<f64>()
            / rows.len().max(1) as f64,
        source_bytes: tower.checkpoint.byte_len(),
        output_bytes,
        resumed_blocks: 0,
        reused_linears,
        dequantized: dequantized.len(),
        output_digest,
        calibration: job.calibration.usage.clone(),
        operators: clock.seconds(),
    };
    measure(&mut summary);
    let provenance = serde_json::json!({
        "quantflow": env!("CARGO_PKG_VERSION"),
        "recipe": job.recipe,
        "architecture": tower.spec.architecture,
        "source_quantization": tower.reader().map(Reader::describe),
        "dequantized": dequantized,
        "fingerprint": made.fingerprint,
        "output_digest": summary.output_digest,
        "calibration_tokens": summary.calibration_tokens,
        "batches": job.calibration.batches.iter().map(|batch| batch.id.to_string()).collect::<Vec<_>>(),
        "relative_error_mean": summary.relative_error_mean,
        "solved": made.solved.into_iter().collect::<BTreeMap<_, _>>(),
    });
    storage::write_json(&folder.join(PROVENANCE), &provenance)?;
    let mut config = tower.checkpoint.config().clone();
    forget_quantization(&mut config);
    if let Some(config) = config.as_object_mut() {
        config.insert(
            "quantization_config".into(),
            plan.format.quantization_config(&layouts),
        );
    }
    storage::write_json(&folder.join("config.json"), &config)?;
    observer.advance(1);
    Ok(summary)
}

fn rows(output: &Output) -> Vec<Row> {
    let records = output
        .records
        .lock()
        .map(|records| records.clone())
        .unwrap_or_default();
    let mut blocks: Vec<(u64, Vec<Row>)> = records
        .into_iter()
        .filter_map(|record| match record {
            Record::Block { block, rows } => Some((block, rows)),
            _ => None,
        })
        .collect();
    blocks.sort_by_key(|(block, _)| *block);
    blocks.into_iter().flat_map(|(_, rows)| rows).collect()
}

/// Takes the source's quantization out of a `config.json`.
fn forget_quantization(config: &mut serde_json::Value) {
    for key in CONFIG_KEYS {
        let (parent, key) = key.rsplit_once('/').unwrap_or(("", key));
        if let Some(parent) = config
            .pointer_mut(parent)
            .and_then(|parent| parent.as_object_mut())
        {
            parent.shift_remove(key);
        }
    }
}
