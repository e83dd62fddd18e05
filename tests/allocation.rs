//! Widths by average: the knapsack against brute force, predicted losses and the KL of single units against slow references, and the
//! whole from an artifact to a checkpoint.

use crate::families::fixtures;
use crate::quantize::named_budget;
use crate::reference;
use candle_core::{Device, Tensor};
use proptest::prelude::*;
use quantflow::allocation::{self, Measured, Sensitivity, Unit};
use quantflow::artifact::Artifact;
use quantflow::calibration::{self, Calibration, Source as Texts};
use quantflow::device::Placement;
use quantflow::error::Result;
use quantflow::model::{LinearSpec, Source, Tower};
use quantflow::numerics::knapsack::{Choice, choose};
use quantflow::numerics::predict::predicted_loss;
use quantflow::numerics::{Grid, ScaleDtype};
use quantflow::pipelines::allocate::{self, Allocation, From, RECIPE, SENSITIVITY, Wanted, sample};
use quantflow::pipelines::job::{Job, Summary};
use quantflow::pipelines::quantize::quantize;
use quantflow::pipelines::resolve;
use quantflow::pipelines::sensitivity::{Measurement, measure};
use quantflow::pipelines::statistics::{self, Change, update};
use quantflow::pipelines::sweep::{Sweep, sweep};
use quantflow::pipelines::verify::verify;
use quantflow::plan::{MeasurementFit, Plan};
use quantflow::recipe::{BITS, Method, Recipe, Scheme};
use quantflow::report::{Observer, Silent};
use quantflow::storage;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

/// Losses are multiples of this, so that their sums are exact in any order.
const LOSS_UNIT: f64 = 0.125;

fn fixture(name: &str) -> PathBuf {
    fixtures().join("tiny-vl").join(name)
}

fn silent() -> Arc<dyn Observer> {
    Arc::new(Silent)
}

/// Size and loss of an assignment.
fn total(units: &[Vec<Choice>], chosen: &[usize]) -> (u64, f64) {
    let picked = units.iter().zip(chosen).map(|(choices, &at)| choices[at]);
    picked.fold((0, 0.0), |(size, loss), choice| {
        (size + choice.size, loss + choice.loss)
    })
}

/// The smallest loss of all assignments within the budget, by trying each.
fn brute_force(units: &[Vec<Choice>], budget: u64) -> Option<f64> {
    let mut best = None;
    let count: usize = units.iter().map(Vec::len).product();
    for mut number in 0..count {
        let chosen: Vec<usize> = units
            .iter()
            .map(|choices| {
                let at = number % choices.len();
                number /= choices.len();
                at
            })
            .collect();
        let (size, loss) = total(units, &chosen);
        if size <= budget && best.is_none_or(|best| loss < best) {
            best = Some(loss);
        }
    }
    best
}

fn units_of(drawn: &[Vec<(u64, u32)>], scale: u64) -> Vec<Vec<Choice>> {
    let choice = |&(size, loss): &(u64, u32)| Choice {
        size: size * scale,
        loss: f64::from(loss) * LOSS_UNIT,
    };
    drawn
        .iter()
        .map(|choices| choices.iter().map(choice).collect())
        .collect()
}

