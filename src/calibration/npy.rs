//! Token ids from a NumPy file: `--calibration-tokens` and evaluate's `--tokens`.
//!
//! The header is read here, not by npyz: that one recurses and multiplies without bounds, and the file may be hostile.

use super::usage::{SourceUsage, Usage};
use crate::error::{Error, IoContext, Result};
use std::io::{BufReader, Read};
use std::path::Path;

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// NumPy pads headers to a multiple of 64 bytes; those of integer arrays have about 128.
const MAX_HEADER_BYTES: usize = 1 << 16;

/// Token ids as they stand in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenArray {
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
    /// Row-major.
    pub tokens: Vec<u32>,
}

/// The account of a file of which every sequence is used.
pub(super) fn usage(path: &Path, array: &TokenArray) -> Usage {
    let name = path.file_name().unwrap_or_default();
    let sequences = array.sequences as u64;
    Usage {
        sources: vec![SourceUsage {
            name: name.to_string_lossy().into_owned(),
            rows: sequences,
            used: sequences,
        }],
        documents_found: sequences,
        documents_read: sequences,
        documents_used: sequences,
        windows_wanted: sequences,
        windows_used: sequences,
        tokens_used: array.tokens.len() as u64,
        ..Usage::default()
    }
}

/// Reads an int32 or int64 array of `[sequences, length]` in C order, ids below `vocab_size`.
pub(super) fn read(path: &Path, vocab_size: usize) -> Result<TokenArray> {
    let file = std::fs::File::open(path).context("read", path)?;
    let bytes = file.metadata().context("read", path)?.len();
    parse(BufReader::new(file), bytes, vocab_size, path)
}

fn parse(mut from: impl Read, bytes: u64, vocab_size: usize, path: &Path) -> Result<TokenArray> {
    let bad = |problem: String| {
        Error::invalid(
            path.display().to_string(),
            problem,
            "save it with numpy.save: int32 or int64, shape [sequences, length], C order",
        )
    };
    let mut start = [0; 8];
    from.read_exact(&mut start)
        .map_err(|_| bad("not a .npy file".into()))?;
    if !start.starts_with(MAGIC) {
        return Err(bad("not a .npy file".into()));
    }
    let (header_bytes, prefix) = match start[6] {
        1 => {
            let mut size = [0; 2];
            from.read_exact(&mut size).context("read", path)?;
            (u16::from_le_bytes(size) as usize, 10)
        }
        2 | 3 => {
            let mut size = [0; 4];
            from.read_exact(&mut size).context("read", path)?;
            (u32::from_le_bytes(size) as usize, 12)
        }
        version => return Err(bad(format!(".npy version {version} is not known"))),
    };
    if header_bytes > MAX_HEADER_BYTES {
        return Err(bad(format!("a header of {header_bytes} bytes")));
    }
    let mut header = vec![0; header_bytes];
    from.read_exact(&mut header)
        .map_err(|_| bad("the file ends in its header".into()))?;
    let header = String::from_utf8_lossy(&header);
    let item = match value(&header, "descr").map(|v| v.trim_matches(['\'', '"'])) {
        Some("<i4") => 4,
        Some("<i8") => 8,
        other => {
            let dtype = other.unwrap_or("unknown").chars().take(20).collect::<String>();
            return Err(bad(format!("the dtype is {dtype}")));
        }
    };
    match value(&header, "fortran_order") {
        Some("False") => {}
        Some("True") => return Err(bad("the array is in Fortran order".into())),
        _ => return Err(bad("the header has no fortran_order".into())),
    }
    let shape = value(&header, "shape").unwrap_or_default();
    let sizes: Option<Vec<u64>> = shape
        .trim_matches(['(', ')'])
        .split(',')
        .map(str::trim)
        .filter(|size| !size.is_empty())
        .map(|size| size.parse().ok())
        .collect();
    let Some([sequences, length]) = sizes.as_deref() else {
        let shape: String = shape.chars().take(60).collect();
        return Err(bad(format!("the shape is {shape}, not [sequences, length]")));
    };
    let count = sequences.checked_mul(*length).unwrap_or(u64::MAX);
    if count == 0 || count > super::MAX_TOKENS as u64 {
        return Err(bad(format!(
            "shape [{sequences}, {length}] holds no tokens, or more than {}",
            super::MAX_TOKENS
        )));
    }
    let expected = prefix + header_bytes as u64 + count * item;
    if bytes != expected {
        return Err(bad(format!("{bytes} bytes, but the header describes {expected}")));
    }
    let length = *length as usize;
    let mut tokens = Vec::with_capacity(count as usize);
    let mut id = [0; 8];
    for at in 0..count as usize {
        from.read_exact(&mut id[..item as usize]).context("read", path)?;
        let found = match item {
            4 => i64::from(i32::from_le_bytes([id[0], id[1], id[2], id[3]])),
            _ => i64::from_le_bytes(id),
        };
        match u32::try_from(found) {
            Ok(id) if (id as usize) < vocab_size => tokens.push(id),
            _ => {
                return Err(Error::invalid(
                    path.display().to_string(),
                    format!(
                        "id {found} at [{}, {}] is not in 0..{vocab_size}",
                        at / length,
                        at % length
                    ),
                    "make the file with this model's tokenizer; padding ids like -100 have no place in it",
                ));
            }
        }
    }
    Ok(TokenArray {
        sequences: *sequences as usize,
        length,
        tokens,
    })
}

/// The text of a key's value in the header, which is a Python dict of known keys.
fn value<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    let at = [format!("'{key}'"), format!("\"{key}\"")]
        .iter()
        .find_map(|quoted| Some(header.find(quoted)? + quoted.len()))?;
    let rest = header[at..].trim_start().strip_prefix(':')?.trim_start();
    let end = match rest.starts_with('(') {
        true => rest.find(')')? + 1,
        false => rest.find([',', '}'])?,
    };
    Some(rest[..end].trim())
}

#[cfg(test)]
#[path = "npy_tests.rs"]
mod tests;
