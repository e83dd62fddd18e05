//! Whole runs on the tiny multimodal model: same bytes however it is run, resumable, nothing half-written.

use crate::watch::Watch;
use candle_core::{Device, Tensor};
use quantflow::calibration::{self, Calibration, Source};
use quantflow::device::Placement;
use quantflow::error::{Error, Result};
use quantflow::pipelines::evaluate::{Evaluation, evaluate};
use quantflow::pipelines::job::{Job, Summary};
use quantflow::pipelines::quantize::quantize;
use quantflow::pipelines::verify::verify;
use quantflow::plan::Fit;
use quantflow::recipe::{Method, Recipe};
use quantflow::report::{Observer, Row, Silent};
use quantflow::storage;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-vl")
}

pub(crate) fn calibrate(samples: usize, length: usize) -> Calibration {
    let source = Source {
        names: vec![fixture().join("data/text_calib.jsonl").display().to_string()],
        samples,
        length,
        ..Source::default()
    };
    calibration::load(&source, &fixture().join("model"), 2048).unwrap()
}

pub(crate) fn job(output: &Path) -> Job {
    Job {
        recipe: Recipe {
            group_size: 64,
            ..Recipe::default()
        },
        calibration: calibrate(6, 128),
        workers: 2,
        ..Job::new(fixture().join("model"), output.to_owned(), Recipe::default())
    }
}

pub(crate) fn run(job: &Job) -> Result<Summary> {
    let observer: Arc<dyn Observer> = Arc::new(Silent);
    let summary = quantize(job, &observer, &Arc::default())?;
    let (asked, planned) = (summary.asked_peak_host_bytes, summary.plan_peak_host_bytes);
    assert!(
        asked <= planned,
        "asked for {asked} bytes where {planned} were planned"
    );
    Ok(summary)
}

#[test]
fn the_output_is_the_same_for_any_number_of_workers_and_any_order_of_arrival() {
    let folder = tempfile::tempdir().unwrap();
    for recipe in [
        Recipe {
            group_size: 64,
            ..Recipe::default()
        },
        Recipe {
            group_size: 0,
            bits: 3,
            symmetric: false,
            match_original: 0.0,
            ..Recipe::default()
        },
    ] {
        let digest = |workers: usize, arrival: Option<Vec<usize>>| {
            let job = Job {
                recipe: recipe.clone(),
                workers,
                arrival,
                fresh: true,
                ..job(&folder.path().join("out"))
            };
            run(&job).unwrap().output_digest
        };
        let batches = calibrate(6, 128).batches.len();
        assert!(batches >= 2, "an order needs more than one batch");
        let one = digest(1, None);
        assert_eq!(one, digest(2, None));
        assert_eq!(one, digest(4, None));
        assert_eq!(one, digest(2, Some((0..batches).rev().collect())));
    }
}

/// The budget that holds all matrices, and no activations; a tenth is left to the allocator.
pub(crate) fn without_activations(fit: &Fit) -> u64 {
    (fit.peak_host_bytes - fit.resident_activation_bytes).div_ceil(9) * 10
}

/// The smallest budget that would do, as the refusal of a smaller one names it.
pub(crate) fn named_budget(refusal: &Error) -> u64 {
    let hint = refusal.hint().unwrap();
    let mut words = hint.split_whitespace();
    words.find_map(|word| word.parse().ok()).unwrap()
}

#[test]
fn what_spills_changes_nothing_and_the_smallest_budget_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let resident = run(&job(&folder.path().join("a"))).unwrap();
    let with = |name: &str, memory: u64| Job {
        memory: Some(memory),
        ..job(&folder.path().join(name))
    };
    let (_, plan) = job(folder.path()).plan().unwrap();
    let fit = |memory: u64| with("fit", memory).fit(&plan);
    let spilled = |memory: u64| fit(memory).unwrap().spilled.iter().filter(|s| **s).count();
    // Enough for every step, and nothing for activations.
    let fixed = without_activations(&job(folder.path()).fit(&plan).unwrap());
    assert_eq!(spilled(fixed), 0);
    let without_activations = run(&with("b", fixed)).unwrap();
    assert_eq!(resident.output_digest, without_activations.output_digest);
    // Less: matrices lie in files, too.
    let refusal = fit(1).unwrap_err();
    let smallest = named_budget(&refusal);
    assert!(smallest < fixed && spilled(smallest) > 0, "{smallest} {fixed}");
    let without_matrices = run(&with("c", smallest)).unwrap();
    assert_eq!(resident.output_digest, without_matrices.output_digest);
    assert!(run(&with("d", smallest - 1)).unwrap_err().hint() == refusal.hint());
    assert!(!folder.path().join("d").exists());
}

