//! Calibration data: files in, fixed batches of token ids out, with an account of what was used.
//!
//! ```text
//! names, paths ─ dataset_info ─► rows ─ order ─► documents ─ template ─► text ─ dedupe ─► tokens ─ pack ─► batches
//! ```
//!
//! This module knows neither timely nor models: of a checkpoint it reads the tokenizer, the chat template and a few ids.
//! It reads files and never writes one. The same files, seed, sizes and tokenizer give the same batches on every machine.

mod collection;
mod conversation;
mod dataset_info;
mod documents;
mod files;
mod load;
mod npy;
mod order;
mod pack;
pub mod rows;
mod template;
mod tojson;
mod tokens;
mod usage;

pub use collection::{Documents, Placed, documents, documents_from_npy, pack};
pub use conversation::{Conversation, Reason, Role, Tags, Turn};
pub use dataset_info::{Columns, Dataset, DatasetInfo, Formatting, Layout, resolve_inside};
pub use documents::{Content, Document, Reading, understand};
pub use npy::TokenArray;
pub use order::order;
pub use pack::{Packed, Packer};
pub use template::{ChatTemplate, Rendered};
pub use tokens::{Tokens, tokenizer_digest};
pub use usage::{SourceUsage, Usage};

use crate::error::{Error, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::path::{Path, PathBuf};

/// Tokens of one run at most: the room that the fixed-point sums are made for (statistics).
pub const MAX_TOKENS: usize = 1 << 28;

/// A batch holds whole sequences of together about this many tokens.
pub const BATCH_TOKENS: usize = 512;

/// Names a batch or a document by its content: the same tokens in the same shape have the same id on every machine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ContentId(pub u64);

impl ContentId {
    /// The first 64 bits of SHA-256 over a version, the shape and the tokens.
    pub fn of(sequences: usize, length: usize, tokens: &[u32]) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"quantflow batch 1\n");
        hash.update((sequences as u64).to_le_bytes());
        hash.update((length as u64).to_le_bytes());
        for id in tokens {
            hash.update(id.to_le_bytes());
        }
        let [a, b, c, d, e, f, g, h, ..] = <[u8; 32]>::from(hash.finalize());
        Self(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
    }
}

impl ContentId {
    /// Whether this is one of the `share` of all contents that are kept apart. It follows from the content alone, so that every machine
    /// keeps the same ones.
    pub fn is_held_out(self, share: f64) -> bool {
        (self.0 as f64) < share * u64::MAX as f64
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ContentId({self})")
    }
}

impl From<ContentId> for String {
    fn from(id: ContentId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for ContentId {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        let digits = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let id = u64::from_str_radix(&text, 16).ok().filter(|_| digits);
        id.map(Self)
            .ok_or_else(|| format!("{text:.40} is not an id of 16 hex digits"))
    }
}

/// A fixed group of token sequences of one length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// By content.
    pub id: ContentId,
    /// Place in the order of arrival.
    pub index: usize,
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
    /// Row-major.
    pub tokens: Vec<u32>,
    /// How often it counts; below zero it is taken away.
    pub multiplicity: i64,
    /// Kept apart, to measure on.
    pub held_out: bool,
}

/// Batches, and what was used to make them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Calibration {
    /// In order; all but the last have the same shape.
    pub batches: Vec<Batch>,
    /// The account for the report.
    pub usage: Usage,
}

impl Calibration {
    /// Tokens of the longest sequence; 0 without batches.
    pub fn length_max(&self) -> usize {
        let lengths = self.batches.iter().map(|batch| batch.length);
        lengths.max().unwrap_or(0)
    }

    /// Tokens of the largest batch; 0 without batches.
    pub fn batch_tokens_max(&self) -> usize {
        let tokens = self.batches.iter().map(|batch| batch.tokens.len());
        tokens.max().unwrap_or(0)
    }
}

/// What to calibrate with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Files and folders, or names in `dataset_dir`.
    pub names: Vec<String>,
    /// The folder of `dataset_info.json`.
    pub dataset_dir: Option<PathBuf>,
    /// The column that is plain text, where rows do not show it themselves. Concerns files, not named datasets.
    pub text_column: Option<String>,
    /// Windows wanted.
    pub samples: usize,
    /// Tokens of each.
    pub length: usize,
    /// 0: file order, a row from each file in turn; else: all rows shuffled.
    pub seed: u64,
}

impl Default for Source {
    fn default() -> Self {
        Self {
            names: Vec::new(),
            dataset_dir: None,
            text_column: None,
            samples: 128,
            length: 2048,
            seed: 0,
        }
    }
}

