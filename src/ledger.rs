//! Durable facts of a run: "this block is done, with these rows". An append-only file of length, checksum and record,
//! synced after the data that a record speaks of. Resume and the report read it.

use crate::error::{Error, IoContext, Result};
use crate::report::Row;
use crate::storage::AppendFile;
use bincode::{Decode, Encode, config};
use sha2::{Digest, Sha256};
use std::path::Path;

/// Its name, in a run's work folder.
pub const LEDGER: &str = "ledger";
/// Before each record: its length, the length's complement (a damaged length would else look like a torn tail), its checksum.
const FRAME_BYTES: usize = 4 + 4 + 8;
/// Largest record: the rows of a block with thousands of experts stay far below.
const RECORD_BYTES_MAX: usize = 64 << 20;

/// A fact.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Record {
    /// First record: what run this is, as a digest of everything that decides its output.
    Run {
        /// Hex digest.
        fingerprint: String,
    },
    /// The tensors that are copied byte for byte are in place.
    Copied,
    /// A block's tensors are in place.
    Block {
        /// Decoder layer.
        block: u64,
        /// Report rows of its linears.
        rows: Vec<Row>,
    },
    /// A block's statistics are in place.
    Statistics {
        /// Decoder layer.
        block: u64,
        /// Name of their file.
        file: String,
    },
}

/// The ledger of one output folder.
#[derive(Debug)]
pub struct Ledger {
    file: AppendFile,
}

impl Ledger {
    /// Opens the ledger at `path`, or begins one for the run `fingerprint`; returns the facts after the first.
    ///
    /// A torn tail, from a crash within an append, is cut off.
    ///
    /// # Errors
    /// The ledger belongs to another run, or is damaged before its tail.
    pub fn open(path: &Path, fingerprint: &str) -> Result<(Self, Vec<Record>)> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error).context("read", path),
        };
        let (mut records, kept) = parse(path, &bytes)?;
        let mut ledger = Self {
            file: AppendFile::open(path, kept as u64)?,
        };
        if records.is_empty() {
            ledger.append(&Record::Run {
                fingerprint: fingerprint.into(),
            })?;
            return Ok((ledger, records));
        }
        match records.remove(0) {
            Record::Run { fingerprint: found } if found == fingerprint => Ok((ledger, records)),
            _ => Err(Error::invalid(
                path.display().to_string(),
                "the unfinished run in this folder has another recipe, calibration or checkpoint",
                "repeat its command to continue it, or pass --fresh to forget it",
            )),
        }
    }

    /// The facts of a ledger, without opening it for a run.
    pub fn peek(path: &Path) -> Result<Vec<Record>> {
        let bytes = std::fs::read(path).context("read", path)?;
        Ok(parse(path, &bytes)?.0)
    }

    /// Appends a fact; it is durable when this returns.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let body = bincode::encode_to_vec(record, config::standard())
            .map_err(|error| Error::invalid("ledger", error.to_string(), ""))?;
        let length = body.len() as u32;
        let mut frame = length.to_le_bytes().to_vec();
        frame.extend((!length).to_le_bytes());
        frame.extend(checksum(&body));
        frame.extend(body);
        self.file.append(&frame)
    }
}

/// The records of a ledger's bytes, and how many bytes they take: the rest is a torn tail.
fn parse(path: &Path, bytes: &[u8]) -> Result<(Vec<Record>, usize)> {
    let mut records = Vec::new();
    let mut at = 0;
    while bytes.len() - at >= FRAME_BYTES {
        let (frame, rest) = bytes[at..].split_at(FRAME_BYTES);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0u32, |n, &b| n << 8 | u32::from(b));
        let (length, complement) = (number(&frame[..4]), number(&frame[4..8]));
        let damaged = || {
            Error::invalid(
                path.display().to_string(),
                format!("is damaged at byte {at}"),
                "the disk or another program changed it: pass --fresh to begin again",
            )
        };
        let length = match length == !complement && length as usize <= RECORD_BYTES_MAX {
            true => length as usize,
            false => return Err(damaged()),
        };
        let Some(body) = rest.get(..length) else { break };
        let record = (checksum(body) == frame[8..])
            .then(|| bincode::decode_from_slice::<Record, _>(body, config::standard()).ok())
            .flatten();
        match record {
            Some((record, _)) => records.push(record),
            // The system may have made the file longer before the bytes came.
            None if rest.len() == length => break,
            None => return Err(damaged()),
        }
        at += FRAME_BYTES + length;
    }
    Ok((records, at))
}

fn checksum(body: &[u8]) -> [u8; 8] {
    let digest = Sha256::digest(body);
    std::array::from_fn(|i| digest[i])
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // damage is the point
mod tests {
    use super::*;

    #[test]
    fn a_torn_tail_is_cut_and_a_damaged_middle_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let block = |block| Record::Block { block, rows: vec![] };
        let facts = [Record::Copied, block(0), block(1)];
        let (mut ledger, found) = Ledger::open(&path, "run").unwrap();
        assert!(found.is_empty());
        facts.iter().for_each(|fact| ledger.append(fact).unwrap());
        drop(ledger);
        let whole = std::fs::read(&path).unwrap();
        assert_eq!(Ledger::open(&path, "run").unwrap().1, facts);
        let other = Ledger::open(&path, "another").unwrap_err();
        assert!(other.to_string().contains("another recipe"));
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (_, found) = Ledger::open(&path, "run").unwrap();
            assert!(facts.starts_with(&found), "cut at {cut}: {found:?}");
        }
        // Any byte of a record that is not the last.
        for byte in 0..whole.len() - FRAME_BYTES - 3 {
            let mut damaged = whole.clone();
            damaged[byte] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            let error = Ledger::open(&path, "run").unwrap_err().to_string();
            assert!(error.contains("damaged"), "byte {byte}: {error}");
        }
    }
}
