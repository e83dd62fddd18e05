//! `forward`: carries each batch from the site quantized last to the next one, through the linears just installed, in the quantized
//! stream and, where the original is matched, in the full-precision one. Every linear runs exactly once a stream, but for a gate and an up
//! whose output there is no room for on a device: they make it again.

use super::activations::{Key, PROBE, Slot, Stream};
use super::local::Local;
use super::mixture;
use super::records::{Go, Inputs, SiteInput};
use super::stages::Weights;
use crate::error::{Error, Result};
use crate::model::mla::Latents;
use crate::model::{Block, SiteKind};
use candle_core::Tensor;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::{Capability, Operator};

/// The step's inputs of each batch that this worker holds, the probe's first; one batch an activation, so that what is downstream
/// consumes one input before the next is made.
pub fn forward<'scope>(
    steps: StreamVec<'scope, u64, Go>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, Inputs> {
    let scope = steps.scope();
    steps.unary::<CapacityContainerBuilder<Vec<Inputs>>, _, _, _>(Pipeline, "forward", move |_, info| {
        let again = scope.worker().activator_for(info.address);
        let mut queue: VecDeque<(Capability<u64>, usize)> = VecDeque::new();
        move |input, output| {
            input.for_each_stamp(|capability, _| {
                if let Some(capability) = capability.retain_least(output.output_index()) {
                    let own = local.batches.borrow();
                    queue.extend(
                        [PROBE]
                            .iter()
                            .chain(own.iter())
                            .map(|&position| (capability.clone(), position)),
                    );
                    prefetch(&local, *capability.time());
                }
            });
            if let Some((capability, position)) = queue.pop_front() {
                let inputs = local.run("forward", || advance(&local, *capability.time(), position, true));
                match inputs {
                    Some(inputs) => {
                        if position != PROBE {
                            let shared = &local.shared;
                            let share = local.tokens(position).len() as f64 / shared.fit.load.tokens as f64;
                            shared.advance(*capability.time(), |work| work.forward, share);
                        }
                        output.session(&capability).give(inputs);
                    }
                    None => queue.clear(),
                }
                if !queue.is_empty() {
                    again.activate();
                }
            }
        }
    })
}

/// Asks the system to read what comes next while this step is computed: the next block's weights, but of a mixture's experts, which
/// may be many, the next step's alone.
fn prefetch(local: &Local, step: u64) {
    let shared = &local.shared;
    if local.index != 0 {
        return;
    }
    let (block, site) = shared.plan.step(step);
    let following = match site {
        SiteKind::Qkv => shared.plan.block_steps(block + 1),
        _ => 0..0,
    };
    let soon = (step + 1..shared.plan.steps()).take(1);
    let linears = |step: u64| shared.plan.step_linears(step).iter();
    let ahead = following
        .flat_map(linears)
        .filter(|linear| linear.expert().is_none());
    let experts = soon.flat_map(linears).filter(|linear| linear.expert().is_some());
    for linear in ahead.chain(experts) {
        shared.tower.prefetch(linear.block, &linear.spec);
    }
}

/// A batch in one of the streams, with what carries it.
pub(super) struct Passage<'a> {
    pub(super) local: &'a Local,
    position: usize,
    stream: Stream,
}

impl<'a> Passage<'a> {
    /// One a stream that runs; the inputs of the first are summed.
    pub(super) fn all(local: &'a Local, position: usize) -> impl Iterator<Item = Self> {
        let streams = local.shared.pass.streams().iter();
        streams.map(move |&stream| Self {
            local,
            position,
            stream,
        })
    }

    /// The linears of a step.
    pub(super) fn linears(&self, step: u64) -> Result<Arc<Weights>> {
        let shared = &self.local.shared;
        match self.stream {
            Stream::Original => shared.stages.original(step, &shared.plan, &shared.tower),
            Stream::Quantized => shared
                .stages
                .quantized(step, || super::install::committed_linears(shared, step)),
        }
    }

    /// Norms and options of a block.
    pub(super) fn layer(&self, block: usize) -> Result<Arc<Block>> {
        let shared = &self.local.shared;
        shared.stages.block(block, &shared.tower, &shared.rotary)
    }

    /// A site's input as its linears take it: it is kept and summed so, too.
    pub(super) fn rounded(&self, x: Tensor) -> Result<Tensor> {
        Ok(x.to_dtype(self.local.shared.tower.precision())?)
    }

    fn key(&self, slot: Slot) -> Key {
        (self.position, self.stream, slot)
    }

    pub(super) fn get(&self, slot: Slot) -> Result<Tensor> {
        self.local.store.borrow().get(self.key(slot))
    }

    pub(super) fn put(&self, slot: Slot, value: &Tensor) -> Result<()> {
        self.local.store.borrow_mut().put(self.key(slot), value)
    }

    pub(super) fn take(&self, slot: Slot) -> Result<Option<Tensor>> {
        self.local.store.borrow_mut().take(self.key(slot))
    }

    fn expect(&self, slot: Slot) -> Result<Tensor> {
        self.take(slot)?
            .ok_or_else(|| Error::Worker("an activation was lost".into()))
    }
}