/// Reads calibration data for the checkpoint in `model_dir`.
///
/// Documents are tokenized one by one without special tokens, joined with one end-of-sequence token between them, and cut
/// into `samples` windows of `length` tokens; conversations go through the chat template. Reading stops when the windows
/// are full. Fewer windows than wanted are a note in the usage; not one is an error.
pub fn load(source: &Source, model_dir: &Path, vocab_size: usize) -> Result<Calibration> {
    check_size(source)?;
    let sources = load::open(source)?;
    let tokens = Tokens::open(model_dir, vocab_size)?;
    let wanted = load::Wanted {
        samples: Some(source.samples),
        length: source.length,
        seed: source.seed,
        drop_duplicates: true,
        join: true,
    };
    let load::Loaded { packed, usage, .. } = load::pack(sources, &wanted, &tokens, model_dir)?;
    Ok(Calibration {
        batches: batches(&packed.tokens, source.length),
        usage,
    })
}

fn check_size(source: &Source) -> Result<()> {
    let wanted = source.samples.saturating_mul(source.length);
    for (flag, value) in [("--samples", source.samples), ("--length", source.length)] {
        if value == 0 {
            return Err(Error::usage(
                flag,
                "0 is no calibration",
                "leave the flag out for its default",
            ));
        }
    }
    if wanted > MAX_TOKENS {
        return Err(Error::usage(
            "--samples",
            format!(
                "{} windows of {} tokens are more than {MAX_TOKENS} tokens",
                source.samples, source.length
            ),
            "128 windows of 2048 tokens are the usual amount",
        ));
    }
    Ok(())
}

/// All windows of a file or folder of texts, in file order, duplicates kept: what a model is evaluated on. A file too
/// short for one window gives one shorter window of all its tokens (at least two: one to predict from).
pub fn read_texts(path: &Path, model_dir: &Path, length: usize, vocab_size: usize) -> Result<Calibration> {
    if length < 2 {
        return Err(Error::usage("--length", "a window needs at least 2 tokens", ""));
    }
    let tokens = Tokens::open(model_dir, vocab_size)?;
    let read = |length| {
        let wanted = load::Wanted {
            samples: None,
            length,
            seed: 0,
            drop_duplicates: false,
            join: true,
        };
        load::pack(load::open_one(path)?, &wanted, &tokens, model_dir)
    };
    // Windows of one token hold all there is: what a file too short for one window is read in.
    let (packed, mut usage, length) = match read(length) {
        Ok(loaded) => (loaded.packed, loaded.usage, length),
        Err(too_short) => {
            let all = read(1).map_err(|_| too_short)?;
            let shorter = all.packed.tokens.len();
            if shorter < 2 {
                return Err(Error::invalid(
                    path.display().to_string(),
                    "one token is nothing to predict",
                    "use a longer text",
                ));
            }
            (all.packed, all.usage, shorter)
        }
    };
    usage.windows_used = (packed.tokens.len() / length) as u64;
    Ok(Calibration {
        batches: batches(&packed.tokens, length),
        usage,
    })
}

/// Exactly the sequences of a NumPy file, int32 or int64 of `[sequences, length]`.
pub fn from_npy(path: &Path, vocab_size: usize) -> Result<Calibration> {
    let array = npy::read(path, vocab_size)?;
    Ok(Calibration {
        batches: batches(&array.tokens, array.length),
        usage: npy::usage(path, &array),
    })
}

/// Groups whole sequences into batches of about [`BATCH_TOKENS`] tokens; the last may be smaller.
pub fn batches(tokens: &[u32], length: usize) -> Vec<Batch> {
    if length == 0 {
        return Vec::new();
    }
    let rows = (BATCH_TOKENS / length).max(1);
    tokens
        .chunks(rows * length)
        .enumerate()
        .map(|(index, tokens)| {
            let sequences = tokens.len() / length;
            Batch {
                id: ContentId::of(sequences, length, tokens),
                index,
                sequences,
                length,
                tokens: tokens.to_vec(),
                multiplicity: 1,
                held_out: false,
            }
        })
        .collect()
}

/// Tokens of the probe that fixes the exponents of the sums.
pub const PROBE_TOKENS: usize = 256;

/// The probe: `tokens` ids that depend on the vocabulary size alone, so that machines that never met scale their sums
/// alike. ChaCha8, seeded from a constant and the size, each id by multiply and shift: fixed for good, since exponents of
/// stored statistics follow from it.
pub fn probe(vocab_size: usize, tokens: usize) -> Vec<u32> {
    let mut seed = [0; 32];
    seed[..24].copy_from_slice(b"quantflow probe sequence");
    seed[24..].copy_from_slice(&(vocab_size as u64).to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(seed);
    let size = u32::try_from(vocab_size).unwrap_or(u32::MAX);
    let mut id = || ((u64::from(random.next_u32()) * u64::from(size)) >> 32) as u32;
    (0..tokens).map(|_| id()).collect()
}

#[cfg(test)]
#[path = "mod_tests.rs"]
mod tests;
