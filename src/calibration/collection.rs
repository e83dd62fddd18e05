//! Calibration text as a set of documents that may change: each is named by its tokens, and its batches depend on its own group
//! alone, so that another file, or another text in one row, leaves all other batches as they were.
//!
//! Owns identity and grouping. It must not know models, sums or what an artifact holds.

use super::load::{self, Loaded, Wanted};
use super::npy;
use super::{BATCH_TOKENS, Batch, ContentId, Source, Tokens, Usage, batches, check_size};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Rows of a source that are packed together. Fixed: were it to follow from the texts, one text could move all groups after it.
const GROUP_ROWS: u32 = 8;

/// A document's place in the packing: everything but its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Placed {
    /// Which file: numbers are the artifact's own.
    pub source: u32,
    /// Row in it.
    pub row: u32,
    /// By content.
    pub id: ContentId,
    /// Number of tokens.
    pub tokens: u32,
    /// Tokens of a window.
    pub length: u32,
    /// Given as token ids: it counts as often as it comes, and is never joined with another.
    pub exact: bool,
}

impl Placed {
    /// Documents of one group are joined, in order of their rows. One that fills a batch by itself has a group of its own.
    pub fn group(&self) -> (u32, u32, bool) {
        let alone = self.exact || self.tokens as usize >= BATCH_TOKENS;
        let row = if alone { self.row } else { self.row / GROUP_ROWS };
        (self.source, row, alone)
    }
}

/// Documents and their tokens.
#[derive(Clone, Debug, Default)]
pub struct Documents {
    /// In order; sources are numbered from 0.
    pub placed: Vec<Placed>,
    /// By document.
    pub tokens: BTreeMap<ContentId, Vec<u32>>,
    /// The account for the report.
    pub usage: Usage,
}

impl Documents {
    fn push(&mut self, source: usize, row: usize, length: usize, exact: bool, tokens: &[u32]) {
        let id = ContentId::of(1, tokens.len(), tokens);
        self.placed.push(Placed {
            source: source as u32,
            row: row as u32,
            id,
            tokens: tokens.len() as u32,
            length: length as u32,
            exact,
        });
        self.tokens.entry(id).or_insert_with(|| tokens.to_vec());
    }
}

/// Reads the documents of `source`, up to `samples` times `length` tokens; the last one is cut there.
///
/// # Errors
/// As [`super::load`].
pub fn documents(source: &Source, model_dir: &Path, vocab_size: usize) -> Result<Documents> {
    check_size(source)?;
    let opened = load::open(source)?;
    let tokens = Tokens::open(model_dir, vocab_size)?;
    // Windows of one token, nothing between: the documents as they are, one after the other.
    let wanted = Wanted {
        samples: Some(source.samples * source.length),
        length: 1,
        seed: source.seed,
        drop_duplicates: true,
        join: false,
    };
    let Loaded {
        packed,
        usage,
        places,
    } = load::pack(opened, &wanted, &tokens, model_dir)?;
    let mut found = Documents {
        usage,
        ..Documents::default()
    };
    (found.usage.windows_wanted, found.usage.windows_used) = (0, 0);
    let ends = places.iter().skip(1).map(|&(_, _, begin)| begin);
    for (&(file, row, begin), end) in places.iter().zip(ends.chain([packed.tokens.len()])) {
        found.push(file, row, source.length, false, &packed.tokens[begin..end]);
    }
    Ok(found)
}

/// Each sequence of a NumPy file as a document of its own.
pub fn documents_from_npy(path: &Path, vocab_size: usize) -> Result<Documents> {
    let array = npy::read(path, vocab_size)?;
    let usage = npy::usage(path, &array);
    let mut found = Documents {
        usage,
        ..Documents::default()
    };
    for (row, tokens) in array.tokens.chunks_exact(array.length.max(1)).enumerate() {
        found.push(0, row, array.length, true, tokens);
    }
    Ok(found)
}

/// The batches of one group: its documents joined with `separator`, cut into windows of `length` tokens; what is left makes a
/// shorter one, so that no token is dropped.
pub fn pack(documents: &[&[u32]], length: usize, separator: Option<u32>) -> Vec<Batch> {
    let mut joined = Vec::new();
    for document in documents {
        if !joined.is_empty() {
            joined.extend(separator);
        }
        joined.extend_from_slice(document);
    }
    let (whole, rest) = joined.split_at(joined.len() - joined.len() % length.max(1));
    let mut packed = batches(whole, length);
    packed.extend(batches(rest, rest.len()));
    packed
}
