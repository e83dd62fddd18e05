//! Small files of a checkpoint or dataset, read whole and bounded.

use crate::error::{Error, IoContext, Result};
use std::io::Read;
use std::path::Path;

/// The bytes of a file of at most `max` bytes; `None` if there is no such file.
pub(super) fn read_small(path: &Path, max: u64) -> Result<Option<Vec<u8>>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.context("read", path)?,
    };
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes).context("read", path)?;
    if bytes.len() as u64 > max {
        return Err(Error::invalid(
            path.display().to_string(),
            format!("larger than {} MiB", max >> 20),
            "this is not the file it should be",
        ));
    }
    Ok(Some(bytes))
}

/// A JSON file of at most 16 MiB; `None` if there is no such file.
pub(super) fn read_json(path: &Path) -> Result<Option<serde_json::Value>> {
    let Some(bytes) = read_small(path, 16 << 20)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|problem| {
        Error::invalid(
            path.display().to_string(),
            format!("malformed JSON: {problem}"),
            "fetch the file again",
        )
    })
}
