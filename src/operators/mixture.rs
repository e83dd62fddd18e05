//! A batch's way through the experts of a mixture, a group of them at a time. Between a group's two steps its inner activations are kept,
//! all experts' side by side; after the second the outputs are added, expert by expert in rising order, to those of the groups before.
//!
//! ```text
//! residual ─mlp_input, route─► tokens of each expert ─gate, up─► [down of the expert] ─► sum of outputs ─(next block)─► residual
//! ```
//! Where a token goes is asked of the router again at each step: that is cheap beside the experts, and the residual has not changed.

use super::activations::{PROBE, Slot};
use super::forward::Passage;
use super::local::{Local, Pass};
use super::records::SiteInput;
use crate::error::{Error, Result};
use crate::model::mixture::Sent;
use crate::model::{Block, Linear, SiteKind};
use candle_core::{DType, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// A batch before the experts, in one stream.
struct Routed {
    layer: Arc<Block>,
    /// As the experts' linears take it.
    x: Tensor,
    sent: Sent,
}

impl Routed {
    fn new(passage: &Passage<'_>, block: usize) -> Result<Self> {
        let layer = passage.layer(block)?;
        let x = layer.mlp_input(&passage.get(Slot::Residual)?)?;
        let sent = layer.dispatch(&x)?;
        let x = passage.rounded(x)?;
        Ok(Self { layer, x, sent })
    }

    /// The rows that are `wanted` of the inputs of some experts' downs, one expert after the other. `inner` has those of the tokens that they are
    /// sent.
    fn summed(
        &self,
        experts: &Range<usize>,
        inner: Option<&Tensor>,
        wanted: &[Wanted],
        gate_up: &[Linear],
    ) -> Result<Option<Tensor>> {
        if wanted.iter().all(|wanted| wanted.tokens.is_empty()) {
            return Ok(None);
        }
        let each = || experts.clone().zip(wanted);
        let is_sent = |(expert, wanted): (usize, &Wanted)| {
            wanted.tokens == self.sent.tokens(expert) && wanted.weights == self.sent.gates(expert)
        };
        if let (Some(inner), true) = (inner, each().all(is_sent)) {
            return Ok(Some(self.sent.gated(experts, inner)?));
        }
        // What goes on is computed by itself, so that it is the same bits whatever else is summed.
        let others = each().map(|(expert, wanted)| {
            let own = self.sent.tokens(expert);
            let tokens = wanted.tokens.iter().copied();
            tokens.filter(|token| own.binary_search(token).is_err()).collect()
        });
        let others: Vec<Vec<u32>> = others.collect();
        let counts: Vec<usize> = others.iter().map(Vec::len).collect();
        let more = match &others.concat()[..] {
            [] => None,
            tokens => Some(
                self.layer
                    .gate_each(&select(&self.x, tokens)?, &counts, gate_up)?,
            ),
        };
        let mut place = vec![0u32; self.x.dim(0)?];
        let mut places = Vec::new();
        let (mut next, mut next_other) = (0, inner.map_or(Ok(0), |inner| inner.dim(0))? as u32);
        for ((expert, wanted), others) in each().zip(&others) {
            for &token in self.sent.tokens(expert) {
                place[token as usize] = next;
                next += 1;
            }
            for &token in others {
                place[token as usize] = next_other;
                next_other += 1;
            }
            places.extend(wanted.tokens.iter().map(|&token| place[token as usize]));
        }
        let weights: Vec<f32> = wanted
            .iter()
            .flat_map(|wanted| &wanted.weights)
            .copied()
            .collect();
        let parts: Vec<&Tensor> = inner.into_iter().chain(&more).collect();
        let rows = select(&Tensor::cat(&parts, 0)?, &places)?;
        let weights = Tensor::new(weights, self.x.device())?;
        Ok(Some(rows.broadcast_mul(&weights.unsqueeze(1)?)?))
    }
}

/// Tokens whose inputs are summed for an expert, in order, and the factor on each.
#[derive(Default)]
struct Wanted {
    tokens: Vec<u32>,
    weights: Vec<f32>,
}

/// Cuts `experts` into those that are carried together: as many as have no more `rows` than a batch has `tokens`, of which each has no more. So what
/// is done row by row is done for many experts at a time, and takes no more than a batch.
fn parts(experts: Range<usize>, rows: impl Fn(usize) -> usize, tokens: usize) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut room = 0;
    for expert in experts {
        match (parts.last_mut(), rows(expert)) {
            (Some(part), rows) if rows <= room => {
                part.end += 1;
                room -= rows;
            }
            (_, rows) => {
                parts.push(expert..expert + 1);
                room = tokens.saturating_sub(rows);
            }
        }
    }
    parts
}