#[test]
fn a_continued_run_keeps_to_the_smallest_budget() {
    let folder = tempfile::tempdir().unwrap();
    let whole = run(&job(&folder.path().join("whole"))).unwrap();
    for workers in [1, 4] {
        let mut parts = Job {
            workers,
            ..job(&folder.path().join(format!("{workers}")))
        };
        let (_, plan) = parts.plan().unwrap();
        parts.memory = Some(1);
        parts.memory = Some(named_budget(&parts.fit(&plan).unwrap_err()));
        let most = whole.linears / 2;
        let broken = Watch::until(move |seen| seen.linears > most)
            .over(|observer, halt| quantize(&parts, observer, halt));
        assert!(matches!(broken, Err(Error::Interrupted)));
        // What is asked for is held against the budget: more would be refused.
        let rest = run(&parts).unwrap();
        assert!(rest.resumed_blocks >= 1);
        assert_eq!(rest.output_digest, whole.output_digest, "{workers} workers");
    }
}

#[test]
fn a_budget_for_a_device_that_is_not_used_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let mut refused = command("", &output);
    let refused = refused
        .args(["--device", "cpu", "--device-memory", "1GiB"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{text}");
    assert!(
        text.contains("--device-memory") && text.contains("runs on the CPU"),
        "{text}"
    );
    assert!(!output.exists());
}

/// The Llama fixture with an MLP of 1,920 channels: ten panels.
fn wide(folder: &Path) {
    let llama = fixture().parent().unwrap().join("families/llama");
    let config = std::fs::read_to_string(llama.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["intermediate_size"] = 1920.into();
    storage::write_json(&folder.join("config.json"), &config).unwrap();
    let mut tensors = candle_core::safetensors::load(llama.join("model.safetensors"), &Device::Cpu).unwrap();
    for (name, tensor) in &mut tensors {
        let (rows, columns) = match tensor.dims() {
            [_, columns] if name.contains("gate_proj") || name.contains("up_proj") => (1920, *columns),
            [rows, _] if name.contains("down_proj") => (*rows, 1920),
            _ => continue,
        };
        let values: Vec<f32> = (0..rows * columns)
            .map(|i| ((i * 37 + i / 7) % 101) as f32 / 500.0 - 0.1)
            .collect();
        *tensor = Tensor::from_vec(values, (rows, columns), &Device::Cpu)
            .and_then(|values| values.to_dtype(tensor.dtype()))
            .unwrap();
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

#[test]
fn wide_matrices_lie_in_files_whole_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    storage::create_folder(&model).unwrap();
    wide(&model);
    let tokens: Vec<u32> = (0..4 * 24).map(|i| 3 + i * 7 % 61).collect();
    let job = |name: &str, memory| Job {
        calibration: Calibration {
            batches: calibration::batches(&tokens, 24),
            ..Calibration::default()
        },
        workers: 2,
        memory,
        ..Job::new(
            model.clone(),
            folder.path().join(name),
            Recipe {
                group_size: 0,
                match_original: 0.0,
                ..Recipe::default()
            },
        )
    };
    let (_, plan) = job("a", None).plan().unwrap();
    let fit = |memory| job("a", memory).fit(&plan);
    let fixed = without_activations(&fit(None).unwrap());
    let smallest = named_budget(&fit(Some(1)).unwrap_err());
    let (none, some) = (fit(Some(fixed)).unwrap(), fit(Some(smallest)).unwrap());
    assert!(smallest < fixed && none.spilled.iter().all(|spilled| !spilled));
    // All of XᵀX and half of a factor, in f64, and no less activations than before.
    let matrices = some.scratch_bytes + some.resident_activation_bytes - none.scratch_bytes;
    assert!(matrices >= 1920 * 1920 * (8 + 4), "{matrices}");
    let digest = |job: &Job| run(job).unwrap().output_digest;
    assert_eq!(digest(&job("a", None)), digest(&job("b", Some(smallest))));
}

#[test]
fn every_format_and_method_is_verified_and_better_than_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for (format, method) in [
        ("compressed-tensors", Method::Gptq),
        ("gptq", Method::Gptq),
        ("gptq-v2", Method::Rtn),
    ] {
        let output = folder.path().join(format);
        let recipe = Recipe {
            group_size: 64,
            format: format.into(),
            method,
            ..Recipe::default()
        };
        // Small shards, so that an index is written and read.
        let summary = run(&Job {
            recipe,
            shard_bytes_max: 2_000_000,
            ..job(&output)
        })
        .unwrap();
        assert_eq!(summary.linears, 35);
        let found = verify(&output, &fixture().join("model")).unwrap();
        assert_eq!(found.problems, Vec::<String>::new());
        assert_eq!(
            (found.quantized, &found.output_digest),
            (35, &summary.output_digest)
        );
        assert!(output.join("model.safetensors.index.json").exists());
        assert!(!output.join(".quantflow").exists());
        let windows = calibration::read_texts(
            &fixture().join("data/text_eval.jsonl"),
            &fixture().join("model"),
            128,
            2048,
        );
        let mut windows = windows.unwrap();
        windows.batches.truncate(4);
        let job = Evaluation {
            model: output,
            reference: fixture().join("model"),
            windows,
            workers: 2,
            placement: Placement::cpu(),
        };
        let observer: Arc<dyn Observer> = Arc::new(Silent);
        let scores = evaluate(job, &observer, &Arc::default()).unwrap();
        // Four bits cost this model about 1 % of perplexity; a wrong bit order costs all of it.
        assert!(
            scores.kl_mean > 0.0 && scores.kl_mean < 0.05,
            "{format}: {}",
            scores.kl_mean
        );
        assert!(scores.top1_agreement > 0.85);
    }
}

#[test]
fn what_verify_is_for_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    run(&Job {
        recipe: Recipe {
            method: Method::Rtn,
            group_size: 64,
            ..Recipe::default()
        },
        ..job(&output)
    })
    .unwrap();
    let found = || verify(&output, &fixture().join("model")).unwrap();
    assert!(found().problems.is_empty() && found().changed_files.is_empty());

    // Who changes a file beside the weights may mean it; who loses one does not.
    storage::write_whole(&output.join("chat_template.json"), b"{}").unwrap();
    assert_eq!(found().changed_files, ["chat_template.json"]);
    assert!(found().problems.is_empty());
    storage::remove(&output.join("tokenizer.json")).unwrap();
    assert_eq!(found().problems, ["tokenizer.json is missing"]);

    let file = output.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x40;
    storage::write_whole(&file, &bytes).unwrap();
    assert!(found().problems.len() > 1);
}

#[test]
fn progress_ends_where_the_work_does() {
    let folder = tempfile::tempdir().unwrap();
    let recipes = [
        Recipe::default(),
        Recipe {
            ignore: vec!["gate_proj".into(), "layers.1.".into()],
            match_original: 0.0,
            ..Recipe::default()
        },
        Recipe {
            method: Method::Rtn,
            ..Recipe::default()
        },
    ];
    for (number, recipe) in recipes.into_iter().enumerate() {
        let job = Job {
            recipe,
            ..job(&folder.path().join(number.to_string()))
        };
        let broken = Watch::until(|seen| seen.linears > 20);
        broken
            .over(|observer, halt| quantize(&job, observer, halt))
            .unwrap_err();
        let rest = Watch::to_the_end();
        let summary = rest
            .over(|observer, halt| quantize(&job, observer, halt))
            .unwrap();
        assert!(summary.resumed_blocks > 0);
        rest.assert_all_told("quantize");
        let whole = Watch::to_the_end();
        let again = Job { fresh: true, ..job };
        whole
            .over(|observer, halt| quantize(&again, observer, halt))
            .unwrap();
        whole.assert_all_told("quantize");
    }
}

#[test]
fn an_interrupted_run_continues_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let whole = run(&job(&folder.path().join("whole"))).unwrap();
    let output = folder.path().join("parts");
    for linears in [0, 8, 17] {
        let broken = Watch::until(move |seen| seen.linears > linears)
            .over(|observer, halt| quantize(&job(&output), observer, halt));
        assert!(matches!(broken, Err(Error::Interrupted)));
        assert!(
            !output.join("config.json").exists(),
            "an unfinished output must not load"
        );
    }
    let other = Job {
        recipe: Recipe {
            bits: 8,
            ..job(&output).recipe
        },
        ..job(&output)
    };
    assert!(run(&other).unwrap_err().to_string().contains("another recipe"));
    let rest = run(&job(&output)).unwrap();
    assert!(rest.resumed_blocks >= 2, "{}", rest.resumed_blocks);
    assert_eq!(rest.output_digest, whole.output_digest);
    let again = run(&job(&output)).unwrap_err();
    assert!(again.to_string().contains("finished"), "{again}");
}

