//! `solve`: chooses codes, chunk by chunk.

use super::chunks::{Chunk, by_chunk};
use super::local::Local;
use super::records::{FactorFacts, Factored, Rows, SiteFactors, SolvedChunk};
use crate::budget::Grant;
use crate::device::{self, hessian::Symmetric};
use crate::error::{Error, Result};
use crate::numerics::Grid;
use crate::numerics::panels::Panels;
use crate::numerics::solver::{GptqOptions, gptq, output_error, round_to_nearest};
use crate::system::thread_cpu;
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
    let begin = thread_cpu();
    let plan = &local.shared.plan;
    let planned = &plan.linears[given.linear];
    // What stays on a device takes no memory.
    let bytes = match local.shared.tower.placement().on_device {
        true => Grant::default(),
        false => {
            let codes = plan.code_bytes(planned, given.rows(local).len());
            local.shared.budget.take("codes", codes)?
        }
    };
    let solution = match planned.to_solve() {
        None => None,
        Some(grid) => Some(solve_rows(local, &given, grid)?),
    };
    let (rows, facts, held_out) = match solution {
        None => (None, None, None),
        Some(Solution {
            rows,
            facts,
            held_out,
        }) => (Some(rows), facts, held_out),
    };
    Ok(SolvedChunk {
        linear: given.linear,
        chunk: given.chunk,
        rows,
        factor: facts.unwrap_or_default(),
        held_out,
        seconds: (thread_cpu() - begin).as_secs_f64(),
        bytes,
    })
}

/// Rows, what the report tells of the factor that gave them, and their error and energy over held-out tokens.
struct Solution {
    rows: Rows,
    facts: Option<FactorFacts>,
    held_out: Option<(f64, f64)>,
}

/// Solves with each factor, and keeps what has the smallest error over held-out tokens.
fn solve_rows(local: &Local, given: &Chunk, grid: Grid) -> Result<Solution> {
    let (recipe, factored) = (&local.shared.plan.recipe, &given.factored);
    let options = GptqOptions {
        match_original: recipe.match_original,
        refine_rounds: recipe.refine_rounds(),
    };
    let facts = |damp_percent, retries, dead| {
        Some(FactorFacts {
            tokens: factored.tokens,
            borrowed: factored.borrowed,
            damp_percent,
            retries,
            dead,
        })
    };
    let plain = |rows: Rows| Solution {
        rows,
        facts: None,
        held_out: None,
    };
    match &factored.factors {
        SiteFactors::Host { factors, .. } if factors.is_empty() => {
            let rows = match local.shared.tower.placement().on_device {
                true => Rows::Device(device::solver::round_to_nearest(&given.tensor(local)?, grid)?),
                false => Rows::Host(round_to_nearest(
                    &given.weights(local)?,
                    local.shared.plan.linears[given.linear].columns,
                    grid,
                )),
            };
            Ok(plain(rows))
        }
        SiteFactors::Host { factors, held_out } => {
            let weights = given.weights(local)?;
            best(factors.iter().map(|factor| {
                let rows = gptq(&weights, factor, grid, options);
                let measure =
                    |hessian: &Arc<Panels>| output_error(&weights, &rows.weight.dequantize(), hessian);
                Ok(Solution {
                    facts: facts(factor.damp_percent, factor.retries, factor.dead),
                    held_out: held_out.as_ref().map(measure),
                    rows: Rows::Host(rows),
                })
            }))
        }
        SiteFactors::Device { factors, held_out } => {
            let weights = given.tensor(local)?;
            best(factors.iter().map(|factor| {
                let rows = device::solver::gptq(&weights, factor, grid, options)?;
                let measure = |hessian: &Symmetric| device::solver::output_error(&weights, &rows, hessian);
                let damped = &factor.damped;
                Ok(Solution {
                    facts: facts(damped.damp_percent, damped.retries, damped.dead),
                    held_out: held_out.as_ref().map(measure).transpose()?,
                    rows: Rows::Device(rows),
                })
            }))
        }
    }
}

fn best(solutions: impl Iterator<Item = Result<Solution>>) -> Result<Solution> {
    let error = |solution: &Solution| solution.held_out.map_or(0.0, |(error, _)| error);
    let solutions: Vec<Solution> = solutions.collect::<Result<_>>()?;
    solutions
        .into_iter()
        .min_by(|a, b| error(a).total_cmp(&error(b)))
        .ok_or_else(|| Error::Worker("a site has no factor".into()))
}