/// Counts where the batch's tokens go. `x` is the input of gate and up.
pub(super) fn count(local: &Local, block: usize, position: usize, layer: &Block, x: &Tensor) -> Result<()> {
    let shared = &local.shared;
    let experts = shared
        .tower
        .spec
        .block
        .mixture
        .as_ref()
        .map(|mixture| mixture.routing.experts);
    match (experts, &layer.mixture, shared.batches.get(position)) {
        (Some(experts), Some(_), Some(batch)) => {
            let (times, all) = (batch.multiplicity, shared.plan.recipe.all_experts);
            let routing = layer.route(x)?;
            shared.experts.add(block, experts, &routing, times, all)
        }
        _ => Ok(()),
    }
}

/// From the gates and ups of a group of experts, the step before, to the inputs of their downs. The original model's inputs, where
/// it is matched, are those of the same tokens with the same factors: of what the quantized model sends to the expert.
///
/// With `sums` false nobody will sum them, and what only statistics need is left out.
pub(super) fn expert_inputs(local: &Local, step: u64, position: usize, sums: bool) -> Result<Vec<SiteInput>> {
    let plan = &local.shared.plan;
    let (block, _) = plan.step(step);
    let sites = plan.step_sites(step);
    let passages: Vec<Passage<'_>> = Passage::all(local, position).collect();
    let routed: Vec<Routed> = passages
        .iter()
        .map(|passage| Routed::new(passage, block))
        .collect::<Result<_>>()?;
    let wanted: Vec<Wanted> = sites
        .iter()
        .map(
            |&site| match (routed.first(), sums && plan.is_summed(block, site)) {
                (Some(first), true) => wanted(local, step, position, site, first),
                _ => Ok(Wanted::default()),
            },
        )
        .collect::<Result<_>>()?;
    let mut streams = Vec::new();
    for (passage, routed) in passages.iter().zip(&routed) {
        streams.push(group(passage, routed, step, &wanted)?.into_iter());
    }
    let mut streams = streams.into_iter();
    let (Some(quantized), mut original) = (streams.next(), streams.next()) else {
        return Err(Error::Worker("no forward pass runs".into()));
    };
    let inputs = sites.iter().zip(quantized).filter_map(|(&site, x)| {
        let original = original.as_mut().and_then(Iterator::next).flatten();
        x.map(|x| SiteInput { site, x, original })
    });
    Ok(inputs.collect())
}

/// Runs a group's gates and ups, keeps what goes on, and returns the rows that are summed.
fn group(
    passage: &Passage<'_>,
    routed: &Routed,
    step: u64,
    wanted: &[Wanted],
) -> Result<Vec<Option<Tensor>>> {
    let linears = passage.linears(step - 1)?;
    let group = experts(passage.local, step)?;
    let (mut kept, mut rows) = (Vec::new(), Vec::new());
    let most = |expert: usize| {
        routed
            .sent
            .tokens(expert)
            .len()
            .max(wanted[expert - group.start].tokens.len())
    };
    for part in parts(group.clone(), most, routed.x.dim(0)?) {
        let (begin, end) = (part.start - group.start, part.end - group.start);
        let (wanted, gate_up) = (&wanted[begin..end], &linears[2 * begin..2 * end]);
        let own = routed.sent.rows(&part, &routed.x)?;
        let gate = |own: Tensor| routed.layer.gate_each(&own, &routed.sent.counts(&part), gate_up);
        let inner = own.map(gate).transpose()?;
        let summed = routed.summed(&part, inner.as_ref(), wanted, gate_up)?;
        let summed = summed.map(|rows| passage.rounded(rows)).transpose()?;
        let mut begin = 0;
        for wanted in wanted {
            let count = wanted.tokens.len();
            let of = |rows: &Tensor| rows.narrow(0, begin, count);
            rows.push(summed.as_ref().filter(|_| count > 0).map(of).transpose()?);
            begin += count;
        }
        kept.extend(inner.map(|inner| passage.rounded(inner)).transpose()?);
    }
    if !kept.is_empty() {
        passage.put(Slot::SiteInput, &Tensor::cat(&kept, 0)?)?;
    }
    Ok(rows)
}

