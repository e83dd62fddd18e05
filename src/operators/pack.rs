//! `pack`: a linear's chunks become one quantized weight, its bytes in the output's layout, and its line in the report.

use super::at_step_end;
use super::experts::tokens_min;
use super::local::{Local, Shared};
use super::records::{Content, FactorFacts, Packed, PackedLinear, Quantized, Rows, SolvedChunk};
use crate::budget::Grant;
use crate::error::{Error, Result};
use crate::model::SiteKind;
use crate::numerics::{QuantizedWeight, bits};
use crate::plan::PlannedLinear;
use crate::report::Row;
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use timely::dataflow::StreamVec;

/// One record a linear, on the worker that packs it. What is on a device stays there: the forward pass takes its values at once, and
/// [`super::commit`] packs the rest of it.
pub fn pack<'scope>(
    chunks: StreamVec<'scope, u64, SolvedChunk>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, PackedLinear> {
    let shared = Arc::clone(&local.shared);
    at_step_end(
        chunks,
        "pack",
        |chunk| chunk.linear as u64,
        local,
        move |_, chunks: Vec<SolvedChunk>| {
            let mut linears: BTreeMap<usize, Vec<SolvedChunk>> = BTreeMap::new();
            for chunk in chunks {
                linears.entry(chunk.linear).or_default().push(chunk);
            }
            let linears = linears.into_iter();
            linears
                .map(|(linear, mut chunks)| {
                    chunks.sort_by_key(|chunk| chunk.first_row);
                    let planned = &shared.plan.linears[linear];
                    if let Some(values) = values(&shared, &chunks)? {
                        return Ok(PackedLinear {
                            linear,
                            quantized: Some(Quantized::Values(values)),
                            content: Content::Solved(chunks),
                            bytes: Grant::default(),
                        });
                    }
                    let (quantized, packed) = match packed(&shared, planned, chunks)? {
                        None => (None, None),
                        Some((weight, packed, bytes)) => (Some((weight, bytes)), Some(packed)),
                    };
                    let (quantized, bytes) = quantized.unzip();
                    Ok(PackedLinear {
                        linear,
                        quantized: quantized.map(|weight| Quantized::Codes(Arc::new(weight))),
                        content: Content::Packed(packed),
                        bytes: bytes.unwrap_or_default(),
                    })
                })
                .collect()
        },
    )
}

/// The values of a linear whose codes are on a device.
fn values(shared: &Shared, chunks: &[SolvedChunk]) -> Result<Option<Tensor>> {
    let solved = chunks.iter().filter_map(|chunk| match &chunk.rows {
        Some(Rows::Device(solved)) => Some(solved.dequantize(shared.tower.precision())),
        _ => None,
    });
    let values = solved.collect::<Result<Vec<_>>>()?;
    match &values[..] {
        [] => Ok(None),
        [values] => Ok(Some(values.clone())),
        parts => Ok(Some(Tensor::cat(parts, 0)?)),
    }
}

/// A linear's codes, what is written of it, and the codes' bytes; `None` for one that is left alone, or kept.
pub(super) fn packed(
    shared: &Shared,
    planned: &PlannedLinear,
    chunks: Vec<SolvedChunk>,
) -> Result<Option<(QuantizedWeight, Packed, Grant)>> {
    let (plan, budget) = (&shared.plan, &shared.budget);
    let codes = budget.take("codes", plan.code_bytes(planned, planned.rows))?;
    let Some((weight, mut row)) = assemble(planned, chunks)? else {
        return Ok(None);
    };
    let sent = (planned.expert()).and_then(|e| shared.experts.of(planned.block, e));
    if let Some(sent) = sent {
        row.tokens = sent.tokens.max(0) as u64;
    }
    let packed = Packed {
        bytes: budget.take("packed tensors", plan.packed_bytes(planned))?,
        tensors: plan.format.pack(&weight),
        row,
    };
    Ok(Some((weight, packed, codes)))
}

