//! Predicted bytes of a run: what each step holds in each of its phases, which steps keep their matrices in scratch files so that the
//! budget is kept, and what is left for activations.

use super::{Plan, PlannedLinear};
use crate::calibration::PROBE_TOKENS;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::numerics::factor::PANELS_HELD;
use crate::numerics::panels::Shape;
use std::ops::Range;

/// Activations that stay in memory where `--memory` does not say: the rest goes to the scratch file, which the page cache serves.
const RESIDENT_BYTES_DEFAULT: u64 = 48 << 20;
/// What a run may take for the sake of larger groups of experts where `--memory` does not say: enough that the groups of a layer are
/// few, little beside what a mixture of experts needs to run at all.
const GROUP_BYTES: u64 = 1 << 30;

/// One part of so many of a declared budget is left to the allocator, for what it keeps of temporaries between two of
/// [`crate::budget::Budget::take`]: how much that is, the plan cannot tell.
const ALLOCATOR_PART: u64 = 10;

/// How much of a declared budget is planned for.
pub(super) fn planned_of(budget: u64) -> u64 {
    budget - budget / ALLOCATOR_PART
}

/// The smallest budget of which `bytes` are planned for.
pub(super) fn budget_for(bytes: u64) -> u64 {
    bytes + bytes.saturating_sub(1) / (ALLOCATOR_PART - 1)
}

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
#[derive(Clone, Debug)]
pub struct Fit {
    /// What runs.
    pub load: Load,
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
    /// Decides what depends on the budgets, and the output does not: how many experts of a mixture are in a group, and whether the inner
    /// activations of an MLP are kept on a device. Without a budget, `placement` has what is free there.
    pub fn arrange(
        &mut self,
        load: &Load,
        memory: Option<u64>,
        device_memory: Option<u64>,
        placement: &Placement,
    ) {
        let device_memory = device_memory.unwrap_or_else(|| placement.available_bytes());
        self.group_experts(load, memory, device_memory);
        self.place_inner(load, device_memory);
    }

    /// Puts as many experts of a mixture in a group as stay within half of the budget `memory`, or within [`GROUP_BYTES`] where there is
    /// none, and within half of what a device has: the larger the groups, the fewer the passes over the batches.
    fn group_experts(&mut self, load: &Load, memory: Option<u64>, device_memory: u64) {
        let Some(most) = self.linears.iter().filter_map(PlannedLinear::expert).max() else {
            return;
        };
        let least = self.experts_joined();
        self.cut(least);
        let allowed = memory
            .map_or(GROUP_BYTES, |memory| memory / 2)
            .max(self.peak_in_memory(load));
        let allowed_on_device = (device_memory / 2).max(self.fixed_device_bytes(load));
        let mut experts = most + 1;
        while experts > least {
            self.cut(experts);
            if self.peak_in_memory(load) <= allowed && self.fixed_device_bytes(load) <= allowed_on_device {
                return;
            }
            experts = experts.div_ceil(2).next_multiple_of(least);
        }
        self.cut(least);
    }

    /// Predicted peak of resident bytes besides activations, with all matrices in memory.
    fn peak_in_memory(&self, load: &Load) -> u64 {
        let spilled = vec![false; self.steps.len()];
        let peaks = (0..self.steps()).map(|step| self.peak(load, step, &spilled));
        peaks.max().unwrap_or(self.process_bytes(load.workers))
    }

