//! `spread`: deals positions (of batches or windows) over the workers.

use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::Operator;

/// Each position on the worker `position % workers`.
pub fn spread(positions: StreamVec<'_, u64, usize>) -> StreamVec<'_, u64, usize> {
    let route = Exchange::new(|position: &usize| *position as u64);
    positions.unary::<CapacityContainerBuilder<Vec<usize>>, _, _, _>(route, "spread", |_, _| {
        move |input, output| {
            input.for_each_stamp(|capability, data| output.session(&capability).give_containers(data))
        }
    })
}
