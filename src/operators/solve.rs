//! `solve`: chooses codes. A step's rows are cut into chunks of fixed size, dealt over the workers; one chunk an activation.

use super::local::Local;
use super::records::{FactorFacts, Factored, SolvedChunk};
use crate::error::Result;
use crate::numerics::Grid;
use crate::numerics::factor::Factor;
use crate::numerics::panels::Panels;
use crate::numerics::solver::{GptqOptions, SolvedRows, gptq, output_error, round_to_nearest};
use crate::plan::CHUNK_ROWS;
use crate::report::thread_cpu;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::{Capability, Operator};

/// The chunks of each step's linears that fall to this worker, a site's as soon as its factor is there.
pub fn solve<'scope>(
    factors: StreamVec<'scope, u64, Factored>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, SolvedChunk> {
    let scope = factors.scope();
    factors.unary::<CapacityContainerBuilder<Vec<SolvedChunk>>, _, _, _>(Pipeline, "solve", move |_, info| {
        let again = scope.worker().activator_for(info.address);
        let mut queue: VecDeque<(Capability<u64>, usize, usize, Factored)> = VecDeque::new();
        move |input, output| {
            input.for_each_stamp(|capability, data| {
                let Some(capability) = capability.retain_least(output.output_index()) else {
                    return;
                };
                for factored in data.flat_map(|container| container.drain(..)) {
                    let linears = local.shared.plan.step_linears(*capability.time());
                    let chunks = linears.iter().flat_map(|linear| {
                        (0..linear.rows.div_ceil(CHUNK_ROWS)).map(move |chunk| (linear, chunk))
                    });
                    let own = chunks.enumerate().filter(|(i, (linear, _))| {
                        i % local.peers == local.index && factored.site.is_none_or(|site| site == linear.site)
                    });
                    queue.extend(own.map(|(_, (linear, chunk))| {
                        (capability.clone(), linear.index, chunk, factored.clone())
                    }));
                }
            });
            if let Some((capability, linear, chunk, factored)) = queue.pop_front() {
                match local.run("solve", || {
                    solve_chunk(&local, *capability.time(), linear, chunk, &factored)
                }) {
                    Some(solved) => output.session(&capability).give(solved),
                    None => queue.clear(),
                }
                if !queue.is_empty() {
                    again.activate();
                }
            }
        }
    })
}

fn solve_chunk(
    local: &Local,
    step: u64,
    linear: usize,
    chunk: usize,
    factored: &Factored,
) -> Result<SolvedChunk> {
    let begin = thread_cpu();
    let shared = &local.shared;
    let planned = &shared.plan.linears[linear];
    let first = chunk * CHUNK_ROWS;
    let rows = CHUNK_ROWS.min(planned.rows - first);
    let solved = match planned.to_solve() {
        None => None,
        Some(grid) => {
            let originals = shared.stages.original(step, &shared.plan, &shared.tower)?;
            let weights = originals[planned.slot]
                .weight
                .narrow(0, first, rows)?
                .flatten_all()?
                .to_vec1::<f32>()?;
            let recipe = &shared.plan.recipe;
            let options = GptqOptions {
                match_original: recipe.match_original,
                refine_rounds: recipe.refine_rounds(),
            };
            match factored.factors.is_empty() {
                true => Some((round_to_nearest(&weights, planned.columns, grid), None, None)),
                false => best(&weights, factored, grid, options),
            }
        }
    };
    let (rows, factor, held_out) = solved.map_or((None, None, None), |(rows, factor, held_out)| {
        (Some(rows), factor, held_out)
    });
    let facts = factor.map(|factor| FactorFacts {
        tokens: factored.tokens,
        borrowed: factored.borrowed,
        damp_percent: factor.damp_percent,
        retries: factor.retries,
        dead: factor.dead,
    });
    Ok(SolvedChunk {
        linear,
        chunk,
        rows,
        factor: facts.unwrap_or_default(),
        held_out,
        seconds: (thread_cpu() - begin).as_secs_f64(),
    })
}

/// Rows, the factor that gave them, and their error and energy over held-out tokens.
type Solution<'a> = (SolvedRows, Option<&'a Factor>, Option<(f64, f64)>);

/// Solves with each factor, and keeps what has the smallest error over held-out tokens.
fn best<'a>(
    weights: &[f32],
    factored: &'a Factored,
    grid: Grid,
    options: GptqOptions,
) -> Option<Solution<'a>> {
    let solutions = factored.factors.iter().map(|factor| {
        let rows = gptq(weights, factor, grid, options);
        let measure = |hessian: &Arc<Panels>| output_error(weights, &rows.weight.dequantize(), hessian);
        let held_out = factored.held_out.as_ref().map(measure);
        (rows, Some(factor.as_ref()), held_out)
    });
    let error = |solution: &Solution<'_>| solution.2.map_or(0.0, |(error, _)| error);
    solutions.min_by(|a, b| error(a).total_cmp(&error(b)))
}