    /// Fits `load` into `memory`, the budget, or else into what the machine has `available`: large matrices go to scratch files where
    /// they must, and activations have what is left.
    ///
    /// # Errors
    /// The budget holds no step even so.
    pub fn fit(&self, load: &Load, memory: Option<u64>, available: u64) -> Result<Fit> {
        let limit = memory.unwrap_or(available);
        let most = memory.map_or(available, planned_of);
        let nothing = vec![false; self.steps.len()];
        let mut spilled = nothing.clone();
        for step in 0..self.steps() {
            let mut candidates = self.beside(load.graph, step);
            candidates.sort_by_key(|&step| self.needs(load, step, &nothing).matrices);
            loop {
                let bytes = self.peak(load, step, &spilled);
                let Some(largest) = (bytes > most).then(|| candidates.pop()).flatten() else {
                    break;
                };
                self.set_spilled(&mut spilled, largest, true);
                // Of a narrow matrix the panels that a kernel holds are as much as all.
                if self.peak(load, step, &spilled) >= bytes {
                    self.set_spilled(&mut spilled, largest, false);
                }
            }
        }
        let fixed = (0..self.steps())
            .map(|step| self.peak(load, step, &spilled))
            .max()
            .unwrap_or(self.process_bytes(load.workers));
        if fixed > most {
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
                format!(
                    "the smallest budget that would is {} bytes; fewer --workers need less",
                    budget_for(fixed)
                ),
            ));
        }
        let activations = self.activation_bytes(load);
        let resident = match (memory, self.device_weight_bytes) {
            (Some(_), _) => most - fixed,
            // What a device has no room for: its bus is faster than files are.
            (None, Some(_)) => (most - fixed) / 2,
            (None, None) => RESIDENT_BYTES_DEFAULT,
        };
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
            load: *load,
            limit,
            peak_host_bytes: fixed + resident,
            resident_activation_bytes: resident,
            scratch_bytes: activations - resident + (0..self.steps()).map(in_files).max().unwrap_or(0),
            spilled,
            peak_device_bytes: 0,
            device_activation_bytes: 0,
        })
    }

    /// Activations between steps, of all batches and the probe, in each stream.
    pub(super) fn activation_bytes(&self, load: &Load) -> u64 {
        let token_bytes = match self.inner_fits {
            true => self.token_bytes,
            false => self.token_bytes_least,
        };
        ((load.tokens + PROBE_TOKENS) * load.streams * token_bytes) as u64
    }

    /// Predicted peak of resident bytes of a step, activations aside.
    pub fn step_bytes(&self, fit: &Fit, step: u64) -> u64 {
        self.peak(&fit.load, step, &fit.spilled)
    }

    /// The steps whose matrices are there at the same time as those of `step`, itself among them.
    fn beside(&self, graph: Graph, step: u64) -> Vec<u64> {
        let own = self.lead(step);
        match graph {
            Graph::Sequential => self.shared_input(step).into_iter().chain([own]).collect(),
            Graph::Statistics { .. } => vec![own],
            Graph::Solve { .. } => {
                let next = (step + 1 < self.steps()).then(|| self.lead(step + 1));
                let shared = self.shared_input(step).into_iter();
                let mut steps: Vec<u64> = shared.chain([own]).chain(next).collect();
                steps.sort_unstable();
                steps.dedup();
                steps
            }
            Graph::DataFree => Vec::new(),
        }
    }

    /// The step whose matrices serve `step`: of the parts of a mixture's gate and up the first.
    fn lead(&self, step: u64) -> u64 {
        let (block, site) = self.step(step);
        match self.leads(step) {
            true => step,
            false => (self.block_steps(block).find(|other| self.step(*other).1 == site)).unwrap_or(step),
        }
    }

    /// Notes where the matrices of `lead` lie, for all steps that they serve.
    fn set_spilled(&self, spilled: &mut [bool], lead: u64, in_files: bool) {
        let (block, _) = self.step(lead);
        for step in self.block_steps(block).filter(|step| self.lead(*step) == lead) {
            spilled[step as usize] = in_files;
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
            Graph::Statistics { .. } => own.forward + own.passing,
            // The next step is begun, and may be as far, while this one is solved and packed.
            Graph::DataFree | Graph::Solve { .. } => {
                let next = (step + 1 < self.steps()).then(|| self.needs(load, step + 1, spilled));
                let (beside, chunks, passing) = next.map_or((0, 0, 0), |next| {
                    (
                        next.factor.max(next.solve).max(next.pack),
                        next.chunks,
                        next.passing,
                    )
                });
                own.solve.max(own.pack) + beside + own.chunks.max(chunks) + own.passing.max(passing)
            }
        };
        self.process_bytes(load.workers) + self.behind_bytes() + bytes
    }

    /// Of a linear whose codes have left the device: they are packed and written while the run goes on.
    fn behind_bytes(&self) -> u64 {
        let bytes = |linear: &PlannedLinear| self.code_bytes(linear, linear.rows) + self.packed_bytes(linear);
        match self.device_weight_bytes {
            None => 0,
            Some(_) => self.linears.iter().map(bytes).max().unwrap_or(0),
        }
    }

    fn needs(&self, load: &Load, step: u64, spilled: &[bool]) -> Needs {
        Needs::new(self, load, step, spilled)
    }
}

