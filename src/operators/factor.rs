//! `factor`: damps and factors a site's Hessian, where its statistics are, and sends the factor to every worker.

use super::experts::shrinkage;
use super::local::Local;
use super::records::{Factored, Merged, SiteFactors, Summed};
use crate::device;
use crate::error::{Error, Result};
use crate::memory::Room;
use crate::model::SiteKind;
use crate::numerics::factor::{Factor, Factoring, PANELS_HELD, shift};
use crate::statistics::SiteStatistics;
use std::rc::Rc;
use std::sync::Arc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;
use timely::dataflow::operators::vec::Broadcast;

/// One record a site and worker. A factor that several steps share, that of a mixture's gates and ups, is kept until the last of them.
pub fn factor<'scope>(
    merged: StreamVec<'scope, u64, Merged>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, Factored> {
    let factors =
        merged.unary::<CapacityContainerBuilder<Vec<Factored>>, _, _, _>(Pipeline, "factor", move |_, _| {
            let mut kept: Option<(usize, Factored)> = None;
            move |input, output| {
                input.for_each_stamp(|capability, data| {
                    let Some(capability) = capability.retain_least(output.output_index()) else {
                        return;
                    };
                    let step = *capability.time();
                    for merged in data.flat_map(|container| container.drain(..)) {
                        let (block, site) = (merged.block, merged.site);
                        let result = local.run("factor", || {
                            if !local.shared.plan.is_summed(block, site) {
                                return Ok(Factored {
                                    site: Some(site),
                                    ..Factored::default()
                                });
                            }
                            match (merged.statistics, &kept) {
                                (Some(statistics), _) => factor_site(&local, step, site, statistics),
                                (None, Some((of, factored))) if *of == block => Ok(factored.clone()),
                                (None, _) => Err(Error::Worker(format!("no factor of {site:?} was kept"))),
                            }
                        });
                        let Some(factored) = result else { continue };
                        let sites = local.shared.plan.step_sites(step).len() as f64;
                        local.shared.advance(step, |work| work.factor, 1.0 / sites);
                        if site == SiteKind::GateUp {
                            let last = local.shared.plan.trails(step);
                            kept = (!last).then(|| (block, factored.clone()));
                        }
                        output.session(&capability).give(factored);
                    }
                });
            }
        });
    factors.broadcast()
}

fn factor_site(local: &Local, step: u64, site: SiteKind, statistics: Summed) -> Result<Factored> {
    let plan = &local.shared.plan;
    let (block, _) = plan.step(step);
    let linears = plan.step_linears(step).iter();
    let name = linears
        .filter(|linear| linear.site == site)
        .map(|linear| &linear.name)
        .next()
        .ok_or_else(|| Error::Worker(format!("step {step} has no linear at {site:?}")))?;
    let recipe = &plan.recipe;
    let summed = u64::try_from(statistics.tokens()).unwrap_or(0);
    let (tokens, shrinkage) = match site {
        SiteKind::ExpertDown(expert) => {
            let reached = local.shared.experts.of(block, expert as usize);
            let own = reached.map_or(summed, |reached| reached.tokens.max(0) as u64);
            (own, shrinkage(summed, statistics.width()))
        }
        _ => (summed, 0.0),
    };
    let damps = recipe.damp_percent.candidates().into_iter();
    let damps = damps.map(|damp_percent| damp_percent + shrinkage);
    let factors = match statistics {
        Summed::Host(statistics) => on_host(local, step, name, statistics, damps)?,
        Summed::Device(sums) => {
            let refined = recipe.refine_rounds() > 0;
            let factors = device::factor::Factor::by_damping(name, &sums, damps, recipe.actorder, refined)?;
            SiteFactors::Device {
                factors: factors.into_iter().map(Arc::new).collect(),
                held_out: device::factor::held_out(&sums)?,
            }
        }
    };
    Ok(Factored {
        site: Some(site),
        factors,
        tokens,
        borrowed: summed - tokens.min(summed),
    })
}

fn on_host(
    local: &Local,
    step: u64,
    name: &str,
    statistics: SiteStatistics,
    damps: impl Iterator<Item = f64>,
) -> Result<SiteFactors> {
    let recipe = &local.shared.plan.recipe;
    let products = statistics.into_products();
    let gram = products
        .gram
        .ok_or_else(|| Error::Worker("no XᵀX was summed".into()))?;
    let room = local.shared.room(step);
    let _panels = local.shared.take_panels(step, PANELS_HELD)?;
    let refined = recipe.refine_rounds() > 0;
    // What lies in files is read by whole rows.
    let gram = match refined || matches!(room, Room::Scratch(_)) {
        true => gram.into_full(&room)?,
        false => gram,
    };
    let shift = products.cross.map(|cross| Arc::new(shift(cross, &gram)));
    let gram = Arc::new(gram);
    let factor = |damp_percent| {
        let how = Factoring {
            damp_percent,
            column_order: recipe.actorder,
            room: &room,
            threads: local.peers,
        };
        let factor = Factor::new(name, &gram, shift.clone(), how)?;
        Ok(Arc::new(match refined {
            true => factor.with_gram(Arc::clone(&gram)),
            false => factor,
        }))
    };
    Ok(SiteFactors::Host {
        factors: damps.map(factor).collect::<Result<_>>()?,
        held_out: products.held_out.map(Arc::new),
    })
}
