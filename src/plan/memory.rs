//! Predicted bytes of a run: what each step holds in each of its phases, which steps keep their matrices in scratch files so that the
//! budget is kept, and what is left for activations.

use super::{CHUNK_ROWS, Plan, PlannedLinear};
use crate::error::{Error, Result};
use crate::numerics::panels::{PANEL_ROWS, Shape};

/// Process, tokenizer, allocator slack: what a run costs before its first tensor.
const BASE_BYTES: u64 = 64 << 20;
/// Activations that stay in memory where `--memory` does not say: the rest goes to the scratch file, which the page cache serves.
const RESIDENT_BYTES_DEFAULT: u64 = 48 << 20;

/// Which graph runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Graph {
    /// Statistics, solve and forward, step by step.
    Sequential,
    /// Statistics alone.
    Statistics {
        /// Some batches are summed apart.
        held_out: bool,
    },
    /// From an artifact.
    Solve {
        /// It has sums apart.
        held_out: bool,
    },
    /// Round to nearest.
    DataFree,
}

/// What runs, and over how much.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// The graph.
    pub graph: Graph,
    /// Worker threads.
    pub workers: usize,
    /// Tokens of the largest batch.
    pub batch_tokens: usize,
    /// Tokens of all batches.
    pub tokens: usize,
    /// Forward passes side by side.
    pub streams: usize,
}

/// How a run fits into its budget.
#[derive(Clone, Debug, Default)]
pub struct Fit {
    /// Predicted peak of resident bytes.
    pub peak_host_bytes: u64,
    /// The share of it that activations may take, over all workers.
    pub resident_activation_bytes: u64,
    /// Predicted peak of bytes in scratch files.
    pub scratch_bytes: u64,
    /// Steps whose matrices lie in scratch files.
    pub spilled: Vec<bool>,
}

impl Fit {
    /// Whether the matrices of `step` lie in scratch files.
    pub fn is_spilled(&self, step: u64) -> bool {
        self.spilled.get(step as usize).copied().unwrap_or(false)
    }
}

impl Plan {
    /// Bytes between two steps of `tokens` tokens: the residual in f32, the widest input in 16 bits.
    fn activation_bytes(&self, load: &Load) -> u64 {
        let widths = self.linears.first().map_or(0, |l| l.columns * 4)
            + self.linears.iter().map(|l| l.columns * 2).max().unwrap_or(0);
        (load.tokens * load.streams * widths) as u64
    }

    /// Fits `load` into `memory`, the budget, or else into what the machine has `available`: large matrices go to scratch files where
    /// they must, and activations have what is left.
    ///
    /// # Errors
    /// The budget holds no step even so.
    pub fn fit(&self, load: &Load, memory: Option<u64>, available: u64) -> Result<Fit> {
        let limit = memory.unwrap_or(available);
        let mut spilled = vec![false; self.steps.len()];
        let mut smallest = 0;
        for step in 0..self.steps() {
            let mut candidates = self.beside(load.graph, step);
            candidates.sort_by_key(|&step| self.needs(load, step, false).matrices);
            while self.peak(load, step, &spilled) > limit {
                match candidates.pop() {
                    Some(largest) => spilled[largest as usize] = true,
                    None => break,
                }
            }
            smallest = smallest.max(self.peak(load, step, &spilled));
        }
        let fixed = (0..self.steps())
            .map(|step| self.peak(load, step, &spilled))
            .max()
            .unwrap_or(BASE_BYTES);
        if fixed > limit {
            let budget = match memory {
                Some(_) => format!("{limit} bytes do not"),
                None => format!("the {limit} bytes that are available do not"),
            };
            return Err(Error::usage(
                "--memory",
                format!(
                    "{budget} hold one step of this model with {} workers",
                    load.workers
                ),
                format!("the smallest budget that would is {smallest} bytes; fewer --workers need less"),
            ));
        }
        let activations = self.activation_bytes(load);
        let resident = memory.map_or(RESIDENT_BYTES_DEFAULT, |budget| budget - fixed);
        let resident = resident.min(activations);
        let matrices = |step| {
            self.beside(load.graph, step)
                .into_iter()
                .filter(|&s| spilled[s as usize])
        };
        let in_files = |step| {
            matrices(step)
                .map(|step| self.needs(load, step, false).matrices)
                .sum::<u64>()
        };
        Ok(Fit {
            peak_host_bytes: fixed + resident,
            resident_activation_bytes: resident,
            scratch_bytes: activations - resident + (0..self.steps()).map(in_files).max().unwrap_or(0),
            spilled,
        })
    }

    /// The steps whose matrices are there at the same time as those of `step`, itself among them.
    fn beside(&self, graph: Graph, step: u64) -> Vec<u64> {
        match graph {
            Graph::Sequential => vec![step],
            Graph::Statistics { .. } => self.block_steps(self.step(step).0).collect(),
            // The next step is loaded and factored while this one is solved.
            Graph::Solve { .. } => (step..(step + 2).min(self.steps())).collect(),
            Graph::DataFree => Vec::new(),
        }
    }

