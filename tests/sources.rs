//! Quantized checkpoints as sources: what is made of them is what is made of their values, written plainly; nothing of the old quantization
//! is left in an output.

#![allow(clippy::disallowed_methods)] // made-up and damaged checkpoints are the point

mod damaged;
pub(crate) mod stored;

use self::stored::{Checkpoint, Kind, values_of};
use crate::mixtures::{compare, model, rtn, windows};
use crate::quantize::run;
use crate::watch::Watch;
use half::bf16;
use quantflow::calibration::{self, Documents};
use quantflow::model::{SiteKind, Tower};
use quantflow::pipelines::job::Job;
use quantflow::pipelines::quantize::quantize;
use quantflow::pipelines::statistics::{self, Change, update};
use quantflow::pipelines::verify::verify;
use quantflow::recipe::{Method, Recipe};
use quantflow::report::{Observer, Silent};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

fn is_linear(name: &str) -> bool {
    name.contains("_proj.") && name.contains("layers.")
}

/// 4 bits in groups of 16, which divide every width of the small models.
fn recipe(method: Method, symmetric: bool) -> Recipe {
    Recipe {
        group_size: 16,
        method,
        symmetric,
        ..Recipe::default()
    }
}

fn job(model: &Path, output: PathBuf, recipe: &Recipe) -> Job {
    let calibration = match recipe.method {
        Method::Gptq => windows("llama"),
        Method::Rtn => Default::default(),
    };
    Job {
        workers: 2,
        calibration,
        ..Job::new(model.to_owned(), output, recipe.clone())
    }
}

/// Runs the recipe on both; their outputs are the same to the byte, and verify. Gives the digest.
fn same_codes(coded: &Path, plain: &Path, folder: &Path, recipe: &Recipe, what: &str) -> String {
    let at = |of: &str| folder.join(format!("{what}-{of}-{:?}", recipe.method));
    let ours = run(&job(coded, at("coded"), recipe)).unwrap_or_else(|error| panic!("{what}: {error}"));
    let theirs = run(&job(plain, at("plain"), recipe)).unwrap();
    assert_eq!(ours.output_digest, theirs.output_digest, "{what}");
    let found = verify(&at("coded"), coded).unwrap();
    assert_eq!(found.problems, Vec::<String>::new(), "{what}");
    assert_eq!(
        (found.quantized, found.dequantized),
        (ours.linears, ours.dequantized)
    );
    // The config speaks of the new scheme alone, as if the source had been plain.
    let config = |of: &str| std::fs::read_to_string(at(of).join("config.json")).unwrap();
    assert_eq!(config("coded"), config("plain"), "{what}");
    ours.output_digest
}

#[test]
fn floats_and_bytes_give_the_codes_of_their_values() {
    let folder = tempfile::tempdir().unwrap();
    let mut digests = Vec::new();
    for kind in Kind::ALL {
        let what = format!("{kind:?}");
        let (coded, plain) = (
            folder.path().join(&what),
            folder.path().join(format!("{what}-values")),
        );
        kind.store(&model("llama"), &coded, &plain, &is_linear);
        for recipe in [recipe(Method::Rtn, true), recipe(Method::Gptq, false)] {
            digests.push(same_codes(&coded, &plain, folder.path(), &recipe, &what));
        }
    }
    let original = run(&job(
        &model("llama"),
        folder.path().join("original"),
        &recipe(Method::Rtn, true),
    ));
    digests.push(original.unwrap().output_digest);
    // Each kind rounds in its own way: had the values been those of another, or of the original, some digest would be there twice.
    let count = digests.len();
    digests.sort();
    digests.dedup();
    assert_eq!(digests.len(), count);
}

