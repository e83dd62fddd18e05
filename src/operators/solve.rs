//! `solve`: chooses codes, chunk by chunk.

use super::chunks::{Chunk, by_chunk};
use super::local::Local;
use super::records::{FactorFacts, Factored, Rows, SiteFactors, SolvedChunk};
use crate::budget::Grant;
use crate::device::{self, hessian::Symmetric, solver::Solved};
use crate::error::{Error, Result};
use crate::numerics::Grid;
use crate::numerics::panels::Panels;
use crate::numerics::solver::{GptqOptions, gptq, output_error, round_to_nearest};
use crate::plan::Part;
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

fn solve_chunk(local: &Local, given: Chunk) -> Result<Vec<SolvedChunk>> {
    let begin = thread_cpu();
    let shared = &local.shared;
    let to_solve = |part: &Part| shared.plan.linears[part.linear].to_solve();
    // What stays on a device takes no memory.
    let bytes = given
        .planned
        .parts
        .iter()
        .map(|part| match shared.tower.placement().on_device {
            true => Ok(Grant::default()),
            false => {
                let planned = &shared.plan.linears[part.linear];
                let codes = shared.plan.code_bytes(planned, part.rows.len());
                shared.budget.take("codes", codes)
            }
        });
    let bytes: Vec<Grant> = bytes.collect::<Result<_>>()?;
    // What is solved together stays together where an earlier output holds a part of it: a device's products may depend on their number of rows.
    let solutions = match given.planned.parts.iter().find_map(to_solve) {
        None => Vec::new(),
        Some(grid) => solve_rows(local, &given, grid)?,
    };
    let seconds = (thread_cpu() - begin).as_secs_f64() / given.planned.rows() as f64;
    let mut solutions = solutions.into_iter();
    let parts = given.planned.parts.iter().zip(bytes).map(|(part, bytes)| {
        let solution = solutions.next().filter(|_| to_solve(part).is_some());
        let (rows, facts, held_out) = match solution {
            None => (None, None, None),
            Some(Solution {
                rows,
                facts,
                held_out,
            }) => (Some(rows), facts, held_out),
        };
        SolvedChunk {
            linear: part.linear,
            first_row: part.rows.start,
            rows,
            factor: facts.unwrap_or_default(),
            held_out,
            seconds: seconds * part.rows.len() as f64,
            bytes,
        }
    });
    Ok(parts.collect())
}

/// Rows of a part, what the report tells of the factor that gave them, and their error and energy over held-out tokens.
struct Solution {
    rows: Rows,
    facts: Option<FactorFacts>,
    held_out: Option<(f64, f64)>,
}

impl Solution {
    fn plain(rows: Rows) -> Self {
        Self {
            rows,
            facts: None,
            held_out: None,
        }
    }
}

/// Solves with each factor, and keeps of each part what has the smallest error over held-out tokens.
fn solve_rows(local: &Local, given: &Chunk, grid: Grid) -> Result<Vec<Solution>> {
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
    let parts = given.planned.parts.iter();
    match &factored.factors {
        SiteFactors::Host { factors, .. } if factors.is_empty() => {
            match local.shared.tower.placement().on_device {
                true => {
                    let rounded = device::solver::round_to_nearest(&given.joined(local)?, grid)?;
                    let places = given.planned.places();
                    places
                        .map(|place| Ok(Solution::plain(Rows::Device(rounded.rows(place)?))))
                        .collect()
                }
                false => parts
                    .map(|part| {
                        let width = local.shared.plan.linears[part.linear].columns;
                        let rounded = round_to_nearest(&given.weights(local, part)?, width, grid);
                        Ok(Solution::plain(Rows::Host(rounded)))
                    })
                    .collect(),
            }
        }
        SiteFactors::Host { factors, held_out } => {
            let solved = parts.map(|part| {
                let weights = given.weights(local, part)?;
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
            });
            solved.collect()
        }
        SiteFactors::Device { factors, held_out } => {
            let weights = given.joined(local)?;
            let solve = |factor| device::solver::gptq(&weights, factor, grid, options);
            let solved = factors.iter().map(|factor| solve(factor));
            let solved: Vec<Solved> = solved.collect::<Result<_>>()?;
            let parts = given.planned.places().map(|place| {
                let weights = weights.narrow(0, place.start, place.len())?;
                best(factors.iter().zip(&solved).map(|(factor, solved)| {
                    let rows = solved.rows(place.clone())?;
                    let measure =
                        |hessian: &Symmetric| device::solver::output_error(&weights, &rows, hessian);
                    let damped = &factor.damped;
                    Ok(Solution {
                        facts: facts(damped.damp_percent, damped.retries, damped.dead),
                        held_out: held_out.as_ref().map(measure).transpose()?,
                        rows: Rows::Device(rows),
                    })
                }))
            });
            parts.collect()
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
