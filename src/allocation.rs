//! Which bit width each linear has, at a wanted average: pure data and arithmetic, from measurements to a recipe.
//!
//! A **unit** is a set of linears that serving stacks fuse and that therefore have one width: those of one input (q, k and v; gate and up),
//! and all routed experts of a layer. What unit u costs the model at b bits is estimated as
//!
//! ```text
//! KL_u(b) = KL_u(p) · loss_u(b) / loss_u(p)
//! ```
//! where KL_u(p) is measured, on a model in which u alone has its p-bit codes, and loss_u(b) is predicted from statistics
//! ([`crate::numerics::predict`]). Rounding errors of different linears are nearly uncorrelated and the KL is quadratic in small ones, so
//! that the costs add up. The knapsack ([`crate::numerics::knapsack`]) then finds the widths of the smallest sum, of costs in which what
//! stands out is damped ([`Measured::weight`]).
//!
//! **Average bits** are those of the codes, over all quantized weights: an average of 4 has the size of a uniform 4-bit model with the same
//! groups. Scales are the same for every choice and come on top ([`effective_bits`]).

use crate::calibration::ContentId;
use crate::error::{Error, Result};
use crate::model::{SiteKind, Tower};
use crate::numerics::knapsack::{Choice, choose};
use crate::numerics::{Grid, ScaleDtype};
use crate::plan::{Plan, PlannedLinear, Schemes};
use crate::recipe::{BITS, Recipe, Scheme};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::mem::{Discriminant, discriminant};

/// Widths at which a unit's own KL may be measured, the first that the layout can hold everywhere: an error large enough to tell, small
/// enough to be quadratic.
const PROBE_BITS: [u32; 4] = [3, 4, 2, 8];

/// The KL of a unit is heavy-tailed over positions, and measured on few: what stands out of the others is partly chance, and does not add
/// up (units alone cost twice what they cost together). So KL a weight counts with this power in the choice. On SmolLM2 the plain KL of
/// 508 positions lost to uniform widths at 3 and 4 bits.
const KL_POWER: f64 = 0.7;
/// Below the width that is measured the KL grows faster than the squared error: the choice takes it for so much more.
const COARSER: f64 = 1.8;

/// Linears that have one width.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    /// Decoder layer.
    pub block: usize,
    /// Positions in [`Plan::linears`].
    pub linears: Vec<usize>,
    /// Weights of all of them.
    pub parameters: u64,
    /// Widths to choose from, ascending: one where a `[[scheme]]` of the recipe says it.
    pub widths: Vec<u32>,
}

/// The units of a plan's quantized linears, in order.
///
/// # Errors
/// The layout can hold a unit in no width.
pub fn units(plan: &Plan) -> Result<Vec<Unit>> {
    type Key = (usize, Option<Discriminant<SiteKind>>);
    let key = |linear: &PlannedLinear| -> Key {
        let routed = linear.spec.fused.is_some();
        (linear.block, (!routed).then(|| discriminant(&linear.site)))
    };
    let schemes = Schemes::new(&plan.recipe)?;
    let mut units: Vec<(Key, Unit)> = Vec::new();
    for linear in &plan.linears {
        let Some(grid) = linear.grid else { continue };
        let fits = |bits: u32| {
            let grid = Grid { bits, ..grid };
            let checked = plan.format.check(&linear.name, linear.rows, linear.columns, grid);
            checked.is_ok()
        };
        let stated = schemes.find(&linear.name).and_then(|scheme| scheme.bits);
        let widths = BITS
            .into_iter()
            .filter(|&bits| stated.is_none_or(|stated| stated == bits));
        let widths: Vec<u32> = widths.filter(|&bits| fits(bits)).collect();
        let parameters = (linear.rows * linear.columns) as u64;
        let own = key(linear);
        match units
            .iter_mut()
            .rev()
            .take_while(|(known, _)| known.0 == own.0)
            .find(|(known, _)| *known == own)
        {
            Some((_, unit)) => {
                unit.linears.push(linear.index);
                unit.parameters += parameters;
                unit.widths.retain(|bits| widths.contains(bits));
            }
            None => {
                let unit = Unit {
                    block: linear.block,
                    linears: vec![linear.index],
                    parameters,
                    widths,
                };
                units.push((own, unit));
            }
        }
    }
    let units: Vec<Unit> = units.into_iter().map(|(_, unit)| unit).collect();
    if let Some(unit) = units.iter().find(|unit| unit.widths.is_empty()) {
        return Err(Error::usage(
            "--average-bits",
            format!(
                "{} and the linears that are fused with it have no width in common that {} can hold",
                plan.linears[unit.linears[0]].name,
                plan.format.name()
            ),
            "leave them out with --ignore, or use another --format",
        ));
    }
    Ok(units)
}