fn drawn_units(size_max: u64) -> impl Strategy<Value = Vec<Vec<(u64, u32)>>> {
    prop::collection::vec(prop::collection::vec((0..size_max, 0u32..1000), 1..5), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn the_knapsack_is_as_good_as_trying_everything(
        drawn in drawn_units(40), scale in prop::sample::select(vec![1u64, 7, 110_592]), budget in 0u64..160, more in 0u64..40,
    ) {
        let units = units_of(&drawn, scale);
        let loss = |budget: u64| -> Result<Option<f64>, TestCaseError> {
            let Some(chosen) = choose(&units, budget) else { return Ok(None) };
            let (size, loss) = total(&units, &chosen);
            prop_assert!(size <= budget, "{size} of {budget}");
            Ok(Some(loss))
        };
        let (tight, roomy) = (loss(budget * scale)?, loss((budget + more) * scale)?);
        prop_assert_eq!(tight, brute_force(&units, budget * scale));
        prop_assert_eq!(roomy, brute_force(&units, (budget + more) * scale));
        if let Some(tight) = tight {
            prop_assert!(roomy.is_some_and(|roomy| roomy <= tight));
        }
    }

    /// Sizes without a common divisor, larger than are told apart: the budget holds, and less than a grain a unit is given away.
    #[test]
    fn coarse_sizes_keep_the_budget(drawn in drawn_units(4_000_000_000), budget in 0u64..12_000_000_000) {
        let units = units_of(&drawn, 1);
        let smallest: u64 = units.iter().map(|unit| unit.iter().map(|choice| choice.size).min().unwrap()).sum();
        match choose(&units, budget) {
            None => prop_assert!(smallest > budget),
            Some(chosen) => {
                let (size, loss) = total(&units, &chosen);
                prop_assert!(size <= budget);
                let grain = budget.div_ceil(1 << 17) + 1;
                let less = budget.saturating_sub(grain * units.len() as u64);
                if let Some(best) = brute_force(&units, less) {
                    prop_assert!(loss <= best, "{loss} {best}");
                }
            }
        }
    }

    #[test]
    fn the_predicted_loss_is_that_of_the_slow_search(
        groups in 1usize..4, group in prop::sample::select(vec![8usize, 32]), rows in 1usize..9,
        bits in prop::sample::select(BITS.to_vec()), symmetric: bool, seed in 0u64..1000,
    ) {
        let columns = groups * group;
        let mut random = reference::random(seed);
        let mut random = || (random() * 0.5) as f32;
        let weights: Vec<f32> = (0..rows * columns).map(|_| random()).collect();
        let importance: Vec<f64> = (0..columns).map(|_| f64::from(random() + 0.6)).collect();
        let grid = Grid { bits, group_size: group, symmetric, scale_dtype: ScaleDtype::Bf16 };
        let fast = predicted_loss(&weights, &importance, grid);
        let slow = reference::predicted_loss(&weights, &importance, grid);
        prop_assert!((fast - slow).abs() <= 1e-9 * slow, "{} {}", fast, slow);
        prop_assert!(slow > 0.0);
    }
}

fn plan(recipe: Recipe) -> (Tower, Plan) {
    let tower = Tower::open(&fixture("model"), Device::Cpu).unwrap();
    let plan = Plan::new(recipe, &tower).unwrap();
    (tower, plan)
}

fn recipe() -> Recipe {
    Recipe {
        group_size: 64,
        match_original: 0.0,
        ..Recipe::default()
    }
}

/// A measurement that was made up: costs differ from unit to unit.
fn made_up(units: &[Unit], plan: &Plan) -> Sensitivity {
    let measured = units.iter().enumerate().map(|(at, unit)| {
        let loss = |&bits: &u32| (bits, 1000.0 / f64::from(1 << (2 * bits)));
        Measured {
            linears: unit
                .linears
                .iter()
                .map(|&at| plan.linears[at].name.clone())
                .collect(),
            parameters: unit.parameters,
            kl: (unit.widths.len() > 1).then_some(1e-3 * ((at * 7) % 11 + 1) as f64),
            losses: unit.widths.iter().map(loss).collect(),
        }
    });
    Sensitivity {
        of: String::new(),
        probe_bits: 3,
        windows: Vec::new(),
        positions: 1,
        units: measured.collect(),
    }
}

/// Width of each linear by name.
fn widths(plan: &Plan) -> BTreeMap<String, Option<u32>> {
    let width =
        |linear: &quantflow::plan::PlannedLinear| (linear.name.clone(), linear.grid.map(|grid| grid.bits));
    plan.linears.iter().map(width).collect()
}

#[test]
fn fused_linears_have_one_width_and_the_budget_holds_to_the_bit() {
    let (tower, plan) = plan(recipe());
    let units = allocation::units(&plan).unwrap();
    let names = |unit: &Unit| -> Vec<&str> {
        let leaf = |&at: &usize| plan.linears[at].name.rsplit('.').next().unwrap();
        unit.linears.iter().map(leaf).collect()
    };
    let block: Vec<Vec<&str>> = units[..4].iter().map(names).collect();
    assert_eq!(
        block,
        [
            vec!["q_proj", "k_proj", "v_proj"],
            vec!["o_proj"],
            vec!["gate_proj", "up_proj"],
            vec!["down_proj"]
        ]
    );
    assert_eq!(units.len(), 4 * plan.blocks());
    let sensitivity = made_up(&units, &plan);
    let weights = allocation::parameters(&units);
    let mut before = f64::INFINITY;
    for step in 0..=60 {
        let average = 2.0 + f64::from(step) / 10.0;
        let chosen = allocation::allocate(&units, &sensitivity, average).unwrap();
        let bits: u64 = units
            .iter()
            .zip(&chosen)
            .map(|(unit, &bits)| unit.parameters * u64::from(bits))
            .sum();
        assert!(bits as f64 <= average * weights as f64, "{average}");
        let cost = |(measured, &bits): (&Measured, &u32)| measured.weight(3, bits);
        let cost: f64 = sensitivity.units.iter().zip(&chosen).map(cost).sum();
        assert!(cost <= before, "{average}: {cost} after {before}");
        before = cost;
        // The recipe says the same of every linear, and survives its file.
        let made = allocation::recipe(&plan, &tower, &units, &chosen).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("recipe.toml");
        storage::write_whole(&file, made.to_toml().unwrap().as_bytes()).unwrap();
        let read = Recipe::find(file.to_str().unwrap()).unwrap();
        assert_eq!(read, made);
        let widths = widths(&Plan::new(read, &tower).unwrap());
        for (unit, bits) in units.iter().zip(&chosen) {
            for &at in &unit.linears {
                assert_eq!(widths[&plan.linears[at].name], Some(*bits), "{average}");
            }
        }
    }
    // With no room to spare and all of it.
    assert!(
        allocation::allocate(&units, &sensitivity, 2.0)
            .unwrap()
            .iter()
            .all(|&bits| bits == 2)
    );
    assert!(
        allocation::allocate(&units, &sensitivity, 8.0)
            .unwrap()
            .iter()
            .all(|&bits| bits == 8)
    );
    for average in [1.99, 8.01, f64::NAN, -1.0] {
        let error = allocation::allocate(&units, &sensitivity, average).unwrap_err();
        assert!(error.to_string().contains("not between 2 and 8"), "{error}");
        assert!(error.hint().is_some());
    }
}

#[test]
fn what_a_recipe_says_of_single_linears_stays() {
    let scheme = |target: &str, bits, group_size| Scheme {
        targets: vec![target.into()],
        bits,
        group_size,
        symmetric: None,
    };
    let (tower, plan) = plan(Recipe {
        ignore: vec![r"layers\.0\.self_attn\.o_proj$".into()],
        schemes: vec![
            scheme(r"layers\.1\.mlp\.down_proj$", Some(8), None),
            scheme("down_proj$", None, Some(32)),
        ],
        ..recipe()
    });
    let units = allocation::units(&plan).unwrap();
    assert_eq!(units.len(), 4 * plan.blocks() - 1);
    let stated: Vec<&Unit> = units.iter().filter(|unit| unit.widths.len() == 1).collect();
    assert_eq!(stated.len(), 1);
    let sensitivity = made_up(&units, &plan);
    let chosen = allocation::allocate(&units, &sensitivity, 4.0).unwrap();
    let made = Plan::new(
        allocation::recipe(&plan, &tower, &units, &chosen).unwrap(),
        &tower,
    )
    .unwrap();
    for (before, after) in plan.linears.iter().zip(&made.linears) {
        let kept = |grid: Grid| (grid.group_size, grid.symmetric);
        assert_eq!(before.grid.map(kept), after.grid.map(kept), "{}", before.name);
    }
    let eight = &made.linears[stated[0].linears[0]];
    assert!(eight.name.ends_with("layers.1.mlp.down_proj") && eight.grid.unwrap().bits == 8);
    assert!(allocation::average_bits(&units, &chosen) <= 4.0);
    // It counts: an average that it alone passes cannot be had.
    assert!(allocation::allocate(&units, &sensitivity, 2.0).is_err());
}

#[test]
fn all_experts_of_a_layer_have_one_width() {
    let model = fixtures().join("families/qwen3_moe");
    let tower = Tower::open(&model, Device::Cpu).unwrap();
    let recipe = Recipe {
        group_size: 0,
        method: Method::Rtn,
        ..Recipe::default()
    };
    let plan = Plan::new(recipe, &tower).unwrap();
    let units = allocation::units(&plan).unwrap();
    let routed = |unit: &&Unit| {
        unit.linears
            .iter()
            .any(|&at| plan.linears[at].name.contains(".experts."))
    };
    let experts: Vec<&Unit> = units.iter().filter(routed).collect();
    let blocks: BTreeSet<usize> = experts.iter().map(|unit| unit.block).collect();
    assert!(
        !experts.is_empty() && blocks.len() == experts.len(),
        "one unit a layer"
    );
    let all = plan
        .linears
        .iter()
        .filter(|linear| linear.name.contains(".experts."))
        .count();
    assert_eq!(experts.iter().map(|unit| unit.linears.len()).sum::<usize>(), all);
    let widths: Vec<u32> = units
        .iter()
        .map(|unit| if routed(&unit) { 3 } else { 4 })
        .collect();
    let fits = units
        .iter()
        .zip(&widths)
        .all(|(unit, bits)| unit.widths.contains(bits));
    let widths = if fits {
        widths
    } else {
        units
            .iter()
            .map(|unit| if routed(&unit) { 8 } else { 4 })
            .collect()
    };
    let made = allocation::recipe(&plan, &tower, &units, &widths).unwrap();
    let targets: usize = made.schemes.iter().map(|scheme| scheme.targets.len()).sum();
    assert!(targets <= 8, "{:?}", made.schemes);
    let made = Plan::new(made, &tower).unwrap();
    for (unit, &bits) in units.iter().zip(&widths) {
        assert!(
            unit.linears
                .iter()
                .all(|&at| made.linears[at].grid.unwrap().bits == bits)
        );
    }
}

/// An artifact over some calibration text, made once.
pub(crate) fn artifact() -> Arc<Artifact> {
    static MADE: OnceLock<(tempfile::TempDir, Arc<Artifact>)> = OnceLock::new();
    let (_, artifact) = MADE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let texts = Texts {
            names: vec![fixture("data/text_calib.jsonl").display().to_string()],
            samples: 20,
            length: 128,
            ..Texts::default()
        };
        let collect = statistics::Job {
            held_out: 0.2,
            workers: 2,
            ..statistics::Job::new(
                fixture("model"),
                folder.path().join("s"),
                Change::Collect,
                calibration::documents(&texts, &fixture("model"), 2048).unwrap(),
            )
        };
        update(&collect, &silent(), &Arc::default()).unwrap();
        let artifact = Arc::new(Artifact::open(&collect.folder).unwrap());
        (folder, artifact)
    });
    Arc::clone(artifact)
}