#[test]
fn integer_codes_give_the_codes_of_their_values() {
    let folder = tempfile::tempdir().unwrap();
    let schemes = [
        ("compressed-tensors", 4, 16, true),
        ("compressed-tensors", 3, 0, false),
        ("compressed-tensors", 8, 16, false),
        ("gptq", 4, 16, true),
        ("gptq-v2", 4, 0, false),
    ];
    for (format, bits, group_size, symmetric) in schemes {
        let what = format!("{format}-{bits}-{group_size}");
        let coded = folder.path().join(&what);
        let mut first = job(&model("llama"), coded.clone(), &recipe(Method::Rtn, symmetric));
        (first.recipe.bits, first.recipe.group_size) = (bits, group_size);
        first.recipe.format = format.into();
        // 3 bits are packed 32 at a time; the down projections have 48 columns.
        first.recipe.ignore = vec![if bits == 3 { "down_proj" } else { "nothing" }.into()];
        run(&first).unwrap();
        let plain = folder.path().join(format!("{what}-values"));
        values_of(&coded, &plain);
        // Into the layout that it comes from, so that names of old and new tensors meet.
        for method in [Method::Rtn, Method::Gptq] {
            let mut recipe = recipe(method, symmetric);
            recipe.format = format.into();
            same_codes(&coded, &plain, folder.path(), &recipe, &what);
        }
    }
}

/// DeepSeek-V3 in 8-bit floats with its head and a layer beyond the tower (multi-token prediction) in them, too; and its values.
fn deepseek(folder: &Path) -> (PathBuf, PathBuf) {
    let (coded, plain) = (folder.join("deepseek"), folder.join("deepseek-values"));
    let mut checkpoint = Checkpoint::read(&model("deepseek_v3_fp8"));
    let extra = "model.layers.3.eh_proj.weight";
    for part in ["", "_scale_inv"] {
        let tensor = checkpoint.tensors[&format!("model.layers.0.mlp.up_proj.weight{part}")].clone();
        checkpoint.tensors.insert(format!("{extra}{part}"), tensor);
    }
    Kind::Blocks.store_tensor(&mut checkpoint, "lm_head.weight");
    checkpoint.write(&coded);
    values_of(&coded, &plain);
    (coded, plain)
}

#[test]
fn experts_are_solved_as_their_values_are() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["deepseek_v3_fp8", "deepseek_v3_w4"] {
        let plain = folder.path().join(format!("{name}-values"));
        values_of(&model(name), &plain);
        let mut recipe = recipe(Method::Gptq, true);
        (recipe.bits, recipe.group_size) = (8, 0);
        let solved = same_codes(&model(name), &plain, folder.path(), &recipe, name);
        recipe.method = Method::Rtn;
        let rounded = same_codes(&model(name), &plain, folder.path(), &recipe, name);
        assert_ne!(solved, rounded);
    }
}

#[test]
fn what_is_left_alone_is_written_as_its_values_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let (coded, plain) = deepseek(folder.path());
    let scores = compare(&coded, &plain, windows("deepseek_v3_fp8"), 2);
    assert_eq!((scores.kl_mean, scores.top1_agreement), (0.0, 1.0));

    let mut recipe = rtn(&coded, Path::new(""), 1).recipe;
    recipe.ignore = vec!["self_attn".into(), "shared_experts".into()];
    same_codes(&coded, &plain, folder.path(), &recipe, "left-alone");
    let mut again = rtn(&coded, &folder.path().join("again"), 1);
    again.recipe = recipe;
    let watch = Watch::to_the_end();
    let summary = watch
        .over(|observer, halt| quantize(&again, observer, halt))
        .unwrap();
    // Attention's five linears in three layers, the shared expert's three in two, the head, the layer beyond.
    assert_eq!(summary.dequantized, 5 * 3 + 3 * 2 + 1 + 1);
    let notes = watch.seen().notes.join("\n");
    assert!(notes.contains("23 weights") && notes.contains("F32"), "{notes}");

    let output = Checkpoint::read(&again.output);
    assert!(output.tensors.keys().all(|name| !name.contains("scale_inv")));
    let ignored = output.config["quantization_config"]["ignore"].as_array().unwrap();
    let provenance: Value =
        serde_json::from_slice(&std::fs::read(again.output.join("quantflow.json")).unwrap()).unwrap();
    assert!(
        provenance["source_quantization"]
            .as_str()
            .unwrap()
            .contains("blocks of 16 x 16")
    );
    for name in [
        "lm_head",
        "model.layers.3.eh_proj",
        "model.layers.1.self_attn.q_a_proj",
        "model.layers.2.mlp.shared_experts.up_proj",
    ] {
        assert!(ignored.contains(&json!(name)), "{name}");
        let weight = format!("{name}.weight");
        assert!(
            provenance["dequantized"]
                .as_array()
                .unwrap()
                .contains(&json!(weight))
        );
        assert_eq!(output.tensors[&weight].dtype, Dtype::F32);
    }
}

