//! `solve`: chooses codes, chunk by chunk.

use super::chunks::{Chunk, by_chunk};
use super::local::Local;
use super::records::{FactorFacts, Factored, SolvedChunk};
use crate::error::Result;
use crate::numerics::Grid;
use crate::numerics::factor::Factor;
use crate::numerics::panels::Panels;
use crate::numerics::solver::{GptqOptions, SolvedRows, gptq, output_error, round_to_nearest};
use crate::plan::CHUNK_ROWS;
use crate::report::thread_cpu;
use std::rc::Rc;
use std::sync::Arc;
use timely::dataflow::StreamVec;

/// The chunks of each step's linears that fall to this worker.
pub fn solve<'scope>(
    factors: StreamVec<'scope, u64, Factored>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, SolvedChunk> {
    by_chunk(factors, "solve", local, solve_chunk)
}

fn solve_chunk(local: &Local, given: Chunk) -> Result<SolvedChunk> {
    let Chunk {
        step,
        linear,
        chunk,
        factored,
    } = given;
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
                false => best(&weights, &factored, grid, options),
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