pub(crate) fn windows(count: usize) -> Calibration {
    let all = calibration::read_texts(&fixture("data/text_eval.jsonl"), &fixture("model"), 64, 2048).unwrap();
    sample(&all, count)
}

pub(crate) fn job(output: &Path) -> Job {
    Job {
        statistics: Some(artifact()),
        workers: 2,
        ..Job::new(fixture("model"), output.to_owned(), recipe())
    }
}

pub(crate) fn allocated(job: &Job, average_bits: f64, measured: From) -> Result<(Summary, Allocation)> {
    let wanted = Wanted {
        average_bits,
        measured,
    };
    allocate::solve(job, &wanted, &silent(), &Arc::default())
}

#[test]
fn the_cost_of_a_part_is_the_divergence_of_a_model_with_that_part_quantized() {
    let folder = tempfile::tempdir().unwrap();
    let probe = Job {
        recipe: Recipe { bits: 3, ..recipe() },
        ..job(&folder.path().join("probe"))
    };
    quantize(&probe, &silent(), &Arc::default()).unwrap();
    let (_, plan) = probe.plan().unwrap();
    let units = allocation::units(&plan).unwrap();
    let part = |unit: &Unit| {
        let names = unit.linears.iter().map(|&at| plan.linears[at].name.clone());
        (unit.block, names.collect::<BTreeSet<_>>())
    };
    // Two of one block, one of the next, the last of all.
    let parts: Vec<_> = [0, 3, 4, units.len() - 1].map(|at| part(&units[at])).into();
    let windows = windows(3);
    assert!(windows.batches.len() == 3 && windows.batches.iter().all(|batch| batch.sequences == 1));
    let measured = |workers: usize| {
        let job = Measurement {
            reference: fixture("model"),
            model: probe.output.clone(),
            parts: parts.clone(),
            windows: windows.clone(),
            scratch: folder.path().to_owned(),
            workers,
            fit: MeasurementFit {
                peak_host_bytes: 0,
                resident_bytes: if workers == 2 { 0 } else { 1 << 20 },
            },
            placement: Placement::cpu(),
            device_memory: None,
        };
        measure(job, &silent(), &Arc::default()).unwrap()
    };
    let (kl, positions) = measured(1);
    assert_eq!(positions, 3 * 63);
    for workers in [2, 4] {
        assert_eq!(measured(workers), (kl.clone(), positions), "{workers} workers");
    }
    let [original, quantized] =
        [&fixture("model"), &probe.output].map(|path| Source::open(path, Device::Cpu).unwrap());
    for ((_, names), kl) in parts.iter().zip(kl) {
        let mut sum = 0.0;
        for batch in &windows.batches {
            let none = BTreeSet::new();
            let reference = logits(&original, &quantized, &none, &batch.tokens);
            let model = logits(&original, &quantized, names, &batch.tokens);
            for (r, m) in reference.iter().zip(&model).take(batch.length - 1) {
                sum += reference::kl(r, m);
            }
        }
        let slow = sum / positions as f64;
        // f32 logits: what is left of the sums is about 1e-6 of the largest logit.
        assert!(
            (kl - slow).abs() < 1e-3 * slow + 1e-7 && slow > 1e-5,
            "{kl} {slow} {names:?}"
        );
    }
}

