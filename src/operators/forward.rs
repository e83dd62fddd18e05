//! `forward`: carries each batch from the site quantized last to the next one, through the linears just installed, in the quantized
//! stream and, where the original is matched, in the full-precision one. Every linear runs exactly once a stream.

use super::activations::{PROBE, Slot, Stream};
use super::local::Local;
use super::records::{Go, SiteInput};
use crate::error::{Error, Result};
use crate::model::SiteKind;
use candle_core::Tensor;
use std::collections::VecDeque;
use std::rc::Rc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::{Capability, Operator};

/// The site's input of each batch that this worker holds, the probe's first; one batch an activation, so that what is downstream
/// consumes one input before the next is made.
pub fn forward<'scope>(
    steps: StreamVec<'scope, u64, Go>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, SiteInput> {
    let scope = steps.scope();
    steps.unary::<CapacityContainerBuilder<Vec<SiteInput>>, _, _, _>(Pipeline, "forward", move |_, info| {
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
                let site = local.run("forward", || advance(&local, *capability.time(), position));
                match site {
                    Some(site) => {
                        if position != PROBE {
                            local.shared.observer.advance(1);
                        }
                        output.session(&capability).give(site);
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

/// Asks the system to read the next block's weights while this one is computed.
fn prefetch(local: &Local, step: u64) {
    let shared = &local.shared;
    let (block, site) = shared.plan.step(step);
    if site == SiteKind::Qkv && local.index == 0 {
        for next in shared.plan.block_steps(block + 1) {
            for linear in shared.plan.step_linears(next) {
                shared.tower.prefetch(linear.block, &linear.spec);
            }
        }
    }
}

/// One batch from the input of the step before to the input of `step`, in each stream that runs.
pub fn advance(local: &Local, step: u64, position: usize) -> Result<SiteInput> {
    let shared = &local.shared;
    let mut streams = shared.pass.streams().iter();
    let mut next = || {
        streams
            .next()
            .map(|&stream| advance_stream(local, step, position, stream))
    };
    let x = next().ok_or_else(|| Error::Worker("no forward pass runs".into()))??;
    let original = next().transpose()?;
    let batch = shared.batches.get(position);
    Ok(SiteInput {
        probe: position == PROBE,
        multiplicity: batch.map_or(0, |batch| batch.multiplicity),
        held_out: batch.is_some_and(|batch| batch.held_out),
        x,
        original,
    })
}

/// One batch, one stream, from the input of the step before to the input of this one.
fn advance_stream(local: &Local, step: u64, position: usize, stream: Stream) -> Result<Tensor> {
    let shared = &local.shared;
    let linears = |step| match stream {
        Stream::Original => shared.stages.original(step, &shared.plan, &shared.tower),
        Stream::Quantized => shared
            .stages
            .quantized(step, || super::install::committed_linears(shared, step)),
    };
    let (block, site) = shared.plan.step(step);
    let layer = |block: usize| shared.stages.block(block, &shared.tower, &shared.rotary);
    let (residual_key, input_key) = (
        (position, stream, Slot::Residual),
        (position, stream, Slot::SiteInput),
    );
    let mut store = local.store.borrow_mut();
    let residual = store.get(residual_key)?;
    Ok(match site {
        SiteKind::Qkv => {
            let residual = match store.take(input_key)? {
                Some(x) => {
                    let residual = layer(block - 1)?.join_mlp(&residual, &x, &linears(step - 1)?)?;
                    store.put(residual_key, &residual)?;
                    residual
                }
                // The first block of a run, or the first after a replay.
                None => residual,
            };
            layer(block)?.enter(&residual)?
        }
        SiteKind::O => {
            let layer = layer(block)?;
            let x = layer.attend(
                &layer.enter(&residual)?,
                &linears(step - 1)?,
                local.sequence_length(position),
            )?;
            store.put(input_key, &x)?;
            x
        }
        SiteKind::GateUp => {
            let layer = layer(block)?;
            let x = store.take(input_key)?;
            let x = x.ok_or_else(|| Error::Worker("an activation was lost".into()))?;
            let residual = layer.join_attention(&residual, &x, &linears(step - 1)?)?;
            store.put(residual_key, &residual)?;
            layer.mlp_input(&residual)?
        }
        SiteKind::Down => {
            let layer = layer(block)?;
            let x = layer.gate(&layer.mlp_input(&residual)?, &linears(step - 1)?)?;
            store.put(input_key, &x)?;
            x
        }
        SiteKind::QB | SiteKind::KvB | SiteKind::ExpertDown(_) => {
            return Err(Error::Worker(format!("no sequential run reaches {site:?} yet")));
        }
    })
}