/// Bytes that a step has resident in each of its phases, activations between steps aside.
struct Needs {
    /// Exact sums on their way from or to an artifact, besides those that are counted otherwise.
    passing: u64,
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
        // Weights of earlier steps that a later one takes; those on a device take nothing here.
        let waiting = match (load.graph, plan.device_weight_bytes) {
            (Graph::Sequential | Graph::Statistics { .. }, None) => plan.waiting(step),
            _ => 0..0,
        };
        let original = |linear: &PlannedLinear| plan.original_bytes(linear);
        let own = plan.held(linears, original);
        // In the streams that run.
        let weights = |steps: Range<u64>| {
            let linears = plan.carrying(steps);
            let originals = plan.held(linears, original);
            match load.graph {
                Graph::Statistics { .. } => originals,
                _ => plan.held(linears, |linear| plan.quantized_bytes(linear)) + originals * matching,
            }
        };
        // What is installed beside the codes, which are there already; all of it where it goes to a device.
        let installed = |linear: &PlannedLinear| match (plan.device_weight_bytes, linear.to_solve()) {
            (None, Some(_)) => 0,
            _ => original(linear),
        };
        let code_bytes = |linear: &PlannedLinear| plan.code_bytes(linear, linear.rows);
        // Those on a device come to the memory one linear at a time, whatever else is done: see `behind_bytes`.
        let (codes, packed) = match plan.device_weight_bytes {
            None => (
                linears.iter().map(code_bytes).sum(),
                linears.iter().map(|linear| plan.packed_bytes(linear)).sum(),
            ),
            Some(_) => (0u64, 0u64),
        };
        // Each worker puts the chunks of a linear together.
        let largest = linears.iter().map(code_bytes).max().unwrap_or(0);
        let together = (workers * largest).min(codes);
        // A run that is continued reads the codes before the step back from the output, when there are no sums yet.
        let read = |linear: &PlannedLinear| {
            let passing = match plan.device_weight_bytes {
                None => 0,
                Some(_) => code_bytes(linear),
            };
            plan.packed_bytes(linear) + passing
        };
        let read = match load.graph {
            Graph::Sequential => plan.carrying(plan.carriers(step)).iter().map(read).max(),
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
            None => plan.width(step),
            Some(_) => 0,
        };
        let width = width_of(step);
        let elements = |shape: Shape, width| (shape.elements(width) * 8) as u64;
        // What is kept of a site's products while it is solved. Refinement reads whole rows of XᵀX, and so does whoever reads it from files.
        let whole = |spilled: bool| refined.max(u64::from(spilled)) * factors.min(1);
        let kept_of = |width: usize, spilled: bool| {
            if let Graph::Statistics { .. } = load.graph {
                return 0;
            }
            let (half, full) = (elements(Shape::Upper, width), elements(Shape::Full, width));
            factors * half + whole(spilled) * full + full * matching + half * held_out
        };
        let (half, full) = (elements(Shape::Upper, width), elements(Shape::Full, width));
        let sites = plan.step_sites(step).len() as u64;
        let leads = plan.leads(step);
        let summed = if leads { sites } else { 0 };
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
            Some(lead) if !in_files(lead) => kept_of(width_of(lead), false),
            _ => 0,
        };
        let held = shared + weights(waiting);
        // From files, a kernel has a panel or two at a time: the sums one a worker; the factorization its own and one that it reads,
        // while the matrix that it copies from is another; the solver one a worker. A later part of a mixture's gate and up sums nothing
        // and finds its factor.
        let panel = plan.panel_bytes(step);
        let (of_sums, of_factor, of_solve) = match (in_files(step), leads) {
            (true, true) => (workers * panel, PANELS_HELD * panel, workers * panel),
            (true, false) => (0, 0, workers * panel),
            (false, true) => (sums, factored, kept),
            (false, false) => (kept, kept, kept),
        };
        // Where a step has several sites, the first is solved while the others are factored.
        let of_solve = if sites > 1 {
            of_factor.max(of_solve)
        } else {
            of_solve
        };
        let solve = held + of_solve + own + codes;
        // A site at a time: what an artifact holds already is read to be added; what is on a device comes from there, or goes there.
        let copies = match (plan.device_weight_bytes, load.graph) {
            (None, Graph::Statistics { .. }) | (Some(_), Graph::Solve { .. }) => 1,
            (Some(_), Graph::Statistics { .. }) => 2,
            _ => 0,
        };
        let site = elements(Shape::Upper, plan.width(step)) * (1 + held_out);
        let passing = if leads { copies * site } else { 0 };
        Self {
            passing: match in_files(step) {
                true => copies * panel,
                false => passing,
            },
            forward: held + weights(plan.carriers(step)) + workers * batch + of_sums.max(read),
            factor: held + of_factor,
            solve,
            chunks: workers * chunk,
            pack: held + own + codes + together + packed,
            install: held + codes + plan.held(linears, installed) + own * matching,
            matrices: sums.max(factored) + passing,
        }
    }
}
