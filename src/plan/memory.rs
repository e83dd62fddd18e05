//! Predicted bytes of a run: what each step holds in each of its phases, which steps keep their matrices in scratch files so that the
//! budget is kept, and what is left for activations.

use super::{CHUNK_ROWS, Plan, PlannedLinear};
use crate::device::solver::rows_at_a_time;
use crate::device::sums::PANEL_ROWS as DEVICE_PANEL_ROWS;
use crate::error::{Error, Result};
use crate::numerics::Grid;
use crate::numerics::factor::PANELS_HELD;
use crate::numerics::panels::{PANEL_ROWS, Shape};
use std::ops::Range;

/// Process, tokenizer, allocator slack: what a run costs before its first tensor.
const BASE_BYTES: u64 = 64 << 20;
/// Activations that stay in memory where `--memory` does not say: the rest goes to the scratch file, which the page cache serves.
const RESIDENT_BYTES_DEFAULT: u64 = 48 << 20;
/// What a run may take for the sake of larger groups of experts where `--memory` does not say: enough that the groups of a layer are
/// few, little beside what a mixture of experts needs to run at all.
const GROUP_BYTES: u64 = 1 << 30;

/// Context, cuBLAS and cuSOLVER workspaces, kernels.
const DEVICE_BASE_BYTES: u64 = 768 << 20;
/// Matrices `[width, rows]` that the solver has at a time: target, errors and codes, those of the refinement, temporaries.
const DEVICE_SOLVER_MATRICES: u64 = 12;

/// Scale and zero point of a group, in memory.
const GROUP_BYTES_KEPT: usize = 5;

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
    /// The budget, or what the machine has.
    pub limit: u64,
    /// Predicted peak of resident bytes.
    pub peak_host_bytes: u64,
    /// The share of it that activations may take, over all workers.
    pub resident_activation_bytes: u64,
    /// Predicted peak of bytes in scratch files.
    pub scratch_bytes: u64,
    /// Steps whose matrices lie in scratch files.
    pub spilled: Vec<bool>,
    /// Predicted peak of bytes on the device.
    pub peak_device_bytes: u64,
    /// The share of it that activations may take, over all workers.
    pub device_activation_bytes: u64,
}

impl Fit {
    /// Whether the matrices of `step` lie in scratch files.
    pub fn is_spilled(&self, step: u64) -> bool {
        self.spilled.get(step as usize).copied().unwrap_or(false)
    }
}

impl Plan {
    /// Puts as many experts of a mixture in a group as stay within half of the budget `memory`, or within [`GROUP_BYTES`] where there is
    /// none: the larger the groups, the fewer the passes over the batches. The output is the same for any.
    pub fn group_experts(&mut self, memory: Option<u64>, load: &Load) {
        let Some(most) = self.linears.iter().filter_map(PlannedLinear::expert).max() else {
            return;
        };
        self.cut(1);
        let allowed = memory
            .map_or(GROUP_BYTES, |memory| memory / 2)
            .max(self.peak_in_memory(load));
        let mut experts = most + 1;
        while experts > 1 {
            self.cut(experts);
            if self.peak_in_memory(load) <= allowed {
                return;
            }
            experts = experts.div_ceil(2);
        }
        self.cut(1);
    }

    /// Predicted peak of resident bytes besides activations, with all matrices in memory.
    fn peak_in_memory(&self, load: &Load) -> u64 {
        let spilled = vec![false; self.steps.len()];
        let peaks = (0..self.steps()).map(|step| self.peak(load, step, &spilled));
        peaks.max().unwrap_or(BASE_BYTES)
    }

