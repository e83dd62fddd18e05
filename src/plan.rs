//! The ordered work of a run with its predicted bytes: pure data, made from a recipe and a checkpoint's headers.

use crate::error::{Error, Result};
use crate::formats::{self, Format, LinearLayout, TensorSpec};
use crate::model::{LinearSpec, SiteKind, Tower};
use crate::numerics::Grid;
use crate::numerics::panels::{PANEL_ROWS, Shape};
use crate::recipe::{Method, Recipe, Scheme};
use regex::RegexSet;
use std::collections::{BTreeMap, BTreeSet};
use std::mem::discriminant;
use std::ops::Range;

/// Weight rows that are solved together. Fixed, so that the work's split never depends on the number of workers.
pub const CHUNK_ROWS: usize = 128;
/// Process, tokenizer, allocator slack: what a run costs before its first tensor.
const BASE_BYTES: u64 = 64 << 20;

/// Activations that stay in memory where `--memory` does not say: the rest goes to the scratch file, which the page cache serves.
const RESIDENT_BYTES_DEFAULT: u64 = 48 << 20;

/// One linear of a block.
#[derive(Clone, Debug)]
pub struct PlannedLinear {
    /// Position in [`Plan::linears`].
    pub index: usize,
    /// Decoder layer.
    pub block: usize,
    /// Its input.
    pub site: SiteKind,
    /// Position among the step's linears.
    pub slot: usize,
    /// How the model knows it.
    pub spec: LinearSpec,
    /// Full module name.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// `None`: left alone.
    pub grid: Option<Grid>,
    /// What departs from the recipe, in words.
    pub fallback: Option<String>,
    /// An earlier output holds just this: it is copied from there.
    pub kept: bool,
}

impl PlannedLinear {
    /// The grid, if there are codes to choose.
    pub fn to_solve(&self) -> Option<Grid> {
        self.grid.filter(|_| !self.kept)
    }

    /// `W4 g128 symmetric`
    pub fn scheme(&self) -> String {
        match self.grid {
            None => "unquantized".into(),
            Some(grid) => {
                let group = if grid.group_size == self.columns {
                    "channel".into()
                } else {
                    format!("g{}", grid.group_size)
                };
                let kind = if grid.symmetric { "symmetric" } else { "asymmetric" };
                format!("W{} {group} {kind}", grid.bits)
            }
        }
    }
}

/// What is worked on at a time: the linears of a site, or, of a mixture's many, those of one expert.
#[derive(Clone, Debug)]
struct Step {
    block: usize,
    site: SiteKind,
    /// Positions in [`Plan::linears`].
    linears: Range<usize>,
}

/// Everything that a run will do.
pub struct Plan {
    /// The recipe.
    pub recipe: Recipe,
    /// The output's layout.
    pub format: Box<dyn Format>,
    /// All linears of all blocks, in the order in which they are reached.
    pub linears: Vec<PlannedLinear>,
    /// Tensors that are copied byte for byte.
    pub copied: Vec<String>,
    /// All tensors of the output, in the order in which shards are filled.
    pub output: Vec<TensorSpec>,
    /// Linears outside the blocks (head, vision tower, projector), for the output's ignore list.
    pub outside: Vec<LinearLayout>,
    steps: Vec<Step>,
    blocks: usize,
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan")
            .field("recipe", &self.recipe)
            .field("linears", &self.linears.len())
            .finish_non_exhaustive()
    }
}

