//! The steps of a run: what is worked on at a time, and in which order. A dense block has a step a site. The experts of a mixture are
//! worked on in groups, whose size decides a step's bytes and nothing of the output:
//!
//! ```text
//! qkv ─► (q_b ─► kv_b ─►) o ─► gate_up of group 0 ─► down of group 0 ─► gate_up of group 1 ─► … ─► gate_up, down of the shared expert
//! ```
//! All gate_up parts have one input. The first part sums and factors it; the later ones find its factor kept.

use super::PlannedLinear;
use crate::model::{SiteKind, Tower};
use std::mem::discriminant;
use std::ops::Range;

/// What is worked on at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) block: usize,
    /// The inputs of the linears: one, or one an expert.
    pub(super) sites: Vec<SiteKind>,
    /// Positions in [`super::Plan::linears`].
    pub(super) linears: Range<usize>,
    /// Whether the inputs are summed here, and not at an earlier part of the same site.
    pub(super) leads: bool,
    /// Whether no later step has these sites.
    pub(super) trails: bool,
}

/// The steps of all blocks, with `experts` experts in a group.
pub(super) fn cut(linears: &[PlannedLinear], experts: usize) -> Vec<Step> {
    linears
        .chunk_by(|a, b| a.block == b.block)
        .flat_map(|block| cut_block(block, experts))
        .collect()
}

fn cut_block(linears: &[PlannedLinear], experts: usize) -> Vec<Step> {
    let group = |linear: &PlannedLinear| linear.expert().map(|expert| expert / experts);
    // Attention, groups of routed experts, the MLP or the shared expert; within these as they lie.
    let place = |linear: &PlannedLinear| match (group(linear), linear.site) {
        (Some(group), _) => (1, group),
        (None, SiteKind::GateUp | SiteKind::Down | SiteKind::ExpertDown(_)) => (2, 0),
        (None, _) => (0, 0),
    };
    let mut pieces: Vec<&[PlannedLinear]> = linears
        .chunk_by(|a, b| discriminant(&a.site) == discriminant(&b.site) && group(a) == group(b))
        .collect();
    pieces.sort_by_key(|piece| place(&piece[0]));
    let site = |piece: &[PlannedLinear]| piece[0].site;
    let steps = pieces.iter().enumerate().map(|(position, piece)| {
        let mut sites: Vec<SiteKind> = piece.iter().map(|linear| linear.site).collect();
        sites.dedup();
        let same = |other: &&[PlannedLinear]| site(other) == site(piece);
        Step {
            block: piece[0].block,
            sites,
            linears: piece[0].index..piece[0].index + piece.len(),
            leads: !pieces[..position].iter().any(same),
            trails: !pieces[position + 1..].iter().any(same),
        }
    });
    steps.collect()
}

/// The earlier steps whose linears carry a batch to the input of `step`: the one before, but for latent attention, where `q_b` and
/// `kv_b` serve together, and for an MLP whose inner activations are not kept: gate and up make them again.
pub(super) fn carriers(steps: &[Step], step: usize, inner_fits: bool) -> Range<usize> {
    let site = |back: usize| step.checked_sub(back).map(|at| steps[at].sites[0]);
    match (steps[step].sites[0], site(1), site(2)) {
        (SiteKind::KvB, Some(SiteKind::QB), _) => step..step,
        (SiteKind::O, Some(SiteKind::KvB), Some(SiteKind::QB)) => step - 2..step,
        // A mixture's shared expert has its down there, too, but the first gate and up are of a routed one.
        (SiteKind::Qkv, Some(SiteKind::Down), Some(SiteKind::GateUp))
            if !inner_fits && steps[step - 2].leads =>
        {
            step - 2..step
        }
        _ => step.saturating_sub(1)..step,
    }
}

/// Bytes that a token has between two steps: the residual in f32 and the widest input in 16 bits, that of an MLP's down among them where
/// `keeps_inner`; with latent attention its latents; in a mixture the sum of the experts' outputs in f32, and an input for each expert that the
/// token is sent to.
pub(super) fn token_bytes(tower: &Tower, linears: &[PlannedLinear], keeps_inner: bool) -> usize {
    let spec = &tower.spec.block;
    let residual = spec.hidden_size * 4;
    let is_inner =
        |linear: &PlannedLinear| linear.site == SiteKind::Down && !tower.spec.layers[linear.block].mixture;
    let kept = linears.iter().filter(|linear| keeps_inner || !is_inner(linear));
    let widest = kept.map(|linear| linear.columns * 2).max().unwrap_or(0);
    let latents = spec.mla.map_or(0, |mla| {
        let query = mla.q_lora_rank.unwrap_or(spec.heads * spec.head_dim);
        2 * (query + mla.kv_lora_rank + mla.qk_rope_head_dim)
    });
    let sent = spec.mixture.as_ref().map_or(0, |mixture| {
        2 * mixture.routing.experts_per_token * mixture.intermediate_size + residual
    });
    residual + (widest + latents).max(sent)
}
