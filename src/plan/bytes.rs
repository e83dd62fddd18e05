//! How many bytes operators ask the budget for: the terms of which [`super::memory`] makes its prediction.

use super::chunks::CHUNK_ROWS;
use super::{Plan, PlannedLinear};
use crate::model::{SiteKind, panel_rows};
use crate::numerics::panels::PANEL_ROWS;
use crate::numerics::{Grid, QuantizedWeight};

/// The program, and what the allocator keeps.
const BASE_BYTES: u64 = 24 << 20;
/// A worker's thread: its stack, its share of the allocator, and what its products are packed into.
const WORKER_BYTES: u64 = 12 << 20;
/// The CUDA libraries, a context, and page-locked buffers. Measured (benches/results).
const CUDA_BYTES: u64 = 600 << 20;
/// Names, shapes and places of a linear's tensors, in the source, in the plan and in the output.
const LINEAR_BYTES: u64 = 2 << 10;
/// A chunk that is moved toward the original or refined counts so often: its temporaries have several sizes, and the allocator keeps holes of
/// those that went. Measured (benches/memory.py).
const CHUNK_COPIES: u64 = 2;

impl Plan {
    /// What a run of so many workers costs before its first weight.
    pub fn process_bytes(&self, workers: usize) -> u64 {
        let linears = self.linears.len() as u64 * LINEAR_BYTES;
        let device = match self.device_weight_bytes {
            Some(_) if cfg!(feature = "cuda") => CUDA_BYTES,
            _ => 0,
        };
        BASE_BYTES + workers as u64 * WORKER_BYTES + linears + self.reading_bytes + device
    }

    /// A linear's original weight, in memory; where weights are on a device, that on its way there.
    pub fn original_bytes(&self, linear: &PlannedLinear) -> u64 {
        match self.device_weight_bytes {
            None => linear.stored_bytes as u64,
            Some(_) => (linear.rows * linear.columns * 4) as u64,
        }
    }

    /// What the quantized model has in its place.
    pub(super) fn quantized_bytes(&self, linear: &PlannedLinear) -> u64 {
        match (self.device_weight_bytes, linear.to_solve()) {
            (None, Some(_)) => self.code_bytes(linear, linear.rows),
            _ => self.original_bytes(linear),
        }
    }

    /// The weights of `linears` in memory; where they are on a device, the largest.
    pub(super) fn held(&self, linears: &[PlannedLinear], bytes: impl Fn(&PlannedLinear) -> u64) -> u64 {
        match self.device_weight_bytes {
            None => linears.iter().map(bytes).sum(),
            Some(_) => linears.iter().map(bytes).max().unwrap_or(0),
        }
    }

    /// What a batch of so many tokens takes on its way to the inputs of a step, in each of `streams` forward passes, until it is summed.
    pub fn batch_bytes(&self, step: u64, tokens: usize, streams: usize) -> u64 {
        let (tokens, streams) = (tokens as u64, streams as u64);
        let width = self.width(step) as u64;
        if self.device_weight_bytes.is_some() {
            return tokens * width * 4;
        }
        let before = self.carrying(self.carriers(step));
        let sites = self.step_sites(step).len() as u64;
        let outputs: u64 = before.iter().map(|linear| linear.rows as u64).sum();
        let largest = before.iter().map(|linear| linear.rows as u64).max().unwrap_or(0);
        let inputs = before.first().map_or(0, |linear| linear.columns as u64);
        let latent = before.iter().any(|linear| linear.site == SiteKind::KvB);
        // What carries a batch here, in f32 a token.
        let carried = match (self.step(step).1, before) {
            (_, []) => inputs,
            // Experts run one after the other, but all their inputs are there at once, at worst those of all tokens.
            (_, [first, ..]) if first.expert().is_some() => 3 * largest + 3 * sites * width / 2 + 3 * inputs,
            // The input, kept in 16 bits; residual, output and sum.
            (SiteKind::Qkv | SiteKind::GateUp, _) => 3 * inputs / 2 + 3 * outputs,
            // Residual and input; queries, keys and values, of which one is turned, or the attention's output.
            (SiteKind::O, _) if !latent => 2 * inputs + outputs + largest,
            // Gate and up, multiplied in place; they are copied out where one linear makes both.
            (SiteKind::Down, [_, _]) => 2 * inputs + outputs,
            (SiteKind::Down, _) => 2 * inputs + 2 * outputs,
            // Latents and what comes of them, cut, turned, normed and put together again.
            _ => 2 * inputs + 3 * outputs,
        };
        // Of a weight, what is in f32 at a time.
        let panel = |l: &PlannedLinear| (panel_rows(l.columns).min(l.rows) * l.columns) as u64;
        let widened = before.iter().map(panel).max().unwrap_or(0);
        // The first stream's inputs wait for the second's. Then they are summed, through a panel of products.
        let carried = tokens * (carried + sites * width * (streams - 1)) + widened;
        let summed = tokens * width * sites * streams + PANEL_ROWS as u64 * width;
        4 * carried.max(summed)
    }

    /// What a chunk of a linear takes while it is solved.
    pub fn chunk_bytes(&self, linear: &PlannedLinear) -> u64 {
        if self.device_weight_bytes.is_some() {
            return 0;
        }
        // Target, codes, sums to the later columns in f64, outputs and the weights as they came in f32, a panel of the factor in f32;
        // with the refinement, errors and gradient in the place of the latter.
        let rows = CHUNK_ROWS.min(linear.rows) as u64;
        let width = linear.columns as u64;
        let once = rows * width * (3 * 8 + 2 * 4) + PANEL_ROWS as u64 * width * 4;
        match self.recipe.match_original == 0.0 && self.recipe.refine_rounds() == 0 {
            true => once,
            false => CHUNK_COPIES * once,
        }
    }

    /// What a kernel has resident of a matrix in scratch files, at a time.
    pub fn panel_bytes(&self, step: u64) -> u64 {
        let width = self.width(step);
        (PANEL_ROWS.min(width) * width * 8) as u64
    }

    /// Codes, scales and zero points of `rows` rows of a linear.
    pub fn code_bytes(&self, linear: &PlannedLinear, rows: usize) -> u64 {
        let of = |grid: Grid| QuantizedWeight::byte_len(rows, linear.columns, grid.bits, grid.group_size);
        linear.to_solve().map_or(0, of) as u64
    }

    /// The tensors of a linear in the output's layout.
    pub fn packed_bytes(&self, linear: &PlannedLinear) -> u64 {
        match linear.to_solve() {
            None => 0,
            Some(_) => self
                .tensors(linear)
                .iter()
                .map(|spec| spec.byte_len() as u64)
                .sum(),
        }
    }
}