fn finished(output: &Path) -> bool {
    output.join("config.json").exists() && !output.join(".quantflow").exists()
}

/// The command that the tests below break off, in a shell line that may limit it first.
fn command(prelude: &str, output: &Path) -> Command {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{prelude} exec \"$@\"")).arg("sh");
    command.arg(env!("CARGO_BIN_EXE_quantflow"));
    command.arg("quantize").arg(fixture().join("model"));
    command
        .arg("--calibration")
        .arg(fixture().join("data/text_calib.jsonl"));
    command.arg("-o").arg(output);
    command.args("--samples 12 --length 128 --group-size 64 --json".split(' '));
    command
}

fn finished_digest(output: &Path) -> String {
    let result = command("", output).output().unwrap();
    assert!(
        result.status.success(),
        "{}",
        String::from_utf8_lossy(&result.stderr)
    );
    let summary: serde_json::Value = serde_json::from_slice(&result.stdout).unwrap();
    summary["output_digest"].as_str().unwrap().to_owned()
}

/// `kill -9` at random moments, then the same command to the end.
#[test]
fn a_killed_run_continues_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let begin = std::time::Instant::now();
    let whole = finished_digest(&folder.path().join("whole"));
    let taken = begin.elapsed();
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = seed.unwrap().as_nanos() as u64;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let output = folder.path().join("killed");
    // Each attempt begins where the last one got to.
    for _ in 0..6 {
        let mut child = command("", &output)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let moment = taken.mul_f64(f64::from(random.next_u32()) / f64::from(u32::MAX));
        std::thread::sleep(moment);
        child.kill().unwrap();
        child.wait().unwrap();
        if finished(&output) {
            break;
        }
    }
    if !finished(&output) {
        assert_eq!(finished_digest(&output), whole, "seed {seed}");
    }
    assert_eq!(
        verify(&output, &fixture().join("model")).unwrap().output_digest,
        whole,
        "seed {seed}"
    );
}

