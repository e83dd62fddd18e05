//! Predicted seconds of a run: the operations of each step over what the machine's kernels do in a second. Element-wise work, attention
//! and reading are left out, and take about as long again as is told where activations are narrow.

use super::{Graph, Load, Plan};
use crate::numerics::speed::Speed;

impl Plan {
    /// Predicted seconds of `step`, on workers of this speed.
    pub fn step_seconds(&self, load: &Load, speed: Speed, step: u64) -> f64 {
        let recipe = &self.recipe;
        let linears = self.step_linears(step);
        let width = linears.first().map_or(0, |linear| linear.columns) as f64;
        let quantized = || linears.iter().filter(|linear| linear.to_solve().is_some());
        let weights = |linear: &super::PlannedLinear| (linear.rows * linear.columns) as f64;
        let tokens = load.tokens as f64;
        let workers = load.workers as f64;
        let forward = 2.0 * tokens * load.streams as f64 * linears.iter().map(weights).sum::<f64>();
        let matching = f64::from(u8::from(
            recipe.match_original > 0.0 && load.graph == Graph::Sequential,
        ));
        let rows: f64 = quantized().map(|linear| linear.rows as f64).sum();
        // XᵀX is half a product, X̃ᵀX a whole one.
        let sums = tokens * width * width * (1.0 + 2.0 * matching);
        let candidates = recipe.damp_percent.candidates().len() as f64;
        let factor = candidates * width.powi(3) / 3.0;
        // The sweep reads half a matrix; the target a whole one, and a half twice; a round of refinement a whole one four times.
        let passes = 1.0 + 4.0 * matching + 8.0 * recipe.refine_rounds() as f64;
        let solve = candidates * rows * width * width * passes;
        let searched = candidates.max(1.0) * quantized().map(weights).sum::<f64>() / speed.searched_weights;
        let (single, double, searched) = match (load.graph, quantized().next().is_some()) {
            (Graph::Statistics { .. }, _) => (forward + sums, 0.0, 0.0),
            (Graph::Sequential, false) => (forward, 0.0, 0.0),
            (Graph::Sequential, true) => (forward + sums + rows * width * width, factor + solve, searched),
            (Graph::Solve { .. }, true) => (rows * width * width, factor + solve, searched),
            (Graph::DataFree, true) => (0.0, 0.0, searched),
            (Graph::Solve { .. } | Graph::DataFree, false) => (0.0, 0.0, 0.0),
        };
        (single / speed.single_flops + double / speed.double_flops + searched) / workers
    }
}