/// Logits of each position, `names` taken from the quantized checkpoint.
fn logits(original: &Source, quantized: &Source, names: &BTreeSet<String>, tokens: &[u32]) -> Vec<Vec<f32>> {
    let tower = &original.tower;
    let rotary = tower.rotary(tokens.len()).unwrap();
    let mut residual: Tensor = tower.embed(tokens).unwrap();
    for block in 0..tower.blocks() {
        let linear = |spec: &LinearSpec| match names.contains(&tower.linear_name(block, spec)) {
            true => quantized.tower.linear(block, spec),
            false => original.tower.linear(block, spec),
        };
        let layer = tower.block(block, &rotary).unwrap();
        residual = layer.forward(&residual, tokens.len(), &linear).unwrap();
    }
    tower.logits(&residual).unwrap().to_vec2().unwrap()
}

#[test]
fn an_average_gives_the_same_checkpoint_however_it_is_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let solve = |name: &str, workers: usize, format: &str| {
        let mut job = job(&at(name));
        job.workers = workers;
        job.recipe.format = format.into();
        allocated(&job, 3.4, From::Windows(windows(2))).unwrap()
    };
    let (one, chosen) = solve("1", 1, "compressed-tensors");
    for workers in [2, 4] {
        let (summary, again) = solve(&workers.to_string(), workers, "compressed-tensors");
        assert_eq!(summary.output_digest, one.output_digest, "{workers} workers");
        assert_eq!(
            (&again.recipe, &again.sensitivity),
            (&chosen.recipe, &chosen.sensitivity)
        );
    }
    let widths: BTreeSet<u32> = chosen.units.iter().map(|unit| unit.bits).collect();
    assert!(
        widths.len() > 1 && chosen.average_bits <= 3.4 && chosen.average_bits > 3.2,
        "{widths:?}"
    );
    assert!((chosen.effective_bits - chosen.average_bits - 16.0 / 64.0).abs() < 1e-9);
    // In the smallest memory, which the refusal of less names.
    let tight = |memory: u64| {
        let job = Job {
            memory: Some(memory),
            ..job(&at("tight"))
        };
        allocated(&job, 3.4, From::Windows(windows(2)))
    };
    let refused = tight(64 << 20).unwrap_err();
    assert!(
        refused.to_string().contains("--average-bits is measured"),
        "{refused}"
    );
    assert!(!at("tight").exists());
    let smallest = named_budget(&refused);
    assert!(tight(smallest - 1).is_err());
    let (summary, again) = tight(smallest).unwrap();
    assert_eq!(summary.output_digest, one.output_digest);
    assert_eq!(
        (again.sensitivity, again.plan_peak_host_bytes),
        (chosen.sensitivity.clone(), smallest - smallest / 10)
    );
    // Both layouts hold it, whole.
    let (_, gptq) = solve("gptq", 2, "gptq");
    for name in ["1", "gptq"] {
        let found = verify(&at(name), &fixture("model")).unwrap();
        assert_eq!((found.problems, found.quantized), (Vec::new(), 35));
        assert!(!at(name).join(".quantflow").exists());
    }
    let bits =
        |allocation: &Allocation| -> Vec<u32> { allocation.units.iter().map(|unit| unit.bits).collect() };
    assert!(
        allocation::average_bits(
            &allocation::units(&job(&at("x")).plan().unwrap().1).unwrap(),
            &bits(&gptq)
        ) <= 3.4
    );

    // Its recipe is a recipe like any other.
    let found = Recipe::find(at("1").join(RECIPE).to_str().unwrap()).unwrap();
    let again = Job {
        recipe: found,
        ..job(&at("again"))
    };
    let summary = resolve::solve(&again, &silent(), &Arc::default()).unwrap();
    assert_eq!(summary.output_digest, one.output_digest);
    // What was measured serves for it and for other averages, into the same folder.
    let file = at("kept.json");
    storage::copy_whole(&at("1").join(SENSITIVITY), &file).unwrap();
    let (summary, _) = allocated(&again, 3.4, From::File(file.clone())).unwrap();
    assert_eq!(
        (&summary.output_digest, summary.reused_linears),
        (&one.output_digest, 35)
    );
    let (summary, more) = allocated(&again, 4.0, From::File(file.clone())).unwrap();
    assert!(more.predicted_kl < chosen.predicted_kl && more.average_bits > chosen.average_bits);
    assert!(summary.reused_linears > 0 && summary.reused_linears < 35);
    assert!(
        verify(&at("again"), &fixture("model"))
            .unwrap()
            .problems
            .is_empty()
    );
    // But not for other groups.
    let mut other = job(&at("other"));
    other.recipe.group_size = 32;
    let error = allocated(&other, 3.4, From::File(file)).unwrap_err();
    assert!(error.to_string().contains("other groups"), "{error}");
}