impl Plan {
    /// Plans `recipe` for the checkpoint of `tower`.
    ///
    /// # Errors
    /// A group size that does not divide a width, a layout that cannot hold a linear, an unusable `ignore`, or a method that
    /// the model's blocks do not have yet.
    pub fn new(recipe: Recipe, tower: &Tower) -> Result<Self> {
        recipe.check()?;
        if tower.checkpoint.config().get("quantization_config").is_some() {
            return Err(Error::invalid(
                tower.checkpoint.folder().display().to_string(),
                "is already quantized (config.json has a quantization_config)",
                "start from the original checkpoint",
            ));
        }
        if !tower.spec.is_dense() && recipe.method != Method::Rtn {
            return Err(Error::invalid(
                tower.checkpoint.folder().display().to_string(),
                format!(
                    "{} has experts or latent attention, whose statistics are not collected yet",
                    tower.spec.architecture
                ),
                "such models can be evaluated, and quantized with --method rtn",
            ));
        }
        let format = formats::by_name(&recipe.format)?;
        let ignore = patterns("--ignore", &recipe.ignore)?;
        let schemes = Schemes::new(&recipe)?;
        let mut linears: Vec<PlannedLinear> = Vec::new();
        let mut steps: Vec<Step> = Vec::new();
        let expert = |spec: &LinearSpec| spec.fused.as_ref().map(|slice| slice.expert);
        for block in 0..tower.blocks() {
            for site in tower.spec.sites(block) {
                let first = steps.len();
                for spec in tower.spec.linears(block, site) {
                    let index = linears.len();
                    let begins = steps.len() == first
                        || linears
                            .last()
                            .is_some_and(|last| expert(&last.spec) != expert(&spec));
                    if begins {
                        let linears = index..index;
                        steps.push(Step { block, site, linears });
                    }
                    let slot = steps.last_mut().map_or(0, |step| {
                        step.linears.end = index + 1;
                        index - step.linears.start
                    });
                    let name = tower.linear_name(block, &spec);
                    let (grid, fallback) = match ignore.is_match(&name) {
                        true => (None, None),
                        false => {
                            let scheme = schemes.of(&name);
                            grid(&scheme, format.as_ref(), tower, &name, spec.columns)?
                        }
                    };
                    if let Some(grid) = grid {
                        format.check(&name, spec.rows, spec.columns, grid)?;
                    }
                    linears.push(PlannedLinear {
                        index,
                        block,
                        site,
                        slot,
                        name,
                        rows: spec.rows,
                        columns: spec.columns,
                        grid,
                        fallback,
                        kept: false,
                        spec,
                    });
                }
            }
        }
        schemes.check(&linears)?;
        check_fused(tower, &linears)?;
        let mut plan = Self {
            recipe,
            format,
            linears,
            copied: Vec::new(),
            output: Vec::new(),
            outside: Vec::new(),
            steps,
            blocks: tower.blocks(),
        };
        plan.place(tower);
        Ok(plan)
    }

    /// The steps of a run that only sums statistics: those of every linear, whatever a recipe will do with them.
    ///
    /// # Errors
    /// The checkpoint is already quantized.
    pub fn for_statistics(tower: &Tower) -> Result<Self> {
        let recipe = Recipe {
            bits: 8,
            group_size: 0,
            match_original: 0.0,
            ..Recipe::default()
        };
        Self::new(recipe, tower)
    }

    fn place(&mut self, tower: &Tower) {
        let quantized: BTreeSet<String> = self
            .linears
            .iter()
            .filter(|linear| linear.grid.is_some())
            .map(|linear| {
                let fused = tower.fused_name(linear.block, &linear.spec);
                fused.unwrap_or_else(|| format!("{}.weight", linear.name))
            })
            .collect();
        let inside: BTreeSet<&str> = self.linears.iter().map(|linear| linear.name.as_str()).collect();
        let embedding = tower.embedding_name();
        for name in tower.checkpoint.names() {
            if quantized.contains(name) {
                continue;
            }
            let Some(spec) = tower.checkpoint.spec(name) else {
                continue;
            };
            if let Some(module) = name.strip_suffix(".weight")
                && let [rows, columns] = spec.shape[..]
                && name != embedding
                && !inside.contains(module)
            {
                let layout = LinearLayout {
                    name: module.into(),
                    rows,
                    columns,
                    grid: None,
                };
                self.outside.push(layout);
            }
            self.copied.push(name.to_owned());
            self.output.push(spec);
        }
        // A tied head without a tensor of its own is a Linear that readers would otherwise want to quantize.
        if tower.head_name() == embedding {
            let [rows, columns] = [tower.spec.vocab_size, tower.spec.hidden_size];
            self.outside.push(LinearLayout {
                name: "lm_head".into(),
                rows,
                columns,
                grid: None,
            });
        }
        let quantized: Vec<TensorSpec> = self
            .linears
            .iter()
            .flat_map(|linear| self.tensors(linear))
            .collect();
        self.output.extend(quantized);
    }

