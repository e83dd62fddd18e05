//! `factor`: damps and factors a step's Hessian, where its statistics are, and sends the factor to every worker.

use super::local::Local;
use super::records::{Factored, Merged};
use crate::error::{Error, Result};
use crate::numerics::factor::{Factor, shift};
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
                            let shift = products.cross.map(|cross| Arc::new(shift(cross, &gram)));
                            let refined = recipe.refine_rounds() > 0;
                            let factor = |damp| {
                                Factor::new(name, &gram, shift.clone(), damp, recipe.actorder, refined)
                            };
                            let damps = recipe.damp_percent.candidates().into_iter();
                            let factors = damps
                                .map(|damp| factor(damp).map(Arc::new))
                                .collect::<Result<_>>()?;
                            let held_out = products.held_out;
                            Ok(Factored {
                                factors,
                                held_out: held_out.map(Arc::new),
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
