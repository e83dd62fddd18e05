//! `embed`: batches become residuals.

use super::activations::{PROBE, Slot};
use super::local::Local;
use super::records::Go;
use crate::error::Result;
use std::rc::Rc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::{Capability, Operator};

/// Takes batch positions, dealt over the workers; once all have come, says [`Go`].
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
                    if local.run("embed", || fill(&local)).is_some() {
                        output.session(&capability).give(Go);
                    }
                }
            }
        },
    )
}

/// Fills the store.
fn fill(local: &Local) -> Result<()> {
    let shared = &local.shared;
    for &position in local.batches.borrow().iter().chain([&PROBE]) {
        let residual = shared.tower.embed(local.tokens(position))?;
        for &stream in shared.pass.streams() {
            local
                .store
                .borrow_mut()
                .put((position, stream, Slot::Residual), &residual)?;
        }
    }
    Ok(())
}