    /// The tensors of a linear in the output's layout; none where it is left alone.
    pub fn tensors(&self, linear: &PlannedLinear) -> Vec<TensorSpec> {
        let specs = |grid| self.format.specs(&linear.name, linear.rows, linear.columns, grid);
        linear.grid.map(specs).unwrap_or_default()
    }

    /// Decoder layers.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Steps of a run: one a block and site, and in a mixture one an expert.
    pub fn steps(&self) -> u64 {
        self.steps.len() as u64
    }

    /// Block and site of a step.
    pub fn step(&self, step: u64) -> (usize, SiteKind) {
        let step = &self.steps[step as usize];
        (step.block, step.site)
    }

    /// The steps of a block; none for those beyond the last.
    pub fn block_steps(&self, block: usize) -> Range<u64> {
        let begin = self.steps.partition_point(|step| step.block < block);
        let end = self.steps.partition_point(|step| step.block <= block);
        begin as u64..end as u64
    }

    /// Whether a step is the last of its block.
    pub fn ends_block(&self, step: u64) -> bool {
        let next = self.steps.get(step as usize + 1);
        next.is_none_or(|next| next.block != self.step(step).0)
    }

    /// The linears of a step.
    pub fn step_linears(&self, step: u64) -> &[PlannedLinear] {
        &self.linears[self.steps[step as usize].linears.clone()]
    }

    /// Whether a step has anything to quantize.
    pub fn is_active(&self, step: u64) -> bool {
        self.step_linears(step)
            .iter()
            .any(|linear| linear.to_solve().is_some())
    }

    /// All linears, for the output's config.
    pub fn layouts(&self) -> Vec<LinearLayout> {
        let inside = self.linears.iter().map(|linear| LinearLayout {
            name: linear.name.clone(),
            rows: linear.rows,
            columns: linear.columns,
            grid: linear.grid,
        });
        inside.chain(self.outside.iter().cloned()).collect()
    }

    /// Bytes between two steps of `tokens` tokens: the residual in f32, the widest input in 16 bits.
    pub fn activation_bytes(&self, tokens: usize, streams: usize) -> u64 {
        let widths = self.linears.first().map_or(0, |l| l.columns * 4)
            + self.linears.iter().map(|l| l.columns * 2).max().unwrap_or(0);
        (tokens * streams * widths) as u64
    }

    /// Predicted peak of resident bytes, and the share of it that activations may take, where everything else takes `fixed`.
    ///
    /// # Errors
    /// `memory`, the budget, is less than `fixed`.
    pub fn fit(
        &self,
        memory: Option<u64>,
        fixed: u64,
        activations: u64,
        workers: usize,
    ) -> Result<(u64, u64)> {
        let resident = match memory {
            None => RESIDENT_BYTES_DEFAULT,
            Some(budget) => budget.checked_sub(fixed).ok_or_else(|| {
                Error::usage(
                    "--memory",
                    format!("{budget} bytes do not hold one block of this model with {workers} workers"),
                    format!("the smallest budget that would is {fixed} bytes; fewer --workers need less"),
                )
            })?,
        };
        let resident = resident.min(activations);
        Ok((fixed + resident, resident))
    }

    /// Predicted peak of resident bytes besides activations, of `graph` on `workers` threads with at most `batch_tokens` tokens a batch:
    /// that of the largest phase of the largest step.
    pub fn fixed_bytes(&self, graph: Graph, workers: usize, batch_tokens: usize) -> u64 {
        let needs = |step| Needs::new(self, graph, step, workers as u64, batch_tokens as u64);
        let steps = self.steps();
        let peak = |step: u64| {
            let own = needs(step);
            match graph {
                Graph::Sequential => own.forward.max(own.factor).max(own.solve).max(own.install),
                Graph::Statistics { .. } => own.forward + self.block_sum_bytes(graph),
                Graph::DataFree => own.solve.max(own.install),
                // The next step is loaded and factored while this one is solved.
                Graph::Solve { .. } => {
                    let next = needs((step + 1).min(steps - 1)).factor;
                    own.solve.max(own.install) + next
                }
            }
        };
        BASE_BYTES + (0..steps).map(peak).max().unwrap_or(0)
    }

