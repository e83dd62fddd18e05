//! Predicted bytes of a measurement: two models streamed side by side, block by block, and compared by their logits.

use super::memory::{budget_for, planned_of};
use super::{Plan, PlannedLinear};
use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::model::{LOGITS_BYTES, Tower};

/// Copies of [`LOGITS_BYTES`]: those of both models, and what of both is compared.
const LOGITS_COPIES: u64 = 4;
/// Residuals that stay in memory, over all workers, where the budget does not say; the rest is in a scratch file.
const RESIDENT_BYTES: u64 = 256 << 20;
/// Of the head, in f32 at a time.
const HEAD_BYTES: u64 = 16 << 20;
/// Residuals of a window at a time: the original's, a part's, and the block's output.
const RESIDUALS: u64 = 3;
/// Blocks whose weights are there at a time: workers may be one apart.
const BLOCKS: usize = 2;

/// How a measurement fits into its budget.
#[derive(Clone, Copy, Debug)]
pub struct MeasurementFit {
    /// Predicted peak of resident bytes.
    pub peak_host_bytes: u64,
    /// Residuals that stay in memory, over all workers.
    pub resident_bytes: usize,
}

impl Plan {
    /// Fits a measurement of the model of `tower` beside what this plan makes of it into `memory`, the budget, or else into what the machine
    /// has `available`. `streams` are the residuals that are carried of each window, the original's among them.
    ///
    /// # Errors
    /// The budget holds no window even so.
    pub fn fit_measurement(
        &self,
        tower: &Tower,
        windows: &Calibration,
        streams: usize,
        workers: usize,
        memory: Option<u64>,
        available: u64,
    ) -> Result<MeasurementFit> {
        let tokens = windows.batches.iter().map(|batch| batch.tokens.len());
        let longest = tokens.clone().max().unwrap_or(0);
        let both = |linear: &PlannedLinear| self.original_bytes(linear) + self.quantized_bytes(linear);
        let is_routed = |linear: &&PlannedLinear| linear.expert().is_some();
        // Routed experts are read one at a time, gate and up together.
        let block = |block: usize| -> u64 {
            let linears = self.block_steps(block).flat_map(|step| self.step_linears(step));
            linears.filter(|linear| !is_routed(linear)).map(both).sum()
        };
        let blocks: Vec<u64> = (0..self.blocks()).map(block).collect();
        let blocks = blocks
            .windows(BLOCKS.min(blocks.len()).max(1))
            .map(|blocks| blocks.iter().sum());
        let blocks: u64 = blocks.max().unwrap_or(0);
        let experts = self.linears.iter().filter(is_routed).map(both).max().unwrap_or(0) * 2;
        let batch = (0..self.steps()).map(|step| self.batch_bytes(step, longest, 1));
        let residual_bytes = |tokens: usize| (tokens * tower.spec.block.hidden_size * 4) as u64;
        let residual = residual_bytes(longest);
        let forward = batch.max().unwrap_or(0) + experts + RESIDUALS * residual;
        let scored = RESIDUALS * residual + LOGITS_COPIES * LOGITS_BYTES as u64 + HEAD_BYTES;
        let fixed = self.process_bytes(workers) + blocks + workers as u64 * forward.max(scored);
        let limit = memory.unwrap_or(available);
        let most = memory.map_or(available, planned_of);
        let Some(free) = most.checked_sub(fixed) else {
            return Err(Error::usage(
                "--memory",
                format!(
                    "{limit} bytes do not hold a block of this model beside the quantized one, by which --average-bits is measured"
                ),
                format!(
                    "the smallest budget that would is {} bytes; fewer --workers or shorter windows need less",
                    budget_for(fixed)
                ),
            ));
        };
        let residuals = residual_bytes(tokens.sum::<usize>() * streams);
        let resident = RESIDENT_BYTES.min(free).min(residuals);
        Ok(MeasurementFit {
            peak_host_bytes: fixed + resident,
            resident_bytes: resident as usize,
        })
    }
}