#[test]
fn an_average_that_cannot_be_is_refused_before_anything_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let refused = |job: &Job, average: f64, words: &str| {
        let error = allocated(job, average, From::Windows(windows(1))).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "{error}");
    };
    refused(&job(&output), 1.5, "not between 2 and 8");
    refused(&job(&output), 9.0, "not between 2 and 8");
    let without = Job {
        statistics: None,
        ..job(&output)
    };
    refused(&without, 3.5, "needs GPTQ and statistics");
    assert!(!output.exists());
    // An artifact that all was taken from.
    let mut header = artifact().header.clone();
    header.blocks.clear();
    let empty = Job {
        statistics: Some(Arc::new(Artifact::new(artifact().folder(), header))),
        ..job(&output)
    };
    refused(&empty, 3.5, "has no statistics of block 0");
    // Somebody else's folder is left as it is.
    let foreign = folder.path().join("foreign");
    storage::create_folder(&foreign).unwrap();
    storage::write_whole(&foreign.join("note.txt"), b"mine").unwrap();
    refused(&job(&foreign), 3.5, "not an output of quantflow");
    assert_eq!(std::fs::read_dir(&foreign).unwrap().count(), 1);
    let none = allocated(&job(&output), 3.5, From::Windows(Calibration::default())).unwrap_err();
    assert!(none.to_string().contains("no window"), "{none}");
}