/// `None` for a linear that is left alone, or kept.
fn assemble(planned: &PlannedLinear, chunks: Vec<SolvedChunk>) -> Result<Option<(QuantizedWeight, Row)>> {
    let Some(grid) = planned.to_solve() else {
        return Ok(None);
    };
    let groups = planned.columns / grid.group_size;
    let width = bits::words(planned.columns, grid.bits);
    let mut weight = QuantizedWeight {
        grid,
        rows: 0,
        columns: planned.columns,
        codes: Vec::new(),
        scales: Vec::new(),
        zeros: Vec::new(),
    };
    let (mut error, mut energy, mut clipped, mut seconds) = (0.0, 0.0, 0, 0.0);
    let (mut held_out, mut damp) = (None, 0.0);
    let facts = chunks.first().map(|chunk| chunk.factor).unwrap_or_default();
    for chunk in chunks {
        let Some(rows) = chunk.rows.map(Rows::into_host).transpose()? else {
            continue;
        };
        let share = rows.weight.rows as f64 / planned.rows as f64;
        weight.rows += rows.weight.rows;
        append(&mut weight.codes, rows.weight.codes, planned.rows * width);
        append(&mut weight.scales, rows.weight.scales, planned.rows * groups);
        append(&mut weight.zeros, rows.weight.zeros, planned.rows * groups);
        error += rows.error;
        energy += rows.energy;
        clipped += rows.clipped;
        seconds += chunk.seconds;
        // Each chunk may have chosen its own.
        damp += chunk.factor.damp_percent * share;
        if let Some((lost, of)) = chunk.held_out {
            let (error, energy) = held_out.unwrap_or((0.0, 0.0));
            held_out = Some((error + lost, energy + of));
        }
    }
    if weight.rows != planned.rows {
        return Err(Error::Worker(format!(
            "{} has {} of {} rows",
            planned.name, weight.rows, planned.rows
        )));
    }
    let retried =
        (facts.retries > 0).then(|| format!("damping raised {} times to factor the Hessian", facts.retries));
    let fallback = planned.fallback.clone().into_iter();
    let notes: Vec<String> = fallback.chain(retried).chain(too_few(planned, facts)).collect();
    let row = Row {
        name: planned.name.clone(),
        scheme: planned.scheme(),
        tokens: facts.tokens,
        relative_error: if energy > 0.0 { error / energy } else { 0.0 },
        held_out_error: held_out
            .filter(|(_, energy)| *energy > 0.0)
            .map(|(error, energy)| error / energy),
        damp_percent: damp,
        clip_rate: clipped as f64 / (planned.rows * planned.columns) as f64,
        dead_columns: facts.dead as u64,
        fallback: (!notes.is_empty()).then(|| notes.join("; ")),
        seconds,
    };
    Ok(Some((weight, row)))
}

/// Appends to what will have so many elements. A linear of one chunk is not copied.
fn append<T>(all: &mut Vec<T>, part: Vec<T>, whole: usize) {
    match all.is_empty() && part.len() == whole {
        true => *all = part,
        false => {
            all.reserve_exact(whole - all.len());
            all.extend(part);
        }
    }
}

/// What an expert's report says where too few tokens were sent to it.
fn too_few(planned: &PlannedLinear, facts: FactorFacts) -> Option<String> {
    let SiteKind::ExpertDown(_) = planned.site else {
        return None;
    };
    let (tokens, width, borrowed) = (facts.tokens, planned.columns, facts.borrowed);
    let wanted = tokens_min(width);
    (tokens < wanted).then(|| {
        let others = (borrowed > 0).then(|| format!("{borrowed} that were sent to other experts"));
        let rounding = (tokens + borrowed < wanted).then(|| "plain rounding".to_owned());
        let lent: Vec<String> = others.into_iter().chain(rounding).collect();
        format!(
            "{tokens} tokens of the {wanted} that {width} channels need; for the rest count {}; more text, or --all-experts, would help",
            lent.join(" and ")
        )
    })
}
