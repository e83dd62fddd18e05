//! `factor`: damps and factors a step's Hessian, where its statistics are, and sends the factor to every worker.

use super::local::Local;
use super::records::{Factored, Merged};
use crate::error::{Error, Result};
use crate::memory::Room;
use crate::numerics::factor::{Factor, Factoring, shift};
use std::rc::Rc;
use std::sync::Arc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;
use timely::dataflow::operators::vec::Broadcast;

/// One record a step and worker.
pub fn factor<'scope>(
    merged: StreamVec<'scope, u64, Merged>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, Factored> {
    let factors =
        merged.unary::<CapacityContainerBuilder<Vec<Factored>>, _, _, _>(Pipeline, "factor", move |_, _| {
            move |input, output| {
                input.for_each_stamp(|capability, data| {
                    let Some(capability) = capability.retain_least(output.output_index()) else {
                        return;
                    };
                    for Merged(statistics) in data.flat_map(|container| container.drain(..)) {
                        let step = *capability.time();
                        let result = local.run("factor", || {
                            let plan = &local.shared.plan;
                            if !plan.is_active(step) {
                                return Ok(Factored {
                                    factors: Vec::new(),
                                    held_out: None,
                                    tokens: 0,
                                });
                            }
                            let name = &plan.step_linears(step)[0].name;
                            let recipe = &plan.recipe;
                            let tokens = u64::try_from(statistics.tokens()).unwrap_or(0);
                            let products = statistics.into_products();
                            let gram = products
                                .gram
                                .ok_or_else(|| Error::Worker("no XᵀX was summed".into()))?;
                            let room = local.shared.room(step);
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
                            let damps = recipe.damp_percent.candidates().into_iter();
                            Ok(Factored {
                                factors: damps.map(factor).collect::<Result<_>>()?,
                                held_out: products.held_out.map(Arc::new),
                                tokens,
                            })
                        });
                        if let Some(factored) = result {
                            output.session(&capability).give(factored);
                        }
                    }
                });
            }
        });
    factors.broadcast()
}