#[test]
fn the_command_line_says_what_is_missing() {
    let output = tempfile::tempdir().unwrap();
    let run = |command: &str, arguments: &[&str]| {
        let mut process = Command::new(env!("CARGO_BIN_EXE_quantflow"));
        process.arg(command).arg(fixture("model")).args(arguments);
        process
            .args(["--average-bits", "3.5", "-o"])
            .arg(output.path().join("out"));
        let done = process.output().unwrap();
        let told = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(2), "{told}");
        told
    };
    let statistics = artifact().folder().display().to_string();
    let told = run("solve", &["--group-size", "64", "--statistics", &statistics]);
    assert!(told.contains("hint: give --text FILE or --tokens"), "{told}");
    let told = run("quantize", &["--calibration", "x.jsonl"]);
    assert!(told.contains("hint: add --activations independent"), "{told}");
    let told = run("plan", &["--method", "rtn"]);
    assert!(told.contains("quantflow_recipe.toml"), "{told}");
}

#[test]
fn a_sweep_is_many_solves() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let swept = |keep: bool| Sweep {
        base: job(&at("sweep")),
        bits: vec![4, 3],
        group_sizes: vec![32, 64],
        windows: keep.then(|| windows(1)),
        keep,
    };
    let mut told = 0;
    let tried = sweep(&swept(false), &silent(), &Arc::default(), |_| told += 1).unwrap();
    assert_eq!((told, tried.len()), (4, 4));
    let schemes: Vec<_> = tried
        .iter()
        .map(|row| (row.bits, row.group_size, row.effective_bits))
        .collect();
    assert_eq!(
        schemes,
        [(4, 32, 4.5), (4, 64, 4.25), (3, 32, 3.5), (3, 64, 3.25)]
    );
    assert!(tried[0].relative_error_mean < tried[1].relative_error_mean);
    assert!(tried[1].relative_error_mean < tried[3].relative_error_mean);
    assert!(tried[0].output_bytes > tried[3].output_bytes);
    assert!(
        tried
            .iter()
            .all(|row| row.held_out_error_mean.is_some() && row.scores.is_none())
    );
    assert_eq!(
        std::fs::read_dir(at("sweep")).unwrap().count(),
        0,
        "outputs are temporary"
    );
    let alone = quantize(&job(&at("alone")), &silent(), &Arc::default()).unwrap();
    assert_eq!(tried[1].output_digest, alone.output_digest);

    let kept = sweep(&swept(true), &silent(), &Arc::default(), |_| ()).unwrap();
    let kl: Vec<f64> = kept
        .iter()
        .map(|row| row.scores.as_ref().unwrap().kl_mean)
        .collect();
    assert!(kl[1] < kl[3] && kl[0] > 0.0, "{kl:?}");
    assert!(
        verify(&at("sweep/w3-g32"), &fixture("model"))
            .unwrap()
            .problems
            .is_empty()
    );
    // A scheme that cannot be is told before the first is tried.
    let wrong = Sweep {
        group_sizes: vec![64, 48],
        base: job(&at("wrong")),
        ..swept(false)
    };
    assert!(sweep(&wrong, &silent(), &Arc::default(), |_| ()).is_err());
    assert!(!at("wrong").exists());
}