/// The width at which the units that have a choice are measured.
///
/// # Errors
/// They have none in common.
pub fn probe_bits(units: &[Unit]) -> Result<u32> {
    let all_have = |bits: &u32| {
        let mut open = units.iter().filter(|unit| unit.widths.len() > 1);
        open.all(|unit| unit.widths.contains(bits))
    };
    PROBE_BITS.into_iter().find(all_have).ok_or_else(|| {
        Error::usage(
            "--average-bits",
            "the linears have no width in common at which they could be compared",
            "use another --format, or leave the odd ones out with --ignore",
        )
    })
}

/// What was measured of a unit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Module names of its linears.
    pub linears: Vec<String>,
    /// Their weights.
    pub parameters: u64,
    /// Mean KL(original ‖ model) a position where it alone is quantized, to [`Sensitivity::probe_bits`]; none where it has no choice.
    pub kl: Option<f64>,
    /// Predicted squared error of its outputs by width.
    pub losses: BTreeMap<u32, f64>,
}

/// What a model's units cost: `quantflow_sensitivity.json`. It holds for any average.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sensitivity {
    /// Digest of what was measured: checkpoint, statistics, grids.
    pub of: String,
    /// Width of the codes that the KL is of.
    pub probe_bits: u32,
    /// Ids of the windows that the KL was measured on.
    pub windows: Vec<ContentId>,
    /// Positions over which the KL is a mean.
    pub positions: u64,
    /// In the order of [`units`].
    pub units: Vec<Measured>,
}

impl Measured {
    /// What the unit costs the model at `bits`, as far as can be told: 0 where it was not measured.
    pub fn cost(&self, probe_bits: u32, bits: u32) -> f64 {
        let loss = |bits| self.losses.get(&bits).copied().unwrap_or(0.0);
        match loss(probe_bits) {
            probe if probe > 0.0 => self.kl.unwrap_or(0.0) * loss(bits) / probe,
            _ => 0.0,
        }
    }

    /// The same as the choice weighs it: a number to be compared, no KL.
    pub fn weight(&self, probe_bits: u32, bits: u32) -> f64 {
        let parameters = self.parameters.max(1) as f64;
        let cost = self.cost(probe_bits, bits);
        let kl = self.kl.unwrap_or(0.0) / parameters;
        let coarser = if bits < probe_bits { COARSER } else { 1.0 };
        match kl > 0.0 {
            true => cost * kl.powf(KL_POWER - 1.0) * coarser,
            false => 0.0,
        }
    }
}

/// The width of each unit: the smallest sum of weights at most `average` bits a weight.
///
/// # Errors
/// `average` is not between the smallest and the largest that the units allow, or the measurement is of other units.
pub fn allocate(units: &[Unit], sensitivity: &Sensitivity, average: f64) -> Result<Vec<u32>> {
    if units.len() != sensitivity.units.len() {
        return Err(Error::invalid(
            "sensitivity",
            format!(
                "is of {} groups of linears, the recipe has {}",
                sensitivity.units.len(),
                units.len()
            ),
            "measure anew: leave --sensitivity out",
        ));
    }
    expect_average(units, average)?;
    let choices: Vec<Vec<Choice>> = units
        .iter()
        .zip(&sensitivity.units)
        .map(|(unit, measured)| {
            let choice = |&bits: &u32| Choice {
                size: unit.parameters * u64::from(bits),
                loss: measured.weight(sensitivity.probe_bits, bits),
            };
            unit.widths.iter().map(choice).collect()
        })
        .collect();
    let budget = (average * parameters(units) as f64).floor() as u64;
    let chosen = choose(&choices, budget)
        .ok_or_else(|| Error::usage("--average-bits", format!("{average} cannot be reached"), ""))?;
    let pairs = units.iter().zip(chosen);
    Ok(pairs.map(|(unit, choice)| unit.widths[choice]).collect())
}

/// Checks that `average` is one that `units` can have.
///
/// # Errors
/// It is below the smallest, or above the largest.
pub fn expect_average(units: &[Unit], average: f64) -> Result<()> {
    let all = parameters(units).max(1) as f64;
    let mean = |width: fn(&Unit) -> Option<&u32>| {
        let bits = units
            .iter()
            .map(|unit| width(unit).map_or(0, |&bits| unit.parameters * u64::from(bits)));
        bits.sum::<u64>() as f64 / all
    };
    let (low, high) = (mean(|unit| unit.widths.first()), mean(|unit| unit.widths.last()));
    if (low..=high).contains(&average) {
        return Ok(());
    }
    Err(Error::usage(
        "--average-bits",
        format!(
            "{average} is not between {low} and {high}, the smallest and the largest that the linears can have"
        ),
        "code bits a quantized weight are counted, scales are not; [[scheme]]s with bits count as they are",
    ))
}

