//! Predicted bytes of a run on a device: see [`crate::device`].

use super::{Chunk, Fit, Graph, Load, Plan, PlannedLinear};
use crate::device::attention::TILE_BYTES;
use crate::device::panels::{PANEL_ROWS, elements};
use crate::device::{AHEAD, LEAVING, Placement};
use crate::error::{Error, Result};
use crate::model::SiteKind;
use crate::numerics::panels::Shape;

/// Context, cuBLAS and cuSOLVER workspaces, kernels.
const BASE_BYTES: u64 = 816 << 20;
/// The driver's pools hold more than tensors take, by a part in so many of a step's bytes (an H100: by 15 %).
const POOL_PART: u64 = 6;
/// Matrices `[width, rows]` that the solver has at a time: targets or codes, errors, and two of half the bytes for energies.
const SOLVER_MATRICES: u64 = 3;
/// Those of the refinement besides: the targets, a gradient, the codes of the round before or what it makes of them.
const REFINE_MATRICES: u64 = 3;
/// Those that make the targets where the original is matched, which go before the refinement begins.
const MATCH_MATRICES: u64 = 3;

impl Plan {
    /// Has the inner activations of an MLP kept between its steps where all activations of `load` have room on the device. Elsewhere they would go to
    /// the host and come back: gate and up make them again in less time, and the host has little more than half as much to hold.
    pub(super) fn place_inner(&mut self, load: &Load, memory: u64) {
        if self.device_weight_bytes.is_some() && self.token_bytes_least < self.token_bytes {
            self.inner_fits = true;
            self.inner_fits = self.fixed_device_bytes(load) + self.activation_bytes(load) <= memory;
        }
    }

    /// Predicted peak of bytes on the device, activations between steps aside; 0 where there is none.
    pub(super) fn fixed_device_bytes(&self, load: &Load) -> u64 {
        let Some(weight_bytes) = self.device_weight_bytes else {
            return 0;
        };
        let bytes = |step| device_bytes(self, load, step, weight_bytes as u64);
        let largest = (0..self.steps()).map(bytes).max().unwrap_or(0);
        BASE_BYTES + largest + largest / POOL_PART
    }

    /// Fits what is on the device into `memory` bytes there, or else into what it has free; activations have what the largest step leaves.
    ///
    /// # Errors
    /// They hold no step.
    pub fn fit_device(&self, fit: Fit, memory: Option<u64>, placement: &Placement) -> Result<Fit> {
        if self.device_weight_bytes.is_none() {
            return Ok(fit);
        }
        let memory = memory.unwrap_or_else(|| placement.available_bytes());
        let fixed = self.fixed_device_bytes(&fit.load);
        if fixed > memory {
            return Err(Error::usage(
                "--device-memory",
                format!("{memory} bytes do not hold one step of this model"),
                format!("the smallest budget that would is {fixed} bytes; --device cpu needs none"),
            ));
        }
        let activations = self.activation_bytes(&fit.load);
        let on_device = activations.min(memory - fixed);
        let elsewhere = activations - on_device;
        let resident = fit.resident_activation_bytes.min(elsewhere);
        Ok(Fit {
            peak_device_bytes: fixed + on_device,
            device_activation_bytes: on_device,
            peak_host_bytes: fit.peak_host_bytes - fit.resident_activation_bytes + resident,
            resident_activation_bytes: resident,
            scratch_bytes: elsewhere - resident,
            ..fit
        })
    }
}

impl Fit {
    /// What the device's pools may hold before they are emptied of what is free: nothing where not all activations are in them, as what comes next
    /// may need all of it in one piece.
    pub fn pool_bytes(&self) -> u64 {
        match self.resident_activation_bytes + self.scratch_bytes {
            0 => self.peak_device_bytes.saturating_sub(BASE_BYTES),
            _ => 0,
        }
    }
}

