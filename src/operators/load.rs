//! `load`: reads a step's sums from an artifact, each site's on the worker that owns it.

use super::experts::Reached;
use super::local::Local;
use super::records::{Go, Merged, Summed};
use crate::artifact::{Artifact, DAMAGED};
use crate::device::sums::Sums;
use crate::error::{Error, Result};
use crate::model::SiteKind;
use crate::statistics::SiteStatistics;
use std::rc::Rc;
use std::sync::Arc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;

/// Every worker is told of every step; a site's owner reads. Where nothing is to be solved, nothing is read.
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
                let (block, _) = local.shared.plan.step(step);
                for &site in local.shared.plan.step_sites(step) {
                    if local.owner(block, site) != local.index as u64 {
                        continue;
                    }
                    if let Some(statistics) = local.run("load", || read(&local, &artifact, step, site)) {
                        output.session(&capability).give(Merged {
                            block,
                            site,
                            statistics,
                        });
                    }
                }
            });
        }
    })
}

fn read(local: &Local, artifact: &Artifact, step: u64, site: SiteKind) -> Result<Option<Summed>> {
    let plan = &local.shared.plan;
    let (block, _) = plan.step(step);
    if !plan.leads(step) || !plan.is_summed(block, site) {
        return Ok(None);
    }
    if site == SiteKind::GateUp {
        // For the report: these linears are of experts that not all of its tokens reach.
        let sites = plan.block_sites(block).into_iter().map(|(site, _)| site);
        let experts = sites.filter(|site| matches!(site, SiteKind::ExpertDown(_)));
        let tokens = artifact.tokens(block, experts)?.into_iter();
        local
            .shared
            .experts
            .set(block, tokens.map(Reached::new).collect())?;
    }
    let sums = artifact.site(block, site, &local.shared.room(step))?;
    let wanted = plan.step_linears(step).first().map(|linear| linear.columns);
    match wanted == Some(sums.width()) {
        true => Ok(Some(placed(local, sums)?)),
        false => Err(Error::invalid(
            artifact.folder().display().to_string(),
            format!(
                "has {} channels at block {block}, input of {site:?}; the model has another number",
                sums.width()
            ),
            DAMAGED,
        )),
    }
}

/// The sums where the solver wants them.
fn placed(local: &Local, sums: SiteStatistics) -> Result<Summed> {
    let tower = &local.shared.tower;
    let placement = tower.placement();
    Ok(match placement.on_device {
        true => Summed::Device(Arc::new(Sums::from_statistics(
            &sums,
            tower.precision(),
            &placement.device,
        )?)),
        false => Summed::Host(sums),
    })
}