    /// Bytes of a block's sums in an artifact, and of those of one site that are added to them.
    fn block_sum_bytes(&self, graph: Graph) -> u64 {
        let sites = self
            .block_steps(0)
            .map(|step| Needs::new(self, graph, step, 1, 0).sums);
        sites.clone().sum::<u64>() + sites.max().unwrap_or(0)
    }
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

/// Bytes that a step has resident in each of its phases, activations between steps aside.
struct Needs {
    /// Exact sums, packed.
    sums: u64,
    /// The weights that carry the batches here, a batch a worker on its way, the sums.
    forward: u64,
    /// Sums in f64, factors, and what is kept of both.
    factor: u64,
    /// Factors, original weights, codes, a chunk a worker.
    solve: u64,
    /// Codes, packed tensors, weights as the next forward passes need them.
    install: u64,
}

impl Needs {
    fn new(plan: &Plan, graph: Graph, step: u64, workers: u64, tokens: u64) -> Self {
        let recipe = &plan.recipe;
        let matching = u64::from(graph == Graph::Sequential && recipe.match_original > 0.0);
        let refined = u64::from(recipe.refine_rounds() > 0);
        let held_out = match graph {
            Graph::Statistics { held_out } | Graph::Solve { held_out } => u64::from(held_out),
            Graph::Sequential | Graph::DataFree => 0,
        };
        let linears = plan.step_linears(step);
        let before = plan.step_linears(step.max(1) - 1);
        let width = linears.first().map_or(0, |linear| linear.columns);
        let elements = |shape: Shape| (shape.elements(width) * 8) as u64;
        let (half, full) = (elements(Shape::Upper), elements(Shape::Full));
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
        let sums = half * (1 + held_out) + full * matching;
        let factors = match graph {
            Graph::DataFree => 0,
            _ => recipe.damp_percent.candidates().len() as u64,
        };
        // Target, codes, sums to the later columns and outputs; errors and gradient of the refinement; the weights as they came.
        let chunk = CHUNK_ROWS as u64 * width * (8 * (4 + 2 * refined) + 4);
        let kept = factors * (half + refined * full) + full * matching + half * held_out;
        Self {
            sums,
            forward: weights(before) * (1 + matching) + workers * batch + sums,
            factor: kept + half,
            solve: kept + weights(linears) + 2 * codes + workers * chunk,
            install: 3 * codes / 2 + weights(linears) * (1 + matching),
        }
    }
}

fn patterns(flag: &str, patterns: &[String]) -> Result<RegexSet> {
    RegexSet::new(patterns).map_err(|error| {
        Error::usage(
            flag,
            error.to_string(),
            "give regular expressions on module names",
        )
    })
}

/// The recipe as each linear has it.
pub(crate) struct Schemes<'a> {
    recipe: &'a Recipe,
    targets: Vec<(RegexSet, &'a Scheme)>,
}

impl<'a> Schemes<'a> {
    pub(crate) fn new(recipe: &'a Recipe) -> Result<Self> {
        let targets = recipe.schemes.iter().map(|scheme| {
            if scheme.targets.is_empty() {
                return Err(Error::usage(
                    "[[scheme]]",
                    "has no targets",
                    "name linears by regular expressions: targets = ['down_proj$']",
                ));
            }
            Ok((patterns("[[scheme]] targets", &scheme.targets)?, scheme))
        });
        Ok(Self {
            recipe,
            targets: targets.collect::<Result<_>>()?,
        })
    }

    pub(crate) fn find(&self, name: &str) -> Option<&'a Scheme> {
        let mut targets = self.targets.iter();
        targets
            .find(|(targets, _)| targets.is_match(name))
            .map(|(_, scheme)| *scheme)
    }

    fn of(&self, name: &str) -> Recipe {
        let mut recipe = self.recipe.clone();
        if let Some(scheme) = self.find(name) {
            recipe.bits = scheme.bits.unwrap_or(recipe.bits);
            recipe.group_size = scheme.group_size.unwrap_or(recipe.group_size);
            recipe.symmetric = scheme.symmetric.unwrap_or(recipe.symmetric);
        }
        recipe
    }

