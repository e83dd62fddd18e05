//! `predict`: what each linear would lose at each of some bit widths, without solving it, chunk by chunk.

use super::chunks::{Chunk, by_chunk};
use super::local::Local;
use super::records::{Factored, PredictedChunk, SiteFactors};
use crate::device;
use crate::error::{Error, Result};
use crate::numerics::Grid;
use crate::numerics::predict::predicted_loss;
use crate::plan::Part;
use std::rc::Rc;
use timely::dataflow::StreamVec;

/// The chunks of each step's linears that fall to this worker, at `widths` bits.
pub fn predict<'scope>(
    factors: StreamVec<'scope, u64, Factored>,
    local: Rc<Local>,
    widths: Vec<u32>,
) -> StreamVec<'scope, u64, PredictedChunk> {
    by_chunk(factors, "predict", local, move |local, chunk| {
        let parts = chunk.planned.parts.iter();
        parts
            .map(|part| predict_part(local, &chunk, part, &widths))
            .collect()
    })
}

fn predict_part(local: &Local, given: &Chunk, part: &Part, widths: &[u32]) -> Result<PredictedChunk> {
    let planned = &local.shared.plan.linears[part.linear];
    let predicted = |losses| PredictedChunk {
        linear: part.linear,
        first_row: part.rows.start,
        losses,
    };
    // A linear that is left alone loses nothing.
    let Some(grid) = planned.to_solve() else {
        return Ok(predicted(vec![0.0; widths.len()]));
    };
    let missing = || Error::Worker(format!("{} has no factor", planned.name));
    let grids = widths.iter().map(|&bits| Grid { bits, ..grid });
    let losses = match &given.factored.factors {
        SiteFactors::Host { factors, .. } => {
            let importance = factors.first().ok_or_else(missing)?.importance();
            let weights = given.weights(local, part)?;
            grids
                .map(|grid| predicted_loss(&weights, &importance, grid))
                .collect()
        }
        SiteFactors::Device { factors, .. } => {
            let importance = factors.first().ok_or_else(missing)?.importance()?;
            let weights = given.tensor(local, part)?;
            grids
                .map(|grid| device::solver::predicted_loss(&weights, &importance, grid))
                .collect::<Result<_>>()?
        }
    };
    Ok(predicted(losses))
}
