//! Rows of a data file, by number: a file is indexed once (a few bytes a row), then rows are read at their
//! offsets, so that a file of any size can be shuffled without holding it.
//!
//! Owns file kinds and their errors. It must not know what a row means (see `documents`), nor tokens.

mod delimited;
#[cfg(feature = "parquet")]
mod parquet;
mod spans;

use crate::error::{Error, IoContext, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Columns of a row by name, in file order.
pub type Fields = Map<String, Value>;

/// The longest row that is read; a longer one is left out and counted.
pub const MAX_ROW_BYTES: u64 = 64 << 20;

/// The most rows one file may have: the index takes up to 16 bytes a row, so at most 256 MiB.
pub const MAX_ROWS: usize = 1 << 24;

/// A row as it stands in the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// Named columns.
    Fields(Fields),
    /// Plain text, from a .txt file.
    Text(String),
    /// Not usable; the reason counts in the usage report.
    Unusable(&'static str),
}

/// Random access to the rows of one file.
pub trait Rows {
    /// Number of rows.
    fn len(&self) -> usize;

    /// Whether there is no row at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads the rows with these numbers, which ascend; the answer has the same order.
    fn read(&mut self, rows: &[usize]) -> Result<Vec<Row>>;

    /// How many rows are best asked for at once: 1 where a row can be read by its offset alone.
    fn read_ahead(&self) -> usize {
        1
    }
}

/// What a row of a .txt file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextRows {
    /// The whole file is one document (over 16 MiB: cut at line ends). Prose is often wrapped at 80 columns, and a line or
    /// a paragraph alone would be a poor document; so this is what a path given by the user means.
    File,
    /// A line is a row, as LLaMA-Factory reads a .txt that dataset_info.json names.
    Line,
}

/// Opens a data file by its extension.
pub fn open(path: &Path, text: TextRows) -> Result<Box<dyn Rows>> {
    let extension = path
        .extension()
        .map(|e| e.to_string_lossy().to_ascii_lowercase())
        .unwrap_or_default();
    Ok(match extension.as_str() {
        "txt" | "text" | "md" => Box::new(spans::SpanRows::text(path, text)?),
        "json" | "jsonl" | "ndjson" => Box::new(spans::SpanRows::json(path)?),
        "csv" => Box::new(delimited::DelimitedRows::open(path, b',')?),
        "tsv" => Box::new(delimited::DelimitedRows::open(path, b'\t')?),
        "parquet" => open_parquet(path)?,
        _ => {
            return Err(Error::invalid(
                path.display().to_string(),
                "not a known kind of data file",
                "calibration reads .jsonl, .json, .txt, .csv, .tsv and .parquet",
            ));
        }
    })
}

#[cfg(feature = "parquet")]
fn open_parquet(path: &Path) -> Result<Box<dyn Rows>> {
    Ok(Box::new(parquet::ParquetRows::open(path)?))
}

#[cfg(not(feature = "parquet"))]
fn open_parquet(path: &Path) -> Result<Box<dyn Rows>> {
    Err(Error::invalid(
        path.display().to_string(),
        "this quantflow was built without parquet",
        "build it with `cargo build --release --features parquet`, or convert the file to .jsonl",
    ))
}

/// The files that `path` stands for: itself, or the data files directly in it, by name.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let kind = std::fs::metadata(path).context("read", path)?;
    if !kind.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    const KNOWN: [&str; 7] = ["jsonl", "ndjson", "json", "txt", "csv", "tsv", "parquet"];
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).context("read", path)? {
        let file = entry.context("read", path)?.path();
        let known = file
            .extension()
            .is_some_and(|e| KNOWN.iter().any(|k| e.eq_ignore_ascii_case(k)));
        let is_info = file.file_name().is_some_and(|n| n == "dataset_info.json");
        if known && !is_info && file.is_file() {
            found.push(file);
        }
    }
    found.sort();
    if found.is_empty() {
        return Err(Error::invalid(
            path.display().to_string(),
            "the folder holds no data file",
            "calibration reads .jsonl, .json, .txt, .csv, .tsv and .parquet",
        ));
    }
    Ok(found)
}

pub(super) fn too_many_rows(path: &Path) -> Error {
    Error::invalid(
        path.display().to_string(),
        format!("more than {MAX_ROWS} rows"),
        "split the file; a few thousand rows are plenty for calibration",
    )
}

pub(super) const TOO_LONG: &str = "the row is longer than 64 MiB";
pub(super) const NOT_AN_OBJECT: &str = "the row is not a JSON object";
