//! The account of what calibration used and what it did not: nothing is left out silently.
//!
//! Owns counts and their wording. It must not know how texts are read.

use serde::Serialize;
use std::collections::BTreeMap;

/// At most this many distinct reasons are told apart; more count as one.
const MAX_REASONS: usize = 64;

/// What a file or dataset gave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SourceUsage {
    /// Its name without folders.
    pub name: String,
    /// Rows in it.
    pub rows: u64,
    /// Rows of it whose text was used.
    pub used: u64,
}

/// What was read, used and left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// The files or datasets, in the order given.
    pub sources: Vec<SourceUsage>,
    /// Rows in all sources.
    pub documents_found: u64,
    /// Rows looked at: used or left out.
    pub documents_read: u64,
    /// Rows whose tokens stand in the windows, in whole or in part.
    pub documents_used: u64,
    /// Rows never looked at, since the windows were full.
    pub documents_not_reached: u64,
    /// Rows left out, by reason.
    pub left_out: BTreeMap<String, u64>,
    /// Windows asked for; 0: as many as there are.
    pub windows_wanted: u64,
    /// Windows made.
    pub windows_used: u64,
    /// Tokens in the windows, the separators between documents included.
    pub tokens_used: u64,
    /// Tokens made that fill no window.
    pub tokens_left_out: u64,
    /// What else the user should know, one sentence each.
    pub notes: Vec<String>,
}

impl Usage {
    /// Counts a row that is left out.
    pub(super) fn leave_out(&mut self, reason: &str) {
        let new = !self.left_out.contains_key(reason);
        let reason = match new && self.left_out.len() >= MAX_REASONS {
            true => "other reasons",
            false => reason,
        };
        *self.left_out.entry(reason.to_owned()).or_default() += 1;
    }

    /// Notes a sentence with a count in it, unless the count is 0.
    pub(super) fn note_count(&mut self, count: u64, sentence: &str) {
        if count > 0 {
            let rows = if count == 1 { "row" } else { "rows" };
            self.notes.push(format!("{count} {rows}: {sentence}"));
        }
    }

    /// The reasons in one line, the most frequent first: `12 the text is empty, 3 …`.
    pub fn left_out_summary(&self) -> String {
        let mut reasons: Vec<_> = self.left_out.iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let shown = reasons.iter().map(|(reason, count)| format!("{count} {reason}"));
        shown.collect::<Vec<_>>().join(", ")
    }
}
