//! Predicted seconds of a run: the operations of each step over what the machine's kernels do in a second. Element-wise work, attention
//! and reading are left out, and take about as long again as is told where activations are narrow.

use super::{Graph, Load, Plan, PlannedLinear};
use crate::numerics::speed::Speed;

/// Predicted seconds of a step on one worker, by what takes them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// All batches' way to the step's inputs, and their sums.
    pub forward: f64,
    /// Factors of all sites.
    pub factor: f64,
    /// Codes of all linears.
    pub solve: f64,
}

impl Work {
    /// All of it.
    pub fn seconds(self) -> f64 {
        self.forward + self.factor + self.solve
    }
}

impl Plan {
    /// Predicted work of `step`, on workers of this speed.
    pub fn work(&self, load: &Load, speed: Speed, step: u64) -> Work {
        let recipe = &self.recipe;
        let linears = self.step_linears(step);
        let width = self.width(step) as f64;
        let quantized = || linears.iter().filter(|linear| linear.to_solve().is_some());
        let weights = |linear: &PlannedLinear| (linear.rows * linear.columns) as f64;
        let tokens = load.tokens as f64;
        let matching = load.streams as f64 - 1.0;
        // Gate and up make what a device has no room for again.
        let runs = if self.makes_inner(step + 2) { 2.0 } else { 1.0 };
        let products = 2.0 * runs * tokens * load.streams as f64 * linears.iter().map(weights).sum::<f64>();
        let rows: f64 = quantized().map(|linear| linear.rows as f64).sum();
        // XᵀX is half a product, X̃ᵀX a whole one.
        let sums = tokens * width * width * (1.0 + 2.0 * matching);
        let candidates = recipe.damp_percent.candidates().len() as f64;
        let factor = candidates * width.powi(3) / 3.0 / speed.double_flops;
        // The sweep reads half a matrix; the target a whole one, and a half twice; a round of refinement a whole one four times.
        let passes = 1.0 + 4.0 * matching + 8.0 * recipe.refine_rounds() as f64;
        let swept = candidates * rows * width * width * passes / speed.double_flops
            + rows * width * width / speed.single_flops;
        let searched = candidates.max(1.0) * quantized().map(weights).sum::<f64>() / speed.searched_weights;
        let forward = |operations: f64| operations / speed.single_flops;
        let solved = Work {
            forward: 0.0,
            factor,
            solve: swept + searched,
        };
        match (load.graph, quantized().next().is_some()) {
            (Graph::Statistics { .. }, _) => Work {
                forward: forward(products + sums),
                ..Work::default()
            },
            (Graph::Sequential, false) => Work {
                forward: forward(products),
                ..Work::default()
            },
            (Graph::Sequential, true) => Work {
                forward: forward(products + sums),
                ..solved
            },
            (Graph::Solve { .. }, true) => solved,
            (Graph::DataFree, true) => Work {
                solve: searched,
                ..Work::default()
            },
            (Graph::Solve { .. } | Graph::DataFree, false) => Work::default(),
        }
    }
}
