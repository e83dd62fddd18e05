//! The ordered work of a run with its predicted bytes: pure data, made from a recipe and a checkpoint's headers.

mod bytes;
mod chunks;
mod device;
mod measurement;
mod memory;
mod steps;
mod time;

pub use chunks::{Chunk, Part};
pub use measurement::MeasurementFit;
pub use memory::{Fit, Graph, Load};
pub use time::Work;

use self::steps::Step;
use crate::error::{Error, Result};
use crate::formats::{self, Format, LinearLayout, TensorSpec};
use crate::model::{Coded, LinearSpec, SiteKind, Tower};
use crate::numerics::Grid;
use crate::recipe::{Method, Recipe, Scheme};
use regex::RegexSet;
use std::collections::{BTreeMap, BTreeSet};
use std::mem::discriminant;
use std::ops::Range;

/// A quantized weight on its way from the memory map to f32: its stored bytes, and a byte a code.
const READING_BYTES_PER_CODE: u64 = 2;

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
    /// Bytes of the original weight in memory.
    pub stored_bytes: usize,
    /// `None`: left alone.
    pub grid: Option<Grid>,
    /// What departs from the recipe, in words.
    pub fallback: Option<String>,
    /// An earlier output holds just this: it is copied from there.
    pub kept: bool,
}

impl PlannedLinear {
    /// The routed expert that it belongs to.
    pub fn expert(&self) -> Option<usize> {
        self.spec.fused.as_ref().map(|slice| slice.expert)
    }

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
    /// Weights that are left alone, but that the source has quantized: they are written as their values, since the output's config
    /// speaks of the new scheme alone.
    pub dequantized: Vec<Coded>,
    /// All tensors of the output, in the order in which shards are filled.
    pub output: Vec<TensorSpec>,
    /// Linears outside the blocks (head, vision tower, projector), for the output's ignore list.
    pub outside: Vec<LinearLayout>,
    steps: Vec<Step>,
    blocks: usize,
    /// Experts in a group.
    experts_per_step: usize,
    /// Bytes that a token has between two steps.
    token_bytes: usize,
    /// What it has where an MLP's inner activations are not kept.
    token_bytes_least: usize,
    /// Whether all activations, those among them, have room where the model runs.
    inner_fits: bool,
    /// What it takes to dequantize the source's largest weight, besides the result.
    reading_bytes: u64,
    /// Bytes of a weight on the device, where the work is done on one.
    device_weight_bytes: Option<usize>,
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
    /// A group size that does not divide a width, a layout that cannot hold a linear, an unusable `ignore`, or a weight that is missing,
    /// misshapen or stored in a way that cannot be read.
    pub fn new(recipe: Recipe, tower: &Tower) -> Result<Self> {
        let plan = Self::of(recipe, tower)?;
        check_fused(tower, &plan.linears)?;
        Ok(plan)
    }