/// The tokens whose inputs are summed for an expert: those that are sent to it, with their gates. All tokens alike for the probe, so that
/// every expert has exponents, and where that is asked for; where the expert borrows, the others count a little, too.
fn wanted(local: &Local, step: u64, position: usize, site: SiteKind, routed: &Routed) -> Result<Wanted> {
    let (shared, expert) = (&local.shared, expert_of(site)?);
    let (block, _) = shared.plan.step(step);
    let all = routed.x.dim(0)? as u32;
    if position == PROBE || shared.plan.recipe.all_experts {
        return Ok(Wanted {
            tokens: (0..all).collect(),
            weights: vec![1.0; all as usize],
        });
    }
    let (tokens, weights) = (routed.sent.tokens(expert), routed.sent.gates(expert));
    let width = shared.tower.spec.block.site_width(&routed.layer.layer, site);
    let borrowed = match shared.pass {
        // An artifact's sums are of each batch by itself.
        Pass::Original(_) => 0.0,
        Pass::Quantized | Pass::Both => {
            let reached = shared.experts.of(block, expert);
            reached.map_or(0.0, |reached| reached.borrowed_weight(width))
        }
    };
    if borrowed == 0.0 {
        return Ok(Wanted {
            tokens: tokens.to_vec(),
            weights: weights.to_vec(),
        });
    }
    let mut factors = vec![borrowed; all as usize];
    for (&token, &gate) in tokens.iter().zip(weights) {
        factors[token as usize] = gate;
    }
    Ok(Wanted {
        tokens: (0..all).collect(),
        weights: factors,
    })
}

/// Adds the outputs of the downs of `step`, a group of routed experts or the shared one, to those of the groups before; returns the sum.
pub(super) fn add_outputs(passage: &Passage<'_>, step: u64) -> Result<Tensor> {
    let plan = &passage.local.shared.plan;
    let (block, first) = plan.step(step);
    let linears = passage.linears(step)?;
    let inner = passage.take(Slot::SiteInput)?;
    let sum = passage.take(Slot::Mixture)?;
    if let (SiteKind::Down, [down]) = (first, &linears[..]) {
        let layer = passage.layer(block)?;
        let x = layer.mlp_input(&passage.get(Slot::Residual)?)?;
        let (Some(sum), Some(inner)) = (sum, inner) else {
            return Err(Error::Worker("an activation was lost".into()));
        };
        let y = down.forward(&inner)?;
        let y = match layer.shared_gate(&x)? {
            Some(gate) => y.broadcast_mul(&gate)?,
            None => y,
        };
        return Ok((sum + y)?);
    }
    let routed = Routed::new(passage, block)?;
    let sum = match sum {
        Some(sum) => sum,
        None => Tensor::zeros(routed.x.shape(), DType::F32, routed.x.device())?,
    };
    let group = experts(passage.local, step)?;
    let sent = |expert: usize| routed.sent.tokens(expert).len();
    let mut begin = 0;
    for part in parts(group.clone(), sent, routed.x.dim(0)?) {
        let counts = routed.sent.counts(&part);
        let count = counts.iter().sum();
        if let (1.., Some(inner)) = (count, &inner) {
            let downs = &linears[part.start - group.start..part.end - group.start];
            let y = routed
                .layer
                .down_each(&inner.narrow(0, begin, count)?, &counts, downs)?;
            routed.sent.add(&part, &sum, &y)?;
            begin += count;
        }
    }
    Ok(sum)
}

/// The experts of a step.
fn experts(local: &Local, step: u64) -> Result<Range<usize>> {
    let sites = local.shared.plan.step_sites(step);
    match (sites.first(), sites.last()) {
        (Some(&first), Some(&last)) => Ok(expert_of(first)?..expert_of(last)? + 1),
        _ => Err(Error::Worker(format!("step {step} has no experts"))),
    }
}

fn expert_of(site: SiteKind) -> Result<usize> {
    match site {
        SiteKind::ExpertDown(expert) => Ok(expert as usize),
        other => Err(Error::Worker(format!("{other:?} is no expert's input"))),
    }
}

fn select(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    Ok(x.index_select(&Tensor::new(rows, x.device())?, 0)?)
}

#[cfg(test)]
mod tests {
    use super::parts;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_are_all_experts_in_order_and_no_more_than_a_batch(
            begin in 0usize..4, rows in prop::collection::vec(0usize..9, 1..20), tokens in 1usize..16,
        ) {
            let of = |expert: usize| rows[expert - begin].min(tokens);
            let parts = parts(begin..begin + rows.len(), of, tokens);
            let experts: Vec<usize> = parts.iter().cloned().flatten().collect();
            prop_assert_eq!(experts, (begin..begin + rows.len()).collect::<Vec<_>>());
            let total = |part: &std::ops::Range<usize>| part.clone().map(of).sum::<usize>();
            prop_assert!(parts.iter().all(|part| total(part) <= tokens));
            // The next expert would have been too much.
            prop_assert!(parts.windows(2).all(|pair| total(&pair[0]) + of(pair[1].start) > tokens));
        }
    }
}