/// Weights of all units.
pub fn parameters(units: &[Unit]) -> u64 {
    units.iter().map(|unit| unit.parameters).sum()
}

/// Mean bits of the codes.
pub fn average_bits(units: &[Unit], widths: &[u32]) -> f64 {
    let bits = units
        .iter()
        .zip(widths)
        .map(|(unit, &bits)| unit.parameters * u64::from(bits));
    bits.sum::<u64>() as f64 / parameters(units).max(1) as f64
}

/// Bits a quantized weight of a whole plan, with scales and, where they differ, zero points.
pub fn effective_bits(plan: &Plan) -> f64 {
    let (mut bits, mut weights) = (0.0, 0.0);
    for linear in &plan.linears {
        let Some(grid) = linear.grid else { continue };
        let scale = match grid.scale_dtype {
            ScaleDtype::F32 => 32.0,
            ScaleDtype::Bf16 | ScaleDtype::F16 => 16.0,
        };
        let zero = if grid.symmetric { 0.0 } else { f64::from(grid.bits) };
        let count = (linear.rows * linear.columns) as f64;
        bits += count * (f64::from(grid.bits) + (scale + zero) / grid.group_size as f64);
        weights += count;
    }
    if weights > 0.0 { bits / weights } else { 0.0 }
}

/// `plan`'s recipe with the width of each unit: the most usual one as its own, the others as `[[scheme]]`s. What its schemes said of group
/// sizes and zero points still holds.
///
/// # Errors
/// Its schemes have unusable targets.
pub fn recipe(plan: &Plan, tower: &Tower, units: &[Unit], widths: &[u32]) -> Result<Recipe> {
    let found = Schemes::new(&plan.recipe)?;
    let mut weights: BTreeMap<u32, u64> = BTreeMap::new();
    for (unit, &bits) in units.iter().zip(widths) {
        *weights.entry(bits).or_default() += unit.parameters;
    }
    let usual = weights
        .iter()
        .max_by_key(|&(&bits, &count)| (count, std::cmp::Reverse(bits)));
    let bits_usual = usual.map_or(plan.recipe.bits, |(&bits, _)| bits);
    // (width, group size, symmetric) → (name around the block's number) → blocks
    type Blocks = BTreeMap<(String, String), Vec<usize>>;
    let mut schemes: BTreeMap<(u32, Option<usize>, Option<bool>), Blocks> = BTreeMap::new();
    for (unit, &bits) in units.iter().zip(widths) {
        for linear in unit.linears.iter().map(|&at| &plan.linears[at]) {
            let stated = found.find(&linear.name);
            let group_size = stated.and_then(|scheme| scheme.group_size);
            let symmetric = stated.and_then(|scheme| scheme.symmetric);
            if (bits, group_size, symmetric) == (bits_usual, None, None) {
                continue;
            }
            let prefix = tower.block_prefix(linear.block);
            let kind = linear.name.strip_prefix(&prefix).unwrap_or(&linear.name);
            let before = prefix
                .strip_suffix(&format!("{}.", linear.block))
                .unwrap_or(&prefix);
            let blocks = schemes.entry((bits, group_size, symmetric)).or_default();
            let blocks = blocks.entry((before.to_owned(), kind.to_owned())).or_default();
            blocks.push(linear.block);
        }
    }
    let schemes = schemes.into_iter().map(|((bits, group_size, symmetric), names)| {
        // A mixture's experts, of which all have this width, give the same pattern.
        let targets: BTreeSet<String> = names
            .iter()
            .map(|((before, kind), blocks)| target(before, kind, blocks))
            .collect();
        Scheme {
            targets: targets.into_iter().collect(),
            bits: (bits != bits_usual).then_some(bits),
            group_size,
            symmetric,
        }
    });
    Ok(Recipe {
        bits: bits_usual,
        schemes: schemes.collect(),
        ..plan.recipe.clone()
    })
}

/// `^model\.layers\.(0|7)\.mlp\.down_proj$`. An expert's number stands for all.
fn target(before: &str, kind: &str, blocks: &[usize]) -> String {
    let parts = kind
        .split('.')
        .map(|part| match part.bytes().all(|byte| byte.is_ascii_digit()) {
            true => r"\d+".to_owned(),
            false => regex::escape(part),
        });
    let blocks: Vec<String> = blocks.iter().map(ToString::to_string).collect();
    let blocks = match &blocks[..] {
        [one] => one.clone(),
        many => format!("({})", many.join("|")),
    };
    format!(
        r"^{}{blocks}\.{}$",
        regex::escape(before),
        parts.collect::<Vec<_>>().join(r"\.")
    )
}