#[test]
fn the_values_have_the_dtype_of_the_models_other_weights() {
    let folder = tempfile::tempdir().unwrap();
    let (coded, plain) = (folder.path().join("coded"), folder.path().join("plain"));
    let source = crate::families::fixtures().join("tiny-vl/model");
    // The vision tower's linears are quantized, too.
    let chosen =
        |name: &str| name.ends_with(".weight") && (is_linear(name) || name.contains("visual.blocks"));
    Kind::Blocks.store(&source, &coded, &plain, &chosen);
    // As some multimodal models are published.
    let mut nested = Checkpoint::read(&coded);
    let quantization = nested.config["quantization_config"].take();
    nested.config["text_config"]["quantization_config"] = quantization;
    nested.write(&coded);
    let mut recipe = recipe(Method::Rtn, true);
    recipe.ignore = vec![r"layers\.1\.".into()];
    for (model, output) in [(&coded, "from-coded"), (&plain, "from-plain")] {
        run(&Job::new(
            model.clone(),
            folder.path().join(output),
            recipe.clone(),
        ))
        .unwrap();
    }
    let found = verify(&folder.path().join("from-coded"), &coded).unwrap();
    assert_eq!(found.problems, Vec::<String>::new());
    let ours = Checkpoint::read(&folder.path().join("from-coded"));
    assert_eq!(
        ours.config["quantization_config"]["quant_method"],
        "compressed-tensors"
    );
    assert_eq!(ours.config["text_config"].get("quantization_config"), None);
    let ours = ours.tensors;
    let theirs = Checkpoint::read(&folder.path().join("from-plain")).tensors;
    assert!(ours.keys().eq(theirs.keys()));
    let mut rounded = 0;
    for (name, ours) in &ours {
        let theirs = &theirs[name];
        if !chosen(name) || ours.shape.len() == 1 {
            assert_eq!(ours, theirs, "{name}");
            continue;
        }
        assert_eq!((ours.dtype, theirs.dtype), (Dtype::BF16, Dtype::F32), "{name}");
        let want: Vec<u8> = theirs
            .values()
            .iter()
            .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
            .collect();
        assert!(ours.bytes == want, "{name}");
        rounded += 1;
    }
    assert_eq!(rounded, found.dequantized);
    assert!(rounded > 7, "the vision tower's and those of layer 1");
}

#[test]
fn tensors_of_all_experts_may_be_floats() {
    let folder = tempfile::tempdir().unwrap();
    for kind in [Kind::Blocks, Kind::Tensor, Kind::Rows] {
        let name = format!("{kind:?}");
        let (coded, plain) = (
            folder.path().join(&name),
            folder.path().join(format!("{name}-values")),
        );
        kind.store(&model("qwen3_vl_moe"), &coded, &plain, &|name| {
            name.contains("mlp.experts.")
        });
        let mut recipe = recipe(Method::Rtn, true);
        (recipe.bits, recipe.group_size) = (8, 0);
        same_codes(&coded, &plain, folder.path(), &recipe, &name);
        recipe.ignore = vec!["experts".into()];
        same_codes(&coded, &plain, folder.path(), &recipe, &format!("{name}-ignored"));
        let output = folder.path().join(format!("{name}-ignored-coded-Rtn"));
        assert_eq!(verify(&output, &coded).unwrap().dequantized, 2 * 2);
    }
}

