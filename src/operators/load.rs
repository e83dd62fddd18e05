//! `load`: reads a step's sums from an artifact, on the worker that owns its block.

use super::local::Local;
use super::records::{Go, Merged};
use crate::artifact::Artifact;
use std::rc::Rc;
use std::sync::Arc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;

/// Every worker is told of every step; its owner reads.
pub fn load<'scope>(
    steps: StreamVec<'scope, u64, Go>,
    local: Rc<Local>,
    artifact: Arc<Artifact>,
) -> StreamVec<'scope, u64, Merged> {
    steps.unary::<CapacityContainerBuilder<Vec<Merged>>, _, _, _>(Pipeline, "load", move |_, _| {
        move |input, output| {
            input.for_each_stamp(|capability, _| {
                let Some(capability) = capability.retain_least(output.output_index()) else {
                    return;
                };
                let step = *capability.time();
                if local.owner(step) != local.index as u64 {
                    return;
                }
                let (block, site) = local.shared.plan.step(step);
                if let Some(sums) = local.run("load", || artifact.site(block, site)) {
                    output.session(&capability).give(Merged(sums));
                }
            });
        }
    })
}