    /// Fits `load` into `memory`, the budget, or else into what the machine has `available`: large matrices go to scratch files where
    /// they must, and activations have what is left.
    ///
    /// # Errors
    /// The budget holds no step even so.
    pub fn fit(&self, load: &Load, memory: Option<u64>, available: u64) -> Result<Fit> {
        let limit = memory.unwrap_or(available);
        let nothing = vec![false; self.steps.len()];
        let mut spilled = nothing.clone();
        for step in 0..self.steps() {
            let mut candidates = self.beside(load.graph, step);
            candidates.sort_by_key(|&step| self.needs(load, step, &nothing).matrices);
            loop {
                let bytes = self.peak(load, step, &spilled);
                let Some(largest) = (bytes > limit).then(|| candidates.pop()).flatten() else {
                    break;
                };
                spilled[largest as usize] = true;
                // Of a narrow matrix the panels that a kernel holds are as much as all.
                if self.peak(load, step, &spilled) >= bytes {
                    spilled[largest as usize] = false;
                }
            }
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
                format!("the smallest budget that would is {fixed} bytes; fewer --workers need less"),
            ));
        }
        let activations = (load.tokens * load.streams * self.token_bytes) as u64;
        let resident = memory.map_or(RESIDENT_BYTES_DEFAULT, |budget| budget - fixed);
        let resident = resident.min(activations);
        let matrices = |step| {
            self.beside(load.graph, step)
                .into_iter()
                .filter(|&s| spilled[s as usize])
        };
        let in_files = |step| {
            matrices(step)
                .map(|step| self.needs(load, step, &spilled).matrices)
                .sum::<u64>()
        };
        Ok(Fit {
            limit,
            peak_host_bytes: fixed + resident,
            resident_activation_bytes: resident,
            scratch_bytes: activations - resident + (0..self.steps()).map(in_files).max().unwrap_or(0),
            spilled,
            ..Fit::default()
        })
    }

    /// Fits what is on the device into `memory` bytes there; activations have what the largest step leaves.
    ///
    /// # Errors
    /// They hold no step.
    pub fn fit_device(&self, fit: Fit, load: &Load, memory: u64) -> Result<Fit> {
        let Some(weight_bytes) = self.device_weight_bytes else {
            return Ok(fit);
        };
        let bytes = |step| device_bytes(self, load, step, weight_bytes as u64);
        let fixed = DEVICE_BASE_BYTES + (0..self.steps()).map(bytes).max().unwrap_or(0);
        if fixed > memory {
            return Err(Error::usage(
                "--device-memory",
                format!("{memory} bytes do not hold one step of this model"),
                format!("the smallest budget that would is {fixed} bytes; --device cpu needs none"),
            ));
        }
        let activations = (load.tokens * load.streams * self.token_bytes) as u64;
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

    /// Predicted peak of resident bytes of a step, activations aside.
    pub fn step_bytes(&self, load: &Load, fit: &Fit, step: u64) -> u64 {
        self.peak(load, step, &fit.spilled)
    }

    /// The steps whose matrices are there at the same time as those of `step`, itself among them.
    fn beside(&self, graph: Graph, step: u64) -> Vec<u64> {
        match graph {
            Graph::Sequential => self.shared_input(step).into_iter().chain([step]).collect(),
            Graph::Statistics { .. } => vec![step],
            Graph::Solve { .. } => {
                let steps = step..(step + 2).min(self.steps());
                self.shared_input(step).into_iter().chain(steps).collect()
            }
            Graph::DataFree => Vec::new(),
        }
    }

    /// Predicted peak of resident bytes of a step, activations aside: that of its largest phase.
    fn peak(&self, load: &Load, step: u64, spilled: &[bool]) -> u64 {
        let own = self.needs(load, step, spilled);
        let bytes = match load.graph {
            Graph::Sequential => [
                own.forward,
                own.factor,
                own.solve + own.chunks,
                own.pack,
                own.install,
            ]
            .into_iter()
            .fold(0, u64::max),
            // Sums that the artifact holds are read, a site at a time.
            Graph::Statistics { .. } => own.forward + own.sums / self.step_sites(step).len() as u64,
            // The next step is begun, and may be as far, while this one is solved and packed.
            Graph::DataFree | Graph::Solve { .. } => {
                let next = (step + 1 < self.steps()).then(|| self.needs(load, step + 1, spilled));
                let (beside, chunks) = next.map_or((0, 0), |next| {
                    (next.factor.max(next.solve).max(next.pack), next.chunks)
                });
                own.solve.max(own.pack) + beside + own.chunks.max(chunks)
            }
        };
        self.process_bytes() + bytes
    }

    /// What a run costs before its first weight.
    pub fn process_bytes(&self) -> u64 {
        BASE_BYTES + self.reading_bytes
    }

    /// A step's weights in f32, in memory; where they are on a device, the largest on its way there.
    pub fn weight_bytes(&self, step: u64) -> u64 {
        let linears = self.step_linears(step).iter();
        let bytes = linears.map(|linear| (linear.rows * linear.columns * 4) as u64);
        match self.device_weight_bytes {
            None => bytes.sum(),
            Some(_) => bytes.max().unwrap_or(0),
        }
    }

    /// What a batch of so many tokens takes on its way to the inputs of a step, in each of `streams` forward passes, until it is summed.
    pub fn batch_bytes(&self, step: u64, tokens: usize, streams: usize) -> u64 {
        let tokens = tokens as u64;
        let width = self.step_linears(step).first().map_or(0, |linear| linear.columns) as u64;
        if self.device_weight_bytes.is_some() {
            return tokens * width * 4;
        }
        let before = self.carrying(self.carriers(step));
        let sites = self.step_sites(step).len() as u64;
        // What carries a batch here: the outputs of the linears before with a copy that is rotated or gated, their input, the residual;
        // then what is summed: this site's input with its copies, and a panel of products. Experts run one after the other, but all
        // their inputs are there at once, at worst those of all tokens.
        let rows: u64 = match before.first().and_then(PlannedLinear::expert) {
            None => before.iter().map(|l| l.rows as u64).sum(),
            Some(_) => before.iter().map(|l| 2 * l.rows as u64).max().unwrap_or(0) + sites * width,
        };
        let carried = 3 * rows / 2 + before.first().map_or(0, |l| 3 * l.columns as u64);
        (tokens * carried).max(tokens * 3 * width + PANEL_ROWS as u64 * width) * 4
            + tokens * width * 4 * (streams as u64 - 1) * sites
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
        rows * width * (3 * 8 + 2 * 4) + PANEL_ROWS as u64 * width * 4
    }

    /// What a kernel has resident of a matrix in scratch files, at a time.
    pub fn panel_bytes(&self, step: u64) -> u64 {
        let width = self.step_linears(step).first().map_or(0, |linear| linear.columns);
        (PANEL_ROWS.min(width) * width * 8) as u64
    }

    /// Codes, scales and zero points of `rows` rows of a linear, before they are packed.
    pub fn code_bytes(&self, linear: &PlannedLinear, rows: usize) -> u64 {
        let of = |grid: Grid| rows * (linear.columns + linear.columns / grid.group_size * GROUP_BYTES_KEPT);
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

    fn needs(&self, load: &Load, step: u64, spilled: &[bool]) -> Needs {
        Needs::new(self, load, step, spilled)
    }
}

/// Predicted peak of a step's bytes on the device, activations between steps aside: see [`crate::device`].
fn device_bytes(plan: &Plan, load: &Load, step: u64, weight_bytes: u64) -> u64 {
    let recipe = &plan.recipe;
    let matching = load.streams as u64 - 1;
    let held_out = u64::from(matches!(load.graph, Graph::Solve { held_out: true }));
    let weights = |linears: &[PlannedLinear]| -> u64 {
        let elements = linears.iter().map(|linear| (linear.rows * linear.columns) as u64);
        elements.sum::<u64>() * weight_bytes
    };
    let (linears, before) = (plan.step_linears(step), plan.carrying(plan.carriers(step)));
    let width = linears.first().map_or(0, |linear| linear.columns) as u64;
    let sites = plan.step_sites(step).len() as u64;
    let square = width * width * 8;
    let held = (weights(linears) + weights(before)) * (1 + matching);
    let (sums, factors) = match load.graph {
        Graph::DataFree => (0, 0),
        _ => (
            sites * square * (1 + matching + held_out),
            sites
                * square
                * (recipe.damp_percent.candidates().len() as u64
                    + u64::from(recipe.refine_rounds() > 0)
                    + matching
                    + held_out),
        ),
    };
    // Outputs of what carries a batch, with copies that are rotated, gated or rounded, the inputs, and a panel of products.
    let outputs: u64 = before.iter().map(|linear| linear.rows as u64).sum();
    let batch =
        load.batch_tokens as u64 * (3 * outputs + 4 * width) * 4 + DEVICE_PANEL_ROWS as u64 * width * 4;
    let rows = linears
        .iter()
        .map(|linear| linear.rows.min(rows_at_a_time(linear.columns)))
        .max();
    let matrices = DEVICE_SOLVER_MATRICES * rows.unwrap_or(0) as u64 * width * 8;
    // L in single precision, for the energy.
    let solve = factors + matrices + square / 2;
    held + (batch + sums).max(sums + factors).max(solve)
}

/// Bytes that a step has resident in each of its phases, activations between steps aside.
struct Needs {
    /// Exact sums.
    sums: u64,
    /// The weights that carry the batches here, a batch a worker on its way, the sums.
    forward: u64,
    /// Sums in f64, factors, and what is kept of both.
    factor: u64,
    /// Factors, original weights, codes.
    solve: u64,
    /// What is in work of the weights meanwhile, a chunk a worker.
    chunks: u64,
    /// Original weights, codes, those of a linear once more, packed tensors.
    pack: u64,
    /// Codes, weights as the next forward passes need them.
    install: u64,
    /// All matrices of the step at their peak, resident or not.
    matrices: u64,
}

impl Needs {
    fn new(plan: &Plan, load: &Load, step: u64, spilled: &[bool]) -> Self {
        let recipe = &plan.recipe;
        let in_files = |step: u64| spilled[step as usize];
        let workers = load.workers as u64;
        let matching = load.streams as u64 - 1;
        let refined = u64::from(recipe.refine_rounds() > 0);
        let held_out = match load.graph {
            Graph::Statistics { held_out } | Graph::Solve { held_out } => u64::from(held_out),
            Graph::Sequential | Graph::DataFree => 0,
        };
        let linears = plan.step_linears(step);
        // Weights that have served no batch yet, of earlier steps.
        let waiting = match load.graph {
            Graph::Sequential | Graph::Statistics { .. } if step + 1 < plan.steps() => {
                let next = plan.carriers(step + 1);
                next.start..step.max(next.start)
            }
            _ => 0..0,
        };
        let weights = |steps: Range<u64>| -> u64 { steps.map(|step| plan.weight_bytes(step)).sum() };
        let own = plan.weight_bytes(step);
        let code_bytes = |linear: &PlannedLinear| plan.code_bytes(linear, linear.rows);
        let codes: u64 = linears.iter().map(code_bytes).sum();
        let packed: u64 = linears.iter().map(|linear| plan.packed_bytes(linear)).sum();
        // Each worker puts the chunks of a linear together.
        let largest = linears.iter().map(code_bytes).max().unwrap_or(0);
        let together = (workers * largest).min(codes);
        // A worker may have gone on while another has not yet installed what both were sent.
        let before = match (load.graph, step.checked_sub(1)) {
            (Graph::Sequential, Some(before)) if workers > 1 => {
                plan.step_linears(before).iter().map(code_bytes).sum()
            }
            _ => 0,
        };
        // A run that is continued reads the weights before the step back from the output, when there are no sums yet.
        let read = match load.graph {
            Graph::Sequential => (plan.carrying(plan.carriers(step)).iter())
                .map(|linear| code_bytes(linear) + plan.packed_bytes(linear))
                .max(),
            _ => None,
        };
        let read = read.unwrap_or(0);
        let chunk = linears
            .iter()
            .map(|linear| plan.chunk_bytes(linear))
            .max()
            .unwrap_or(0);
        let batch = plan.batch_bytes(step, load.batch_tokens, load.streams);
        let factors = match load.graph {
            Graph::DataFree => 0,
            _ => recipe.damp_percent.candidates().len() as u64,
        };
        // Of matrices: those on a device take nothing here.
        let width_of = |step: u64| match plan.device_weight_bytes {
            None => plan.step_linears(step).first().map_or(0, |linear| linear.columns),
            Some(_) => 0,
        };
        let width = width_of(step);
        let elements = |shape: Shape, width| (shape.elements(width) * 8) as u64;
        // What is kept of a site's products while it is solved. Refinement reads whole rows of XᵀX, and so does whoever reads it from files.
        let whole = |spilled: bool| refined.max(u64::from(spilled)) * factors.min(1);
        let kept_of = |width: usize, spilled: bool| {
            let (half, full) = (elements(Shape::Upper, width), elements(Shape::Full, width));
            factors * half + whole(spilled) * full + full * matching + half * held_out
        };
        let (half, full) = (elements(Shape::Upper, width), elements(Shape::Full, width));
        let sites = plan.step_sites(step).len() as u64;
        let summed = if plan.leads(step) { sites } else { 0 };
        let sums = summed * (half * (1 + held_out) + full * matching);
        let kept = sites * kept_of(width, in_files(step));
        // A site's XᵀX goes once it is factored.
        let going = match factors > 0 && whole(in_files(step)) == 0 {
            true => summed.min(workers),
            false => 0,
        };
        let factored = kept + half * going;
        // The factor of gate and up, between a mixture's first part and its last.
        let shared = match plan.shared_input(step) {
            Some(lead) if !matches!(load.graph, Graph::Statistics { .. }) && !in_files(lead) => {
                kept_of(width_of(lead), false)
            }
            _ => 0,
        };
        let held = shared + weights(waiting) * (1 + matching);
        // From files, a kernel has a panel or two at a time: the sums one a worker; the factorization its own and one that it reads,
        // while the matrix that it copies from is another; the solver one a worker.
        let panel = plan.panel_bytes(step);
        let (of_sums, of_factor, of_solve) = match in_files(step) {
            true => (workers * panel, PANELS_HELD * panel, workers * panel),
            false => (sums, factored, kept),
        };
        // Where a step has several sites, the first is solved while the others are factored.
        let of_solve = if sites > 1 {
            of_factor.max(of_solve)
        } else {
            of_solve
        };
        let solve = held + of_solve + own + codes;
        Self {
            sums: of_sums,
            forward: held
                + weights(plan.carriers(step)) * (1 + matching)
                + workers * batch
                + (before + of_sums).max(read),
            factor: held + of_factor,
            solve,
            chunks: workers * chunk,
            pack: held + own + codes + together + packed,
            install: held + codes + own * (1 + matching),
            matrices: sums.max(factored),
        }
    }
}
