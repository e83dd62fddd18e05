//! `embed`: batches become residuals; blocks that an earlier run of the same command finished are replayed with their
//! committed weights, so that the stream is where that run left it.

use super::activations::{PROBE, Slot};
use super::forward::advance;
use super::local::Local;
use super::records::Go;
use crate::error::{Error, Result};
use std::rc::Rc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::{Capability, Operator};

/// Takes batch positions, dealt over the workers; once all have come, says [`Go`] at the first step that is not done.
pub fn embed<'scope>(
    batches: StreamVec<'scope, u64, (u64, usize)>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, Go> {
    let route = Exchange::new(|(id, _): &(u64, usize)| *id);
    batches.unary_frontier::<CapacityContainerBuilder<Vec<Go>>, _, _, _>(
        route,
        "embed",
        move |capability: Capability<u64>, _| {
            // Held from the start, so that a worker without a batch takes part, too.
            let mut held = Some(capability);
            move |(input, frontier), output| {
                input.for_each_stamp(|_, data| {
                    let mut own = local.batches.borrow_mut();
                    data.for_each(|container| own.extend(container.drain(..).map(|(_, position)| position)));
                });
                if frontier.less_equal(&0) {
                    return;
                }
                if let Some(capability) = held.take() {
                    local.batches.borrow_mut().sort_unstable();
                    if let Some(first) = local.run("embed", || start(&local)) {
                        output.session(&capability.delayed(&first)).give(Go);
                    }
                }
            }
        },
    )
}

/// Fills the store; returns the first step to run.
fn start(local: &Local) -> Result<u64> {
    let shared = &local.shared;
    let done = shared.output.blocks_done();
    let own = local.batches.borrow();
    for &position in own.iter().chain([&PROBE]) {
        let tokens = match position {
            PROBE => &shared.probe,
            position => &shared.batches[position].tokens,
        };
        let residual = shared.tower.embed(tokens)?;
        for &stream in shared.pass.streams() {
            local
                .store
                .borrow_mut()
                .put((position, stream, Slot::Residual), &residual)?;
        }
    }
    shared.tower.release_embedding();
    let first = shared.plan.block_steps(done).start;
    for step in 0..first {
        for &position in own.iter().chain([&PROBE]) {
            if shared.halt.is_raised() {
                return Err(Error::Interrupted);
            }
            advance(local, step, position, false)?;
        }
        // What carried these batches has served; a worker that is behind reads it again.
        if let Some(before) = step.checked_sub(1) {
            shared.stages.forget(before);
        }
    }
    Ok(first)
}