/// A write that fails part of the way, as on a full disk: a file may not grow beyond a limit.
#[test]
fn a_failed_write_is_an_error_that_names_the_file_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let whole = finished_digest(&folder.path().join("whole"));
    let output = folder.path().join("limited");
    // The largest size of a file, in blocks of 512 bytes; each attempt gets further.
    for blocks in [0, 2, 64, 512] {
        let result = command(&format!("trap '' XFSZ; ulimit -f {blocks};"), &output)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&result.stderr);
        assert_eq!(result.status.code(), Some(1), "{blocks}: {text}");
        assert!(text.contains(&*output.to_string_lossy()), "{blocks}: {text}");
        assert!(
            !output.join("config.json").exists(),
            "{blocks}: it looks finished"
        );
    }
    assert_eq!(finished_digest(&output), whole);
}

#[test]
fn an_output_that_cannot_be_made_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    storage::write_whole(&file, b"not a folder").unwrap();
    for output in [file.join("out"), file.clone()] {
        let result = command("", &output).output().unwrap();
        let text = String::from_utf8_lossy(&result.stderr);
        assert_eq!(result.status.code(), Some(1), "{text}");
        assert!(text.contains(&*output.to_string_lossy()), "{text}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"not a folder");
}

#[test]
fn bad_input_is_an_error_with_a_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let check = |job: Job, expect: &str, hint: &str| {
        let error = run(&job).unwrap_err();
        assert!(error.to_string().contains(expect), "{error}");
        assert!(
            error.hint().unwrap_or_default().contains(hint),
            "{error}: {:?}",
            error.hint()
        );
        assert!(!job.output.join(".quantflow").exists());
    };
    let fresh = |name: &str| job(&folder.path().join(name));
    let recipe = |change: fn(&mut Recipe)| {
        let mut recipe = fresh("x").recipe;
        change(&mut recipe);
        recipe
    };
    check(
        Job {
            recipe: recipe(|r| r.group_size = 96),
            ..fresh("a")
        },
        "96 does not divide the 256",
        "64, 128",
    );
    check(
        Job {
            recipe: recipe(|r| r.format = "gguf".into()),
            ..fresh("b")
        },
        "gguf",
        "compressed-tensors",
    );
    check(
        Job {
            model: folder.path().join("none"),
            ..fresh("c")
        },
        "not a directory",
        "config.json",
    );
    check(
        Job {
            output: fixture().join("model"),
            ..fresh("d")
        },
        "the checkpoint itself",
        "another",
    );
    check(
        Job {
            output: fixture().join("data"),
            ..fresh("e")
        },
        "not an output of quantflow",
        "empty folder",
    );
    let fallback = recipe(|r| {
        r.group_size = 96;
        r.group_fallback = true;
        r.method = Method::Rtn;
    });
    let summary = run(&Job {
        recipe: fallback,
        ..fresh("f")
    })
    .unwrap();
    assert_eq!(summary.fallbacks, 35);
    let report = std::fs::read_to_string(summary.output.join("quantization_report.jsonl")).unwrap();
    assert!(
        report
            .lines()
            .all(|line| line.contains("group_size 64: 96 does not divide"))
    );
}

