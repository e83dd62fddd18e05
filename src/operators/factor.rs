//! `factor`: damps and factors a step's Hessian, where its statistics are, and sends the factor to every worker.

use super::local::Local;
use super::records::{Factored, Merged};
use crate::error::Result;
use crate::numerics::factor::Factor;
use crate::statistics::Product;
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
                            let gram = statistics.to_f64(Product::Gram).unwrap_or_default();
                            let cross = statistics.to_f64(Product::Cross);
                            let tokens = u64::try_from(statistics.tokens()).unwrap_or(0);
                            let held_out = statistics.to_f64(Product::HeldOut);
                            drop(statistics);
                            let mut damps = plan.recipe.damp_percent.candidates();
                            let last = damps.pop().unwrap_or_default();
                            let factor = |gram, cross, damp| {
                                Factor::new(name, gram, cross, damp, plan.recipe.actorder).map(Arc::new)
                            };
                            let mut factors = damps
                                .into_iter()
                                .map(|damp| factor(gram.clone(), cross.clone(), damp))
                                .collect::<Result<Vec<_>>>()?;
                            // The last takes the sums themselves: with one damping there is one copy.
                            factors.push(factor(gram, cross, last)?);
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