    /// Serving stacks fuse the linears of one input: they have to agree. And a scheme that nothing has is a mistyped target.
    fn check(&self, linears: &[PlannedLinear]) -> Result<()> {
        // All routed experts of a layer are one, whatever their number; the shared one stands by itself.
        let key = |linear: &PlannedLinear| {
            (
                linear.block,
                discriminant(&linear.site),
                linear.spec.fused.is_some(),
            )
        };
        for fused in linears.chunk_by(|a, b| key(a) == key(b)) {
            let mut quantized = fused.iter().filter(|linear| linear.grid.is_some());
            let Some(first) = quantized.next() else { continue };
            if let Some(other) = quantized.find(|linear| linear.grid != first.grid) {
                return Err(Error::usage(
                    "[[scheme]]",
                    format!(
                        "gives {} {} and {} {}; vLLM fuses them",
                        first.name,
                        first.scheme(),
                        other.name,
                        other.scheme()
                    ),
                    "let its targets match all linears with this input (q, k and v; gate and up)",
                ));
            }
        }
        for (position, (_, scheme)) in self.targets.iter().enumerate() {
            let has = |linear: &&PlannedLinear| {
                self.find(&linear.name)
                    .is_some_and(|found| std::ptr::eq(found, *scheme))
            };
            if !linears.iter().any(|linear| has(&linear)) {
                return Err(Error::usage(
                    "[[scheme]]",
                    format!(
                        "{} of the recipe matches no linear: {}",
                        position + 1,
                        scheme.targets.join(", ")
                    ),
                    "module names look like model.layers.0.mlp.down_proj; the first scheme that matches counts",
                ));
            }
        }
        Ok(())
    }
}

/// Refuses tensors of all experts that would be quantized in part, or that no written layout has names for.
fn check_fused(tower: &Tower, linears: &[PlannedLinear]) -> Result<()> {
    let mut tensors: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for linear in linears {
        let (Some(slice), Some(name)) = (&linear.spec.fused, tower.fused_name(linear.block, &linear.spec))
        else {
            continue;
        };
        if linear.grid.is_some() && slice.layout.interleaved {
            return Err(Error::invalid(
                name,
                "has gate and up interleaved, for which no output format has names",
                "leave the experts out: --ignore 'mlp.experts'",
            ));
        }
        let (parts, quantized) = tensors.entry(name).or_default();
        *parts += 1;
        *quantized += usize::from(linear.grid.is_some());
    }
    match tensors
        .into_iter()
        .find(|(_, (parts, quantized))| *quantized > 0 && quantized < parts)
    {
        None => Ok(()),
        Some((name, (parts, quantized))) => Err(Error::usage(
            "--ignore",
            format!(
                "leaves {} of {parts} linears of {name} unquantized",
                parts - quantized
            ),
            "let it match all experts of a layer, or none",
        )),
    }
}

/// The grid of one linear, and how it departs from the recipe.
fn grid(
    recipe: &Recipe,
    format: &dyn Format,
    tower: &Tower,
    name: &str,
    columns: usize,
) -> Result<(Option<Grid>, Option<String>)> {
    let (group_size, fallback) = match recipe.group_size {
        0 => (columns, None),
        wanted if columns.is_multiple_of(wanted) => (wanted, None),
        wanted => {
            let divisors: Vec<usize> = (16..=columns)
                .filter(|d| d % 16 == 0 && columns.is_multiple_of(*d))
                .collect();
            match divisors
                .iter()
                .rev()
                .find(|d| **d <= wanted)
                .filter(|_| recipe.group_fallback)
            {
                Some(&used) => (
                    used,
                    Some(format!("group_size {used}: {wanted} does not divide {columns}")),
                ),
                None => {
                    let fitting: Vec<_> = divisors
                        .iter()
                        .filter(|d| **d <= 512)
                        .map(ToString::to_string)
                        .collect();
                    return Err(Error::usage(
                        "--group-size",
                        format!("{wanted} does not divide the {columns} input features of {name}"),
                        format!(
                            "use one of {}, 0 for one scale a row, or --group-fallback to use the largest divisor for such linears",
                            fitting.join(", ")
                        ),
                    ));
                }
            }
        }
    };
    let grid = Grid {
        bits: recipe.bits,
        group_size,
        symmetric: recipe.symmetric,
        scale_dtype: format.scale_dtype(tower.weight_dtype()),
    };
    Ok((Some(grid), fallback))
}
