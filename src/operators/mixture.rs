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

    /// The rows that are `wanted` of the input of an expert's down, of which `inner` has those of the tokens that it is sent.
    fn summed(
        &self,
        expert: usize,
        inner: Option<&Tensor>,
        wanted: &Wanted,
        gate_up: &[Linear],
    ) -> Result<Option<Tensor>> {
        let own = self.sent.tokens(expert);
        match inner {
            _ if wanted.tokens.is_empty() => return Ok(None),
            Some(inner) if wanted.tokens == own && wanted.weights == self.sent.gates(expert) => {
                return Ok(Some(self.sent.gated(expert, inner)?));
            }
            _ => {}
        }
        // What goes on is computed by itself, so that it is the same bits whatever else is summed.
        let mut others = wanted.tokens.clone();
        others.retain(|token| own.binary_search(token).is_err());
        let more = match others.is_empty() {
            true => None,
            false => Some(self.layer.gate(&select(&self.x, &others)?, gate_up)?),
        };
        let parts: Vec<&Tensor> = inner.into_iter().chain(&more).collect();
        let mut place = vec![0u32; self.x.dim(0)?];
        for (row, &token) in own.iter().chain(&others).enumerate() {
            place[token as usize] = row as u32;
        }
        let places: Vec<u32> = wanted.tokens.iter().map(|&t| place[t as usize]).collect();
        let weights = Tensor::new(&wanted.weights[..], self.x.device())?;
        let rows = select(&Tensor::cat(&parts, 0)?, &places)?;
        Ok(Some(rows.broadcast_mul(&weights.unsqueeze(1)?)?))
    }
}

/// Tokens whose inputs are summed for an expert, in order, and the factor on each.
#[derive(Default)]
struct Wanted {
    tokens: Vec<u32>,
    weights: Vec<f32>,
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
        streams.push(group(passage, routed, step, sites, &wanted)?.into_iter());
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
    sites: &[SiteKind],
    wanted: &[Wanted],
) -> Result<Vec<Option<Tensor>>> {
    let linears = passage.linears(step - 1)?;
    let (mut kept, mut rows) = (Vec::new(), Vec::new());
    for ((&site, wanted), gate_up) in sites.iter().zip(wanted).zip(linears.chunks_exact(2)) {
        let expert = expert_of(site)?;
        let own = routed.sent.rows(expert, &routed.x)?;
        let inner = own.map(|own| routed.layer.gate(&own, gate_up)).transpose()?;
        rows.push(routed.summed(expert, inner.as_ref(), wanted, gate_up)?);
        kept.extend(inner);
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
    let Routed { x, sent, .. } = Routed::new(passage, block)?;
    let sum = match sum {
        Some(sum) => sum,
        None => Tensor::zeros(x.shape(), DType::F32, x.device())?,
    };
    let mut begin = 0;
    for (&site, down) in plan.step_sites(step).iter().zip(linears.iter()) {
        let expert = expert_of(site)?;
        let count = sent.tokens(expert).len();
        if let (1.., Some(inner)) = (count, &inner) {
            let y = down.forward(&inner.narrow(0, begin, count)?)?;
            sent.add(expert, &sum, &y)?;
            begin += count;
        }
    }
    Ok(sum)
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