/// Predicted peak of a step's bytes on the device, activations between steps aside.
fn device_bytes(plan: &Plan, load: &Load, step: u64, weight_bytes: u64) -> u64 {
    let recipe = &plan.recipe;
    let matching = load.streams as u64 - 1;
    let refined = u64::from(recipe.refine_rounds() > 0);
    let held_out = match load.graph {
        Graph::Statistics { held_out } | Graph::Solve { held_out } => u64::from(held_out),
        Graph::Sequential | Graph::DataFree => 0,
    };
    let weights = |linears: &[PlannedLinear]| -> u64 {
        let elements = linears.iter().map(|linear| (linear.rows * linear.columns) as u64);
        elements.sum::<u64>() * weight_bytes
    };
    let linears = plan.step_linears(step);
    let width = plan.width(step);
    let sites = plan.step_sites(step).len() as u64;
    let square = |width: usize| (width * width * 8) as u64;
    let half = |width: usize| elements(width, Shape::Upper) as u64 * 8;
    let originals = weights(linears) * (1 + matching);
    let held = |steps| weights(plan.carrying(steps)) * (1 + matching);
    let waiting = match load.graph {
        Graph::Sequential | Graph::Statistics { .. } => plan.waiting(step),
        Graph::Solve { .. } | Graph::DataFree => step..step,
    };
    let before = plan.carriers(step);
    let carriers = held(before.start.min(waiting.start)..step);
    let waiting = held(waiting);
    let sums = match load.graph {
        Graph::DataFree => 0,
        _ => sites * (half(width) * (1 + held_out) + square(width) * matching),
    };
    let triangles = |width: usize| match load.graph {
        Graph::DataFree | Graph::Statistics { .. } => 0,
        _ => half(width) * recipe.damp_percent.candidates().len() as u64,
    };
    // With the sums that the solver reads.
    let factor = |width: usize| match load.graph {
        Graph::DataFree | Graph::Statistics { .. } => 0,
        _ => triangles(width) + half(width) * (refined.max(matching) + held_out) + square(width) * matching,
    };
    let shared = plan.shared_input(step).map_or(0, |of| factor(plan.width(of)));
    let batch = match plan.makes_inner(step) {
        false => batch_bytes(plan, load, step, plan.carrying(before)),
        true => {
            let again = batch_bytes(plan, load, step - 1, plan.step_linears(step - 2));
            again.max(batch_bytes(plan, load, step, plan.step_linears(step - 1)))
        }
    };
    // Those that are written, and those that wait to be.
    let code_bytes = |linear: &PlannedLinear| plan.code_bytes(linear, linear.rows);
    let codes = |step: u64| plan.step_linears(step).iter().map(code_bytes).sum::<u64>();
    let behind = match load.graph {
        Graph::Statistics { .. } => 0,
        _ => (step.saturating_sub(1)..=step).map(codes).sum(),
    };
    let solve = match load.graph {
        Graph::Statistics { .. } => 0,
        _ => {
            let chunks = plan.chunks(step);
            let rows = chunks.iter().map(Chunk::rows).max().unwrap_or(0) as u64;
            // The weights of several linears are put together.
            let joined = u64::from(chunks.iter().any(|chunk| chunk.parts.len() > 1)) * weight_bytes;
            let matrices = SOLVER_MATRICES + (refined * REFINE_MATRICES).max(matching * MATCH_MATRICES);
            let read = u64::from(refined + matching + held_out > 0);
            let read_rows = read * (width * width.min(PANEL_ROWS) * 8) as u64;
            sites * factor(width) + read_rows + (8 * matrices + joined) * rows * width as u64
        }
    };
    originals
        + behind
        + shared
        + (carriers + batch + sums).max(waiting + (sums + sites * triangles(width)).max(solve))
}

/// What a batch takes on its way to a step, through the linears `before`, in one stream; the other stream's input waits.
fn batch_bytes(plan: &Plan, load: &Load, step: u64, before: &[PlannedLinear]) -> u64 {
    let width = plan.width(step) as u64;
    let (_, site) = plan.step(step);
    let experts = before.first().is_some_and(|linear| linear.expert().is_some());
    let rows = before.iter().map(|linear| linear.rows as u64);
    let outputs: u64 = match (experts, site) {
        // Of experts, those of as many rows as a batch has tokens, whatever their number: a gate and an up, or a down.
        (true, SiteKind::ExpertDown(_)) => 2 * width,
        (true, _) => rows.max().unwrap_or(0),
        (false, _) => rows.sum(),
    };
    let inner = before.iter().map(|linear| linear.columns as u64).max();
    let inner = match experts {
        true => inner.unwrap_or(0).max(width),
        false => inner.unwrap_or(width),
    };
    // Outputs and what is made of them: what a gate and an up give is multiplied in place; where they are one linear they are taken apart; queries,
    // keys and values are rotated, and rounded; rows of experts are put together, chosen, and multiplied by their gates.
    let (copies, tile) = match (site, before) {
        (SiteKind::Down, [_, _]) => (1, 0),
        (SiteKind::Down, [_]) => (2, 0),
        _ => (3, TILE_BYTES),
    };
    // The residual, its norm and the norm in 16 bits; the site's input in as many, of each stream.
    let inputs = 3 * inner + width;
    // Of experts: what goes on, also put together, and rows that are summed, at worst a batch's for each and in each stream.
    let sent = match site {
        SiteKind::ExpertDown(_) => {
            let sites = plan.step_sites(step).len() as u64;
            let bytes = plan.device_weight_bytes.unwrap_or(0) as u64;
            2 * plan.token_bytes as u64 + (sites * width * load.streams as u64 + inner) * bytes
        }
        _ => 0,
    };
    // What is on its way to the host and back, where not all activations have room here: residuals, and inputs of 16 bits.
    let leaving = match site {
        SiteKind::Down if !plan.keeps_inner(step) => 0,
        SiteKind::O | SiteKind::Down => 2 * width,
        SiteKind::ExpertDown(_) => 4 * inner,
        _ => 4 * width,
    };
    let coming = match site {
        SiteKind::O | SiteKind::Down | SiteKind::ExpertDown(_) => 4 * inner,
        _ if plan.makes_inner(step) => 4 * width,
        _ => (4 * width).max(2 * inner),
    };
    let parked = LEAVING as u64 * leaving + AHEAD as u64 * coming;
    load.batch_tokens as u64 * ((copies * outputs + inputs) * 4 + sent + parked)
        + PANEL_ROWS as u64 * width * 4
        + tile
}
