//! The rows of a step's linears in chunks of fixed size, dealt over the workers, one chunk an activation: the pattern of those operators
//! that look at weights with a factor at hand.

use super::local::Local;
use super::records::Factored;
use crate::error::Result;
use crate::plan::CHUNK_ROWS;
use std::collections::VecDeque;
use std::rc::Rc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::{Capability, Operator};

/// Rows of one linear.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Step of the plan.
    pub step: u64,
    /// Position of the linear in the plan.
    pub linear: usize,
    /// Position of the chunk within the linear.
    pub chunk: usize,
    /// Factors of the linear's input.
    pub factored: Factored,
}

/// What `work` makes of the chunks that fall to this worker. An error halts the run.
pub fn by_chunk<'scope, T: Clone + 'static>(
    factors: StreamVec<'scope, u64, Factored>,
    name: &'static str,
    local: Rc<Local>,
    mut work: impl FnMut(&Local, Chunk) -> Result<T> + 'static,
) -> StreamVec<'scope, u64, T> {
    let scope = factors.scope();
    factors.unary::<CapacityContainerBuilder<Vec<T>>, _, _, _>(Pipeline, name, move |_, info| {
        let again = scope.worker().activator_for(info.address);
        let mut queue: VecDeque<(Capability<u64>, Chunk)> = VecDeque::new();
        move |input, output| {
            input.for_each_stamp(|capability, data| {
                let Some(capability) = capability.retain_least(output.output_index()) else {
                    return;
                };
                let step = *capability.time();
                for factored in data.flat_map(|container| container.drain(..)) {
                    let linears = local.shared.plan.step_linears(step).iter();
                    let chunks = linears.flat_map(|linear| {
                        (0..linear.rows.div_ceil(CHUNK_ROWS)).map(move |chunk| (linear, chunk))
                    });
                    let own = chunks.enumerate().filter(|(i, (linear, _))| {
                        i % local.peers == local.index && factored.site.is_none_or(|site| site == linear.site)
                    });
                    queue.extend(own.map(|(_, (linear, chunk))| {
                        let chunk = Chunk {
                            step,
                            linear: linear.index,
                            chunk,
                            factored: factored.clone(),
                        };
                        (capability.clone(), chunk)
                    }));
                }
            });
            if let Some((capability, chunk)) = queue.pop_front() {
                match local.run(name, || work(&local, chunk)) {
                    Some(made) => output.session(&capability).give(made),
                    None => queue.clear(),
                }
                if !queue.is_empty() {
                    again.activate();
                }
            }
        }
    })
}
