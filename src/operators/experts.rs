//! How many tokens each expert was sent, and what an expert borrows that was sent too few.
//!
//! An expert's Hessian sums its inputs, weighted with their squared gates, over the tokens that are sent to it. With few tokens it has
//! directions that hardly one fixed: errors put there cost nothing on the calibration text and anything at run time. So an expert
//! that is sent fewer than [`tokens_min`] borrows. In a sequential run the counts are complete before the experts' inputs are
//! summed: all other tokens of the layer are run through the expert, too, for its statistics alone, and weigh together as much as
//! the tokens that it lacks. Where the layer has too few, and in an artifact, which has to stay a pure sum over batches that
//! come and go, the Hessian is damped in proportion to what is missing ([`shrinkage`]), which ends in plain rounding. The report tells of both.

use crate::error::{Error, Result};
use crate::numerics::routing::Routing;
use std::collections::BTreeMap;
use std::sync::Mutex;

/// Blocks whose counts are kept: the one in work, and the next, which another worker may have begun.
const BLOCKS_KEPT: usize = 2;
/// Squared gates are summed in units of 2^-32, as integers, so that no order of additions shows.
const GATE_UNITS: f64 = (1u64 << 32) as f64;

/// Tokens a channel that an expert needs. With one its Hessian has just full rank, and what GPTQ saves on these tokens costs several
/// times rounding's error on others (fixtures, four bits: 4 to 5 times at one token a channel, twice at three).
const TOKENS_PER_CHANNEL: u64 = 4;

/// Tokens that an expert with inputs of `width` channels needs.
pub fn tokens_min(width: usize) -> u64 {
    width as u64 * TOKENS_PER_CHANNEL
}

/// What is added to the damping of an expert's Hessian that `tokens` tokens are behind: the tokens that it lacks count as noise with
/// the mean energy of its own, alike in all channels.
pub fn shrinkage(tokens: u64, width: usize) -> f64 {
    let missing = tokens_min(width).saturating_sub(tokens);
    missing as f64 / tokens.max(1) as f64
}

/// What an expert was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// Tokens.
    pub tokens: i64,
    /// Sum of the squared gates.
    gates: i64,
    /// Tokens of the layer.
    of: i64,
}

impl Reached {
    /// So many tokens of so many.
    pub fn new(tokens: u64) -> Self {
        Self {
            tokens: tokens as i64,
            ..Self::default()
        }
    }

    /// The factor on the input of each token that was sent elsewhere, for an expert of this width: 0 where it has tokens enough.
    pub fn borrowed_weight(&self, width: usize) -> f32 {
        let missing = tokens_min(width) as i64 - self.tokens;
        let others = self.of - self.tokens;
        if missing <= 0 || others <= 0 {
            return 0.0;
        }
        // No borrowed token counts for more than one of the expert's own.
        let share = (missing as f64 / others as f64).min(1.0);
        let gate = match self.tokens {
            0 => 1.0,
            tokens => self.gates as f64 / GATE_UNITS / tokens as f64,
        };
        (share * gate).sqrt() as f32
    }
}

/// Counts by block and expert, shared by the workers of a process.
#[derive(Debug, Default)]
pub struct ExpertTokens(Mutex<BTreeMap<usize, Vec<Reached>>>);

impl ExpertTokens {
    /// Counts the tokens of a batch. With `all`, each counts for every expert.
    pub fn add(
        &self,
        block: usize,
        experts: usize,
        routing: &Routing,
        multiplicity: i64,
        all: bool,
    ) -> Result<()> {
        let tokens = (routing.experts.len() / routing.experts_per_token) as i64 * multiplicity;
        self.change(block, |counts| {
            counts.resize(experts, Reached::default());
            for count in counts.iter_mut() {
                count.of += tokens;
                count.tokens += if all { tokens } else { 0 };
            }
            for (&expert, &gate) in routing.experts.iter().zip(&routing.gates) {
                let count = &mut counts[expert as usize];
                count.tokens += if all { 0 } else { multiplicity };
                let square = f64::from(gate).powi(2) * GATE_UNITS;
                count.gates += square.round_ties_even() as i64 * multiplicity;
            }
        })
    }

    /// Sets the counts of a block.
    pub fn set(&self, block: usize, counts: Vec<Reached>) -> Result<()> {
        self.change(block, |held| *held = counts)
    }

    /// What an expert was sent: complete once the step that counts is. `None` where nobody counted.
    pub fn of(&self, block: usize, expert: usize) -> Option<Reached> {
        let blocks = self.0.lock().ok()?;
        blocks.get(&block)?.get(expert).copied()
    }

    fn change(&self, block: usize, change: impl FnOnce(&mut Vec<Reached>)) -> Result<()> {
        let mut blocks = self
            .0
            .lock()
            .map_err(|_| Error::Worker("a worker stopped while it counted tokens".into()))?;
        blocks.retain(|&older, _| older + BLOCKS_KEPT > block);
        change(blocks.entry(block).or_default());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borrowed_tokens_weigh_what_is_missing() {
        let counts = ExpertTokens::default();
        let routing = Routing {
            experts: vec![0, 1, 0, 1, 0, 1, 0, 2],
            gates: vec![0.5; 8],
            experts_per_token: 2,
        };
        counts.add(3, 4, &routing, 2, false).unwrap();
        let of = |expert| counts.of(3, expert).unwrap();
        assert_eq!(
            [of(0).tokens, of(1).tokens, of(2).tokens, of(3).tokens],
            [8, 6, 2, 0]
        );
        // Expert 2 has 2 of 8 tokens and lacks 2 of 4: the 6 others count a third of a token each, with the squared gate of its own.
        assert!((of(2).borrowed_weight(1) - (0.25f32 / 3.0).sqrt()).abs() < 1e-6);
        assert_eq!((of(0).borrowed_weight(2), of(0).borrowed_weight(64)), (0.0, 0.0));
        // None of its own: alike, whatever the gates; never more than one of them each.
        assert!((of(3).borrowed_weight(1) - 0.5f32.sqrt()).abs() < 1e-6);
        assert_eq!(of(3).borrowed_weight(64), 1.0);
        counts.add(4, 4, &routing, 1, true).unwrap();
        assert_eq!(counts.of(4, 3).unwrap().tokens, 4);
        assert_eq!(counts.of(9, 0), None);
        assert_eq!(
            (shrinkage(4, 1), shrinkage(1, 1), shrinkage(0, 1)),
            (0.0, 3.0, 4.0)
        );
    }
}
