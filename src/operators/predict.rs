//! `predict`: what each linear would lose at each of some bit widths, without solving it. A step's rows are cut into the chunks that
//! `solve` cuts, dealt over the workers; one chunk an activation.

use super::local::Local;
use super::records::{Factored, PredictedChunk};
use crate::error::{Error, Result};
use crate::numerics::Grid;
use crate::numerics::predict::predicted_loss;
use crate::plan::CHUNK_ROWS;
use std::collections::VecDeque;
use std::rc::Rc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::{Capability, Operator};

/// The chunks of each step's linears that fall to this worker, at `widths` bits.
pub fn predict<'scope>(
    factors: StreamVec<'scope, u64, Factored>,
    local: Rc<Local>,
    widths: Vec<u32>,
) -> StreamVec<'scope, u64, PredictedChunk> {
    let scope = factors.scope();
    factors.unary::<CapacityContainerBuilder<Vec<PredictedChunk>>, _, _, _>(
        Pipeline,
        "predict",
        move |_, info| {
            let again = scope.worker().activator_for(info.address);
            let mut queue: VecDeque<(Capability<u64>, usize, usize, Factored)> = VecDeque::new();
            move |input, output| {
                input.for_each_stamp(|capability, data| {
                    let Some(capability) = capability.retain_least(output.output_index()) else {
                        return;
                    };
                    for factored in data.flat_map(|container| container.drain(..)) {
                        let linears = local.shared.plan.step_linears(*capability.time()).iter();
                        let chunks =
                            linears
                                .filter(|linear| linear.to_solve().is_some())
                                .flat_map(|linear| {
                                    (0..linear.rows.div_ceil(CHUNK_ROWS)).map(|chunk| (linear.index, chunk))
                                });
                        let own = chunks.enumerate().filter(|(i, _)| i % local.peers == local.index);
                        queue.extend(own.map(|(_, (linear, chunk))| {
                            (capability.clone(), linear, chunk, factored.clone())
                        }));
                    }
                });
                if let Some((capability, linear, chunk, factored)) = queue.pop_front() {
                    let step = *capability.time();
                    match local.run("predict", || {
                        predict_chunk(&local, step, (linear, chunk), &factored, &widths)
                    }) {
                        Some(predicted) => {
                            local.shared.observer.advance(1);
                            output.session(&capability).give(predicted);
                        }
                        None => queue.clear(),
                    }
                    if !queue.is_empty() {
                        again.activate();
                    }
                }
            }
        },
    )
}

fn predict_chunk(
    local: &Local,
    step: u64,
    (linear, chunk): (usize, usize),
    factored: &Factored,
    widths: &[u32],
) -> Result<PredictedChunk> {
    let shared = &local.shared;
    let planned = &shared.plan.linears[linear];
    let (Some(grid), Some(factor)) = (planned.to_solve(), factored.factors.first()) else {
        return Err(Error::Worker(format!("{} has no factor", planned.name)));
    };
    let first = chunk * CHUNK_ROWS;
    let rows = CHUNK_ROWS.min(planned.rows - first);
    let originals = shared.stages.original(step, &shared.plan, &shared.tower)?;
    let weights = originals[planned.slot]
        .weight
        .narrow(0, first, rows)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    let importance = factor.importance();
    let loss = |&bits: &u32| predicted_loss(&weights, &importance, Grid { bits, ..grid });
    Ok(PredictedChunk {
        linear,
        chunk,
        losses: widths.iter().map(loss).collect(),
    })
}