fn documents() -> Documents {
    let fixture = |name: &str| crate::families::fixtures().join("tiny-vl").join(name);
    let source = calibration::Source {
        names: vec![fixture("data/text_calib.jsonl").display().to_string()],
        samples: 12,
        length: 64,
        ..calibration::Source::default()
    };
    calibration::documents(&source, &fixture("model"), 2048).unwrap()
}

fn collect(model: &Path, folder: &Path) -> statistics::Summary {
    let job = statistics::Job {
        workers: 2,
        ..statistics::Job::new(model.to_owned(), folder.to_owned(), Change::Collect, documents())
    };
    let observer: Arc<dyn Observer> = Arc::new(Silent);
    update(&job, &observer, &Arc::default()).unwrap()
}

#[test]
fn statistics_are_those_of_the_values_and_belong_to_one_source() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let source = crate::families::fixtures().join("tiny-vl/model");
    Kind::Blocks.store(&source, &at("coded"), &at("plain"), &is_linear);
    for of in ["coded", "plain"] {
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(source.join(file), at(of).join(file)).unwrap();
        }
    }
    let ours = collect(&at("coded"), &at("coded-sums"));
    let theirs = collect(&at("plain"), &at("plain-sums"));
    assert_eq!(ours.digest, theirs.digest);
    let solve = |of: &str, output: &str| {
        let artifact = quantflow::artifact::Artifact::open(&at(&format!("{of}-sums"))).unwrap();
        let recipe = Recipe {
            match_original: 0.0,
            ..recipe(Method::Gptq, true)
        };
        let job = Job {
            statistics: Some(Arc::new(artifact)),
            ..Job::new(at(of), at(output), recipe)
        };
        run(&job)
    };
    let digest = solve("coded", "out").unwrap().output_digest;
    assert_eq!(digest, solve("plain", "plain-out").unwrap().output_digest);
    // One scale is part of the model that the statistics are of.
    let mut changed = Checkpoint::read(&at("coded"));
    let scale = "model.language_model.layers.2.mlp.up_proj.weight_scale_inv";
    changed.tensors.get_mut(scale).unwrap().bytes[2] ^= 1;
    changed.write(&at("coded"));
    let error = solve("coded", "refused").unwrap_err();
    assert!(error.to_string().contains("another model"), "{error}");
}

#[test]
fn inspect_and_plan_say_what_the_source_is() {
    let tell = |command: &str, name: &str, more: &[&str]| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_quantflow"));
        let done = program.arg(command).arg(model(name)).args(more).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    };
    let text = tell("inspect", "deepseek_v3_fp8", &[]);
    assert!(text.contains("fp8, blocks of 16 x 16; 72 weights"), "{text}");
    let text = tell("inspect", "deepseek_v3_w4", &[]);
    assert!(text.contains("4-bit int by group of 8; 48 weights"), "{text}");
    assert!(tell("inspect", "deepseek_v3", &[]).contains("not quantized"));
    let flags = ["--method", "rtn", "--group-size", "0", "--ignore", "self_attn"];
    let text = tell("plan", "deepseek_v3_fp8", &flags);
    assert!(text.contains("15 weights that are left alone"), "{text}");
}

#[test]
fn a_reader_of_blocks_takes_what_the_fixture_says() {
    let tower = Tower::open(&model("deepseek_v3_fp8"), candle_core::Device::Cpu).unwrap();
    let spec = &tower.spec.linears(0, SiteKind::Qkv)[0];
    let ours: Vec<f32> = tower.linear(0, spec).unwrap().weight.rows(0..spec.rows).unwrap();
    let folder = tempfile::tempdir().unwrap();
    values_of(&model("deepseek_v3_fp8"), folder.path());
    let slow = &Checkpoint::read(folder.path()).tensors["model.layers.0.self_attn.q_a_proj.weight"];
    assert_eq!(ours, slow.values());
}
