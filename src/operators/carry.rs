//! `carry`: takes each window through the decoder layers, one a step: time is the block.

use super::local::Halt;
use crate::error::Result;
use std::collections::VecDeque;
use std::sync::Arc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::core::OkErr;
use timely::dataflow::operators::{Capability, Operator};

/// Calls `advance(block, position)` for each position, one an activation, at the block that is its time. What it gives is `Ok`, the
/// position, which then belongs to the next block, or `Err`, the results of a position that has passed the last one.
///
/// An error halts the run.
pub fn carry<'scope, T: Clone + 'static>(
    steps: StreamVec<'scope, u64, usize>,
    halt: Arc<Halt>,
    mut advance: impl FnMut(usize, usize) -> Result<Vec<Result<usize, T>>> + 'static,
) -> (StreamVec<'scope, u64, usize>, StreamVec<'scope, u64, T>) {
    let scope = steps.scope();
    let results = steps.unary::<CapacityContainerBuilder<Vec<Result<usize, T>>>, _, _, _>(
        Pipeline,
        "carry",
        move |_, info| {
            let again = scope.worker().activator_for(info.address);
            let mut queue: VecDeque<(Capability<u64>, usize)> = VecDeque::new();
            move |input, output| {
                input.for_each_stamp(|capability, data| {
                    if let Some(capability) = capability.retain_least(output.output_index()) {
                        queue.extend(
                            data.flat_map(|c| c.drain(..))
                                .map(|position| (capability.clone(), position)),
                        );
                    }
                });
                // Earlier blocks first, so that at most two blocks' weights are in use.
                queue
                    .make_contiguous()
                    .sort_by_key(|(capability, position)| (*capability.time(), *position));
                if let Some((capability, position)) = queue.pop_front().filter(|_| !halt.is_raised()) {
                    match advance(*capability.time() as usize, position) {
                        Ok(results) => output.session(&capability).give_iterator(results.into_iter()),
                        Err(error) => {
                            halt.raise(error);
                            queue.clear();
                        }
                    }
                }
                if !queue.is_empty() {
                    again.activate();
                }
            }
        },
    );
    results.ok_err(|result| result)
}