    fn of(recipe: Recipe, tower: &Tower) -> Result<Self> {
        recipe.check()?;
        if let Some(reader) = tower.reader() {
            reader.expect_weights_alone()?;
        }
        if recipe.all_experts && !tower.spec.layers.iter().any(|layer| layer.mixture) {
            return Err(Error::usage(
                "--all-experts",
                format!("{} has no experts", tower.spec.architecture),
                "leave it out",
            ));
        }
        if recipe.all_experts && recipe.method == Method::Rtn {
            return Err(Error::usage(
                "--all-experts",
                "is about statistics, of which --method rtn has none",
                "leave one of the two out",
            ));
        }
        let format = formats::by_name(&recipe.format)?;
        let ignore = patterns("--ignore", &recipe.ignore)?;
        let schemes = Schemes::new(&recipe)?;
        let mut linears: Vec<PlannedLinear> = Vec::new();
        for block in 0..tower.blocks() {
            for site in tower.spec.sites(block) {
                for spec in tower.spec.linears(block, site) {
                    let index = linears.len();
                    let name = tower.linear_name(block, &spec);
                    tower.expect_linear(block, &spec)?;
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
                        slot: 0,
                        name,
                        rows: spec.rows,
                        columns: spec.columns,
                        stored_bytes: tower.linear_bytes(block, &spec)?,
                        grid,
                        fallback,
                        kept: false,
                        spec,
                    });
                }
            }
        }
        schemes.check(&linears)?;
        let mut plan = Self {
            recipe,
            format,
            linears,
            copied: Vec::new(),
            dequantized: Vec::new(),
            output: Vec::new(),
            outside: Vec::new(),
            steps: Vec::new(),
            blocks: tower.blocks(),
            experts_per_step: 1,
            token_bytes: 0,
            token_bytes_least: 0,
            inner_fits: true,
            device_weight_bytes: (tower.placement().on_device).then(|| tower.precision().size_in_bytes()),
            reading_bytes: 0,
        };
        plan.token_bytes = steps::token_bytes(tower, &plan.linears, true);
        plan.token_bytes_least = steps::token_bytes(tower, &plan.linears, false);
        plan.cut(1);
        plan.place(tower)?;
        Ok(plan)
    }

    /// Cuts the blocks into steps, with so many experts of a mixture in a group.
    fn cut(&mut self, experts: usize) {
        self.experts_per_step = experts;
        self.steps = steps::cut(&self.linears, experts);
        for step in &self.steps {
            for linear in &mut self.linears[step.linears.clone()] {
                linear.slot = linear.index - step.linears.start;
            }
        }
    }

    /// Experts of a mixture that are worked on together.
    pub fn experts_per_step(&self) -> usize {
        self.experts_per_step
    }

    /// The steps of a run that only sums statistics: those of every linear, whatever a recipe will do with them.
    ///
    /// # Errors
    /// As [`Self::new`]; or `all_experts` is asked for where there are none.
    pub fn for_statistics(tower: &Tower, all_experts: bool) -> Result<Self> {
        let recipe = Recipe {
            bits: 8,
            group_size: 0,
            match_original: 0.0,
            all_experts,
            ..Recipe::default()
        };
        Self::of(recipe, tower)
    }

    fn place(&mut self, tower: &Tower) -> Result<()> {
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
        let coded = tower.coded()?;
        let parts: BTreeSet<String> = coded.iter().flat_map(|coded| coded.parts.clone()).collect();
        let elements = |coded: &Coded| coded.spec.shape.iter().rev().take(2).product::<usize>() as u64;
        self.reading_bytes = READING_BYTES_PER_CODE * coded.iter().map(elements).max().unwrap_or(0);
        self.dequantized = coded;
        self.dequantized
            .retain(|coded| !quantized.contains(&coded.spec.name));
        let is_plain = |name: &&str| !quantized.contains(*name) && !parts.contains(*name);
        let plain = tower.checkpoint.names().filter(is_plain);
        self.copied = plain.map(str::to_owned).collect();
        let plain = self.copied.iter().filter_map(|name| tower.checkpoint.spec(name));
        let values = self.dequantized.iter().map(|coded| coded.spec.clone());
        let mut kept: Vec<TensorSpec> = plain.chain(values).collect();
        kept.sort_by(|a, b| a.name.cmp(&b.name));
        for spec in kept {
            let name = &spec.name;
            if let Some(module) = name.strip_suffix(".weight")
                && let [rows, columns] = spec.shape[..]
                && *name != embedding
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
        Ok(())
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

    /// Steps of a run: one a block and site, and in a mixture two a group of experts.
    pub fn steps(&self) -> u64 {
        self.steps.len() as u64
    }

    /// Block and first site of a step.
    pub fn step(&self, step: u64) -> (usize, SiteKind) {
        let step = &self.steps[step as usize];
        (step.block, step.sites[0])
    }

    /// The inputs of a step's linears: one, or one an expert.
    pub fn step_sites(&self, step: u64) -> &[SiteKind] {
        &self.steps[step as usize].sites
    }

    /// Whether a step's inputs are summed there; else an earlier step of its block has their factor.
    pub fn leads(&self, step: u64) -> bool {
        self.steps[step as usize].leads
    }

    /// Whether no later step has the inputs of this one.
    pub fn trails(&self, step: u64) -> bool {
        self.steps[step as usize].trails
    }

    /// The earlier steps whose linears carry a batch to the inputs of this one.
    pub fn carriers(&self, step: u64) -> Range<u64> {
        let carriers = steps::carriers(&self.steps, step as usize, self.inner_fits);
        carriers.start as u64..carriers.end as u64
    }

    /// The steps before `step` whose linears carry a batch from there on: they wait meanwhile.
    pub fn waiting(&self, step: u64) -> Range<u64> {
        let next = (step + 1 < self.steps()).then(|| self.carriers(step + 1).start);
        next.map_or(step, |first| first.min(step))..step
    }

    /// Of [`Self::carriers`], those that no later step takes.
    pub fn served(&self, step: u64) -> Range<u64> {
        let carriers = self.carriers(step);
        carriers.start..carriers.end.min(self.waiting(step).start)
    }

    /// Whether a batch makes the inner activations of the MLP that it leaves again, on its way to `step`; not on the way to where no step is.
    pub fn makes_inner(&self, step: u64) -> bool {
        let gate_up_and_down = |carriers: Range<u64>| carriers.end - carriers.start == 2;
        step < self.steps() && self.step(step).1 == SiteKind::Qkv && gate_up_and_down(self.carriers(step))
    }

    /// Whether the input of a down at `step` is kept for who leaves the MLP, if anybody does.
    pub fn keeps_inner(&self, step: u64) -> bool {
        step + 1 < self.steps() && !self.makes_inner(step + 1)
    }

    /// The linears of steps that lie together.
    fn carrying(&self, steps: Range<u64>) -> &[PlannedLinear] {
        match &self.steps[steps.start as usize..steps.end as usize] {
            [] => &[],
            [first, .., last] => &self.linears[first.linears.start..last.linears.end],
            [only] => &self.linears[only.linears.clone()],
        }
    }

    /// The step whose factor a mixture keeps while other inputs are worked on, if `step` lies between.
    fn shared_input(&self, step: u64) -> Option<u64> {
        let (block, own) = self.step(step);
        let steps = self.block_steps(block);
        let of = |step: &u64| self.step(*step).1 == SiteKind::GateUp;
        let held = own != SiteKind::GateUp && steps.clone().any(|s| s > step && of(&s) && !self.leads(s));
        (steps.start..step).find(of).filter(|_| held)
    }

    /// The inputs of a block in the order in which they are summed, with their widths: the same for any groups of experts.
    pub fn block_sites(&self, block: usize) -> Vec<(SiteKind, usize)> {
        let leading = self.block_steps(block).filter(|step| self.leads(*step));
        let sites = leading.flat_map(|step| {
            let (sites, width) = (self.step_sites(step).iter(), self.width(step));
            sites.map(move |&site| (site, width))
        });
        sites.collect()
    }

    /// Whether anything with this input is to be solved.
    pub fn is_summed(&self, block: usize, site: SiteKind) -> bool {
        let begin = self.linears.partition_point(|linear| linear.block < block);
        let linears = self.linears[begin..]
            .iter()
            .take_while(|linear| linear.block == block);
        linears
            .filter(|linear| linear.site == site)
            .any(|linear| linear.to_solve().is_some())
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

    /// Channels of a step's input.
    pub fn width(&self, step: u64) -> usize {
        self.step_linears(step).first().map_or(0, |linear| linear.columns)
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
            match divisors.iter().rev().find(|d| **d <= wanted) {
                Some(&used) if recipe.group_fallback => (
                    used,
                    Some(format!("group_size {used}: {wanted} does not divide {columns}")),
                ),
                smaller => {
                    let fitting = divisors.iter().filter(|d| **d <= 512).map(ToString::to_string);
                    let fitting: Vec<_> = fitting.chain(["0 (one scale a row)".into()]).collect();
                    let or = match smaller {
                        Some(_) => "; or --group-fallback to use the largest divisor for such linears",
                        None => "",
                    };
                    return Err(Error::usage(
                        "--group-size",
                        format!("{wanted} does not divide the {columns} input features of {name}"),
                        format!("sizes that do: {}{or}", fitting.join(", ")),
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
