//! The texts that flags name, as a model's tokens.

use super::arguments::{CalibrationArguments, WindowArguments};
use crate::calibration::{self, Calibration, Documents, Source, Usage};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::model::families;
use std::path::Path;

/// Batches to calibrate with.
pub(super) fn calibrate(arguments: &CalibrationArguments, model: &Path) -> Result<Calibration> {
    let vocab_size = vocab_size(model)?;
    match &arguments.calibration_tokens {
        Some(file) => calibration::from_npy(file, vocab_size),
        None => calibration::load(&source(arguments)?, model, vocab_size),
    }
}

/// What the calibration flags name.
fn source(arguments: &CalibrationArguments) -> Result<Source> {
    if arguments.calibration.is_empty() {
        return Err(Error::usage(
            "--calibration",
            "is missing",
            "name a text file (.jsonl, .json, .txt, .csv, .parquet); quantize --method rtn needs none",
        ));
    }
    Ok(Source {
        names: arguments.calibration.clone(),
        dataset_dir: arguments.dataset_dir.clone(),
        samples: arguments.samples,
        length: arguments.length,
        seed: arguments.seed,
        ..Source::default()
    })
}

/// Rows of a checkpoint's embedding, from its config.
pub(super) fn vocab_size(model: &Path) -> Result<usize> {
    Ok(families::parse(Checkpoint::open(model)?.config())?.vocab_size)
}

/// Documents to collect statistics over.
pub(super) fn documents(arguments: &CalibrationArguments, model: &Path) -> Result<Documents> {
    let vocab_size = vocab_size(model)?;
    match &arguments.calibration_tokens {
        Some(file) => calibration::documents_from_npy(file, vocab_size),
        None => calibration::documents(&source(arguments)?, model, vocab_size),
    }
}

/// The windows that `--tokens` or `--text` names; `None` where neither is given.
pub(super) fn windows(model: &Path, arguments: &WindowArguments) -> Result<Option<Calibration>> {
    let vocab_size = vocab_size(model)?;
    let mut windows = match (&arguments.tokens, &arguments.text) {
        (Some(file), _) => calibration::from_npy(file, vocab_size)?,
        (None, Some(file)) => calibration::read_texts(file, model, arguments.length, vocab_size)?,
        (None, None) => return Ok(None),
    };
    if let Some(count) = arguments.windows {
        let length = windows.length_max().max(1);
        let mut tokens: Vec<u32> = windows
            .batches
            .iter()
            .flat_map(|batch| batch.tokens.iter().copied())
            .collect();
        tokens.truncate(count * length);
        windows.batches = calibration::batches(&tokens, length);
    }
    Ok(Some(windows))
}

/// What the user should know of the calibration before the work begins.
pub(super) fn print_notes(usage: &Usage) {
    usage.notes.iter().for_each(|note| eprintln!("note: {note}"));
}