/// One batch from the inputs of the step before to those of `step`, in each stream that runs. With `sums` false nobody will sum them.
pub fn advance(local: &Local, step: u64, position: usize, sums: bool) -> Result<Inputs> {
    let shared = &local.shared;
    let (block, site) = shared.plan.step(step);
    let (tokens, streams) = (local.tokens(position).len(), shared.pass.streams().len());
    let bytes = (shared.budget).take("a batch", shared.plan.batch_bytes(step, tokens, streams))?;
    let sites = match site {
        SiteKind::ExpertDown(_) => mixture::expert_inputs(local, step, position, sums)?,
        site => {
            let inputs = Passage::all(local, position).map(|passage| advance_stream(&passage, step));
            let mut inputs = inputs.collect::<Result<Vec<_>>>()?.into_iter();
            let x = inputs.next().flatten();
            if let (SiteKind::GateUp, Some(x), true) = (site, &x, sums) {
                let layer = shared.stages.block(block, &shared.tower, &shared.rotary)?;
                mixture::count(local, block, position, &layer, x)?;
            }
            let original = inputs.next().flatten();
            x.map(|x| SiteInput { site, x, original }).into_iter().collect()
        }
    };
    let batch = shared.batches.get(position);
    Ok(Inputs {
        probe: position == PROBE,
        multiplicity: batch.map_or(0, |batch| batch.multiplicity),
        held_out: batch.is_some_and(|batch| batch.held_out),
        sites,
        bytes,
    })
}

/// One batch, one stream, from the input of the step before to the input of this one; `None` where an earlier step had this input.
fn advance_stream(passage: &Passage<'_>, step: u64) -> Result<Option<Tensor>> {
    let plan = &passage.local.shared.plan;
    let (block, site) = plan.step(step);
    let layer = passage.layer(block)?;
    let carriers = || -> Result<Vec<_>> { plan.carriers(step).map(|step| passage.linears(step)).collect() };
    let before = || passage.linears(step - 1);
    let compress = || -> Result<Latents> {
        let latents = layer.compress(&layer.enter(&passage.get(Slot::Residual)?)?, &before()?)?;
        passage.put(Slot::Latents, &latents.join()?)?;
        Ok(latents)
    };
    let x = match site {
        SiteKind::Qkv => {
            if block > 0 {
                leave(passage, step - 1)?;
            }
            layer.enter(&passage.get(Slot::Residual)?)?
        }
        SiteKind::QB => compress()?.query,
        SiteKind::KvB if plan.carriers(step).is_empty() => {
            layer.split_latents(&passage.get(Slot::Latents)?)?.key_value
        }
        SiteKind::KvB => compress()?.key_value,
        SiteKind::O => {
            let length = passage.local.sequence_length(passage.position);
            let x = match &carriers()?[..] {
                // q_b and kv_b, or kv_b alone.
                linears if layer.spec.mla.is_some() => {
                    let latents = layer.split_latents(&passage.expect(Slot::Latents)?)?;
                    let (key_value, query) = linears
                        .split_last()
                        .ok_or_else(|| Error::Worker("no linear of latent attention".into()))?;
                    let query = query.first().map_or(&[][..], |query| &query[..]);
                    layer.attend_latents(&latents, query, key_value, length)?
                }
                _ => layer.attend(&layer.enter(&passage.get(Slot::Residual)?)?, &before()?, length)?,
            };
            let x = passage.rounded(x)?;
            passage.put(Slot::SiteInput, &x)?;
            x
        }
        SiteKind::GateUp if plan.leads(step) => {
            let x = passage.expect(Slot::SiteInput)?;
            let residual = layer.join_attention(&passage.get(Slot::Residual)?, &x, &before()?)?;
            passage.put(Slot::Residual, &residual)?;
            layer.mlp_input(&residual)?
        }
        SiteKind::GateUp => {
            let sum = mixture::add_outputs(passage, step - 1)?;
            passage.put(Slot::Mixture, &sum)?;
            return Ok(None);
        }
        // Of the MLP, or of a mixture's shared expert.
        SiteKind::Down => {
            let x = inner(passage, &layer, &passage.get(Slot::Residual)?, step - 1)?;
            if plan.keeps_inner(step) {
                passage.put(Slot::SiteInput, &x)?;
            }
            x
        }
        SiteKind::ExpertDown(_) => return Err(Error::Worker("experts go in groups".into())),
    };
    Ok(Some(x))
}

/// From the residual after the attention to the input of an MLP's down, through the linears of step `gate_up`.
fn inner(passage: &Passage<'_>, layer: &Block, residual: &Tensor, gate_up: u64) -> Result<Tensor> {
    passage.rounded(layer.gate(&layer.mlp_input(residual)?, &passage.linears(gate_up)?)?)
}

/// From the input of a block's last downs, those of step `last`, to the residual after the block.
fn leave(passage: &Passage<'_>, last: u64) -> Result<()> {
    let plan = &passage.local.shared.plan;
    let (block, _) = plan.step(last);
    let layer = passage.layer(block)?;
    let after = match layer.mixture {
        Some(_) => {
            let sum = mixture::add_outputs(passage, last)?;
            layer.join_mixture(&passage.get(Slot::Residual)?, sum)?
        }
        None => {
            let residual = passage.get(Slot::Residual)?;
            let x = match plan.makes_inner(last + 1) {
                true => inner(passage, &layer, &residual, last - 1)?,
                false => passage.expect(Slot::SiteInput)?,
            };
            layer.join_mlp(&residual, &x, &passage.linears(last)?)?
        }
    };
    passage.put(Slot::Residual, &after)
}