    /// Predicted peak of resident bytes of a step, those between steps aside: that of its largest phase.
    fn peak(&self, load: &Load, step: u64, spilled: &[bool]) -> u64 {
        let needs = |step: u64| self.needs(load, step, spilled[step as usize]);
        let own = needs(step);
        let bytes = match load.graph {
            Graph::Sequential => own.forward.max(own.factor).max(own.solve).max(own.install),
            Graph::Statistics { .. } => {
                // The block's sums wait for its end, and one site's are added to those that are held.
                let sums = self
                    .beside(load.graph, step)
                    .into_iter()
                    .map(|step| needs(step).sums);
                own.forward + sums.clone().sum::<u64>() - own.sums + sums.max().unwrap_or(0)
            }
            Graph::DataFree => own.solve.max(own.install),
            Graph::Solve { .. } => {
                let next = self.beside(load.graph, step).into_iter().skip(1);
                own.solve.max(own.install) + next.map(|step| needs(step).factor).sum::<u64>()
            }
        };
        BASE_BYTES + self.reading_bytes + bytes
    }

    fn needs(&self, load: &Load, step: u64, spilled: bool) -> Needs {
        Needs::new(self, load, step, spilled)
    }
}

/// Bytes that a step has resident in each of its phases, activations between steps aside.
struct Needs {
    /// Exact sums.
    sums: u64,
    /// The weights that carry the batches here, a batch a worker on its way, the sums.
    forward: u64,
    /// Sums in f64, factors, and what is kept of both.
    factor: u64,
    /// Factors, original weights, codes, a chunk a worker.
    solve: u64,
    /// Codes, packed tensors, weights as the next forward passes need them.
    install: u64,
    /// All matrices of the step at their peak, resident or not.
    matrices: u64,
}

impl Needs {
    fn new(plan: &Plan, load: &Load, step: u64, spilled: bool) -> Self {
        let recipe = &plan.recipe;
        let (workers, tokens) = (load.workers as u64, load.batch_tokens as u64);
        let matching = u64::from(load.graph == Graph::Sequential && recipe.match_original > 0.0);
        let refined = u64::from(recipe.refine_rounds() > 0);
        let held_out = match load.graph {
            Graph::Statistics { held_out } | Graph::Solve { held_out } => u64::from(held_out),
            Graph::Sequential | Graph::DataFree => 0,
        };
        let linears = plan.step_linears(step);
        let before = plan.step_linears(step.max(1) - 1);
        let width = linears.first().map_or(0, |linear| linear.columns);
        let elements = |shape: Shape| (shape.elements(width) * 8) as u64;
        let (half, full) = (elements(Shape::Upper), elements(Shape::Full));
        let panel = (PANEL_ROWS.min(width) * width * 8) as u64;
        let weights = |linears: &[PlannedLinear]| -> u64 {
            linears.iter().map(|l| (l.rows * l.columns * 4) as u64).sum()
        };
        let codes: u64 = (linears.iter().filter(|linear| linear.grid.is_some()))
            .map(|linear| (linear.rows * linear.columns) as u64)
            .sum();
        let rows = |linears: &[PlannedLinear]| -> u64 { linears.iter().map(|l| l.rows as u64).sum() };
        let width = width as u64;
        // What carries a batch here: the outputs of the linears before with a copy that is rotated or gated, their input, the residual;
        // then what is summed: this site's input with its copies, and a panel of products.
        let carried = 3 * rows(before) / 2 + before.first().map_or(0, |l| 3 * l.columns as u64);
        let batch = (tokens * carried).max(tokens * 3 * width + PANEL_ROWS as u64 * width) * 4
            + tokens * width * 4 * matching;
        let factors = match load.graph {
            Graph::DataFree => 0,
            _ => recipe.damp_percent.candidates().len() as u64,
        };
        let sums = half * (1 + held_out) + full * matching;
        // Refinement reads whole rows of XᵀX, and so does whoever reads it from files.
        let whole = refined.max(u64::from(spilled)) * factors.min(1);
        let kept = factors * half + whole * full + full * matching + half * held_out;
        let factored = kept + (1 - whole) * half;
        // Target, codes, sums to the later columns in f64, outputs and the weights as they came in f32, a panel of the factor in f32;
        // with the refinement, errors and gradient in the place of the latter.
        let chunk = CHUNK_ROWS as u64 * width * (3 * 8 + 2 * 4) + PANEL_ROWS as u64 * width * 4;
        // From files, a kernel has a panel or two at a time: the sums one a worker; the factorization its own and one that it reads,
        // while the matrix that it copies from is another; the solver one a worker.
        let of_sums = if spilled { workers * panel } else { sums };
        let of_factor = if spilled { 3 * panel } else { factored };
        let of_solve = if spilled { workers * panel } else { kept };
        Self {
            sums: of_sums,
            forward: weights(before) * (1 + matching) + workers * batch + of_sums,
            factor: of_factor,
            solve: of_solve + weights(linears) + 2 * codes + workers * chunk,
            install: 3 * codes / 2 + weights(linears) * (1 + matching),
            matrices: sums.max(factored),
        }
    }
}
