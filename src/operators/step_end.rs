//! The frontier as a barrier: the one pattern that most operators here share.

use super::local::Local;
use crate::error::Result;
use std::collections::BTreeMap;
use std::rc::Rc;
use timely::ExchangeData;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::{Capability, Operator};

/// Collects the records of each step on the worker that `route` names, and hands all of them to `logic` once the frontier has
/// passed the step: then, and only then, nothing of it can be missing. What `logic` returns goes out at the same step.
///
/// An error halts the run.
pub fn at_step_end<'scope, D, O>(
    stream: StreamVec<'scope, u64, D>,
    name: &'static str,
    route: impl Fn(&D) -> u64 + 'static,
    local: Rc<Local>,
    mut logic: impl FnMut(u64, Vec<D>) -> Result<Vec<O>> + 'static,
) -> StreamVec<'scope, u64, O>
where
    D: ExchangeData,
    O: Clone + 'static,
{
    stream.unary_frontier::<CapacityContainerBuilder<Vec<O>>, _, _, _>(
        Exchange::new(route),
        name,
        move |_, _| {
            let mut stash: BTreeMap<u64, (Capability<u64>, Vec<D>)> = BTreeMap::new();
            move |(input, frontier), output| {
                input.for_each_stamp(|capability, data| {
                    if let Some(capability) = capability.retain_least(output.output_index()) {
                        let step = *capability.time();
                        let (_, records) = stash.entry(step).or_insert_with(|| (capability, Vec::new()));
                        data.for_each(|container| records.append(container));
                    }
                });
                while let Some(entry) = stash
                    .first_entry()
                    .filter(|entry| !frontier.less_equal(entry.key()))
                {
                    let (step, (capability, records)) = entry.remove_entry();
                    if let Some(results) = local.run(name, || logic(step, records)) {
                        output.session(&capability).give_iterator(results.into_iter());
                    }
                }
            }
        },
    )
}
