//! `load`: reads a step's sums from an artifact, on the worker that owns its block.

use super::local::Local;
use super::records::{Go, Merged};
use crate::artifact::Artifact;
use crate::error::{Error, Result};
use crate::memory::Room;
use crate::statistics::{Exponents, SiteStatistics};
use std::rc::Rc;
use std::sync::Arc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;

/// Every worker is told of every step; its owner reads. Where nothing is to be solved, nothing is read: the sums are empty.
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
                if let Some(sums) = local.run("load", || read(&local, &artifact, step)) {
                    output.session(&capability).give(Merged(sums));
                }
            });
        }
    })
}

fn read(local: &Local, artifact: &Artifact, step: u64) -> Result<SiteStatistics> {
    if !local.shared.plan.is_active(step) {
        return SiteStatistics::new(Exponents::from_values(Vec::new()), &[], &Room::Memory);
    }
    let (block, site) = local.shared.plan.step(step);
    let sums = artifact.site(block, site, &local.shared.room(step))?;
    let wanted = local
        .shared
        .plan
        .step_linears(step)
        .first()
        .map(|linear| linear.columns);
    match wanted == Some(sums.width()) {
        true => Ok(sums),
        false => Err(Error::invalid(
            artifact.folder().display().to_string(),
            format!(
                "has {} channels at block {block}, input of {site:?}; the model has another number",
                sums.width()
            ),
            "the artifact is damaged: collect the statistics anew",
        )),
    }
}