#[test]
fn schemes_of_single_linears_reach_the_file_and_the_config() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mixed.toml");
    let recipe = |text: &str| {
        storage::write_whole(&path, text.as_bytes()).unwrap();
        Recipe::find(&path.display().to_string())
    };
    let mixed = "bits = 3\ngroup_size = 64\nmatch_original = 0.0\n[[scheme]]\ntargets = ['layers\\.0\\.', 'down_proj$']\nbits = 4\n";
    let job = |name: &str, recipe| Job {
        recipe,
        ..job(&folder.path().join(name))
    };
    for format in ["compressed-tensors", "gptq-v2"] {
        let recipe = Recipe {
            format: format.into(),
            ..recipe(mixed).unwrap()
        };
        let job = job(format, recipe);
        run(&job).unwrap();
        let found = verify(&job.output, &job.model).unwrap();
        assert_eq!((found.problems, found.quantized), (Vec::new(), 35));
        let report = std::fs::read_to_string(job.output.join("quantization_report.jsonl")).unwrap();
        for line in report.lines() {
            let row: Row = serde_json::from_str(line).unwrap();
            let four = row.name.contains("layers.0.") || row.name.ends_with("down_proj");
            let expected = if four { "W4" } else { "W3" };
            assert!(row.scheme.starts_with(expected), "{row:?}");
        }
    }
    let refused = |text: &str, words: &str| {
        let error = recipe(text)
            .and_then(|recipe| job("refused", recipe).plan().map(drop))
            .unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    };
    refused(
        "group_size = 64\n[[scheme]]\ntargets = ['q_proj']\nbits = 8\n",
        "vLLM fuses them",
    );
    refused(
        "group_size = 64\n[[scheme]]\ntargets = ['nosuch']\nbits = 8\n",
        "matches no linear",
    );
    refused("group_size = 64\n[[scheme]]\ntargets = ['(']\n", "targets");
    refused("group_size = 64\n[[scheme]]\nbits = 8\n", "targets");
    refused(
        "group_size = 64\n[[scheme]]\ntargets = ['.']\nbits = 5\n",
        "2, 3, 4 or 8",
    );
}
