//! Every family's forward pass against transformers in f32 (fixtures/families/make.py): the output of each decoder layer, of the
//! final norm, and the logits.

#![allow(clippy::disallowed_methods, clippy::print_stdout)] // damaged copies are the point; figures are worth a look

use crate::families::fixtures;
use candle_core::{DType, Device, Tensor};
use quantflow::model::{SiteKind, Tower};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// max|a - b| / max|b|: f32 sums in another order through three layers; observed are 3.3e-6 and less.
const TOLERANCE: f32 = 1e-5;
/// What leaving out a family's peculiarity must exceed: ten times what is tolerated. The weakest, Gemma's embedding scale
/// rounded to another dtype, gives 3.3e-4; all others give more than 0.09.
const NOTICED: f32 = 1e-4;
/// [`TOLERANCE`] for rotary frequencies, where torch and Rust round powers differently.
const FREQUENCY_TOLERANCE: f32 = 4e-7;

fn difference(ours: &Tensor, golden: &Tensor) -> f32 {
    let ours: Vec<f32> = ours.flatten_all().unwrap().to_vec1().unwrap();
    let golden: Vec<f32> = golden.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(ours.len(), golden.len());
    let pairs = ours.iter().zip(&golden);
    let worst = pairs
        .map(|(a, b)| if a.is_nan() { f32::INFINITY } else { (a - b).abs() })
        .fold(0.0, f32::max);
    worst / golden.iter().fold(0.0, |max: f32, b| max.max(b.abs()))
}

/// Runs the fixture in `folder` and gives (what, difference) for all that the golden file holds.
fn differences(folder: &Path) -> Vec<(String, f32)> {
    let golden: HashMap<String, Tensor> =
        candle_core::safetensors::load(folder.join("golden.safetensors"), &Device::Cpu).unwrap();
    let tower = Tower::open(folder, Device::Cpu).unwrap();
    let (_, length) = golden["tokens"].dims2().unwrap();
    let tokens: Vec<u32> = golden["tokens"]
        .to_dtype(DType::U32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();

    let mut found = Vec::new();
    for (k, rope) in tower.spec.block.ropes.iter().enumerate() {
        let ours = Tensor::new(rope.inverse_frequencies.as_slice(), &Device::Cpu).unwrap();
        found.push((
            format!("inv_freq_{k}"),
            difference(&ours, &golden[&format!("inv_freq_{k}")]),
        ));
        let ours = Tensor::new(&[rope.attention_factor], &Device::Cpu).unwrap();
        found.push((
            format!("attention_factor_{k}"),
            difference(&ours, &golden[&format!("attention_factor_{k}")]),
        ));
    }
    let rotary = tower.rotary(length).unwrap();
    let mut residual = tower.embed(&tokens).unwrap();
    for i in 0..tower.blocks() {
        let block = tower.block(i, &rotary).unwrap();
        residual = block
            .forward(&residual, length, &|linear| tower.linear(i, linear))
            .unwrap();
        let name = format!("hidden_{i}");
        found.push((name.clone(), difference(&residual, &golden[&name])));
    }
    found.push((
        "hidden".into(),
        difference(&tower.final_norm(&residual).unwrap(), &golden["hidden"]),
    ));
    found.push((
        "logits".into(),
        difference(&tower.logits(&residual).unwrap(), &golden["logits"]),
    ));
    assert_eq!(
        found.len() + 1,
        golden.len(),
        "all of the golden file is compared, but for its tokens"
    );
    found
}

#[test]
fn forward_is_that_of_transformers() {
    let mut wrong = Vec::new();
    let mut folders: Vec<_> = std::fs::read_dir(fixtures().join("families"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    assert!(folders.len() >= 21);
    for folder in folders {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let found = differences(&folder);
        let line: Vec<_> = found.iter().map(|(what, d)| format!("{what} {d:.1e}")).collect();
        println!("{name}: {}", line.join(", "));
        for (what, d) in found {
            let tolerance = if what.starts_with("inv_freq") {
                FREQUENCY_TOLERANCE
            } else {
                TOLERANCE
            };
            if d.is_nan() || d > tolerance {
                wrong.push(format!("{name} {what}: {d:.1e}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn copied(name: &str) -> tempfile::TempDir {
    let source = fixtures().join("families").join(name);
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&source).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

fn worst(folder: &Path) -> f32 {
    let found = differences(folder);
    let shown = found
        .iter()
        .filter(|(what, _)| what.starts_with("hidden") || what == "logits");
    shown.map(|(_, d)| *d).fold(0.0, f32::max)
}

/// Rewrites the weights of a copy.
fn rewrite(folder: &Path, change: impl Fn(&mut HashMap<String, Tensor>)) {
    let path = folder.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// As [`fixtures_notice_what_is_left_out`], for what no config can leave out.
#[test]
fn fixtures_notice_weights_that_are_left_out() {
    let cases = [
        ("qwen2_moe", "shared_expert.down_proj.weight", 0.0),
        ("qwen2_moe", "shared_expert_gate.weight", 0.0),
        ("qwen2_moe", "self_attn.q_proj.bias", 0.0),
        ("deepseek_v2", "shared_experts.down_proj.weight", 0.0),
        ("deepseek_v2", "kv_a_proj_with_mqa.bias", 0.0),
        ("deepseek_v2", "q_a_layernorm.weight", 1.0),
        ("deepseek_v3", "e_score_correction_bias", 0.0),
        ("deepseek_v3", "kv_a_layernorm.weight", 1.0),
        ("gpt_oss", "self_attn.sinks", -100.0),
        ("gpt_oss", "router.bias", 0.0),
        ("gpt_oss", "gate_up_proj_bias", 0.0),
        ("gpt_oss", "down_proj_bias", 0.0),
    ];
    for (name, ending, value) in cases {
        let copy = copied(name);
        rewrite(copy.path(), |tensors| {
            for tensor in tensors.iter_mut().filter(|(name, _)| name.ends_with(ending)) {
                *tensor.1 = (tensor.1.zeros_like().unwrap() + value).unwrap();
            }
        });
        let worst = worst(copy.path());
        println!("{name} without {ending}: {worst:.1e}");
        assert!(worst > NOTICED, "{name} without {ending}: only {worst:.1e}");
    }
}

/// Experts are read from separate tensors, and from tensors of all experts in either orientation.
#[test]
fn experts_are_read_in_every_layout() {
    let turned = copied("qwen3_vl_moe");
    rewrite(turned.path(), |tensors| {
        for tensor in tensors
            .iter_mut()
            .filter(|(name, _)| name.contains(".mlp.experts."))
        {
            *tensor.1 = tensor.1.transpose(1, 2).unwrap().contiguous().unwrap();
        }
    });
    assert!(worst(turned.path()) <= TOLERANCE, "[experts, out, in]");

    // Mixtral as transformers has it in memory.
    let fused = copied("mixtral");
    rewrite(fused.path(), |tensors| {
        for layer in 0..3 {
            let old = format!("model.layers.{layer}.block_sparse_moe");
            let new = format!("model.layers.{layer}.mlp");
            let mut take = |name: String| tensors.remove(&name).unwrap();
            let router = take(format!("{old}.gate.weight"));
            let mut expert = |e: usize, w: &str| take(format!("{old}.experts.{e}.{w}.weight"));
            let pairs: Vec<Tensor> = (0..6)
                .map(|e| Tensor::cat(&[expert(e, "w1"), expert(e, "w3")], 0).unwrap())
                .collect();
            let downs: Vec<Tensor> = (0..6).map(|e| expert(e, "w2")).collect();
            tensors.insert(format!("{new}.gate.weight"), router);
            tensors.insert(
                format!("{new}.experts.gate_up_proj"),
                Tensor::stack(&pairs, 0).unwrap(),
            );
            tensors.insert(
                format!("{new}.experts.down_proj"),
                Tensor::stack(&downs, 0).unwrap(),
            );
        }
    });
    assert!(
        worst(fused.path()) <= TOLERANCE,
        "Mixtral's experts in one tensor"
    );

    // A tensor of all experts of another shape is refused by name.
    rewrite(fused.path(), |tensors| {
        let name = "model.layers.1.mlp.experts.down_proj";
        let narrow = tensors[name].narrow(2, 0, 20).unwrap().contiguous().unwrap();
        tensors.insert(name.into(), narrow);
    });
    let tower = Tower::open(fused.path(), Device::Cpu).unwrap();
    let down = &tower.spec.linears(1, SiteKind::ExpertDown(0))[0];
    let error = tower.linear(1, down).unwrap_err().to_string();
    assert!(
        error.contains("model.layers.1.mlp.experts.down_proj: has shape"),
        "{error}"
    );
}

/// Each peculiarity shows in the fixtures: with a config that lacks it, the hidden states or logits are others.
#[test]
fn fixtures_notice_what_is_left_out() {
    // Without the magnitude that only the attention's scale has.
    let yarn = json!({"rope_type": "yarn", "factor": 40.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16, "attention_factor": 1.0});
    let default = json!({"rope_type": "default", "rope_theta": 10000.0});
    let cases = [
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}),
        ),
        ("llama", json!({"hidden_act": "gelu_pytorch_tanh"})),
        ("llama", json!({"rms_norm_eps": 0.1})),
        ("llama_bias", json!({"rope_parameters": default})),
        ("mistral", json!({"sliding_window": null})),
        ("mistral", json!({"sliding_window": 6})),
        ("qwen2", json!({"use_sliding_window": false, "layer_types": null})),
        ("qwen2", json!({"max_window_layers": 0, "layer_types": null})),
        (
            "qwen3",
            json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}),
        ),
        (
            "qwen3",
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ),
        ("gemma2", json!({"attn_logit_softcapping": null})),
        ("gemma2", json!({"final_logit_softcapping": null})),
        ("gemma2", json!({"query_pre_attn_scalar": 16})),
        ("gemma2", json!({"sliding_window": 100})),
        ("gemma2", json!({"dtype": "bfloat16"})),
        ("gemma3_text", json!({"sliding_window": 100})),
        (
            "gemma3_text",
            json!({"rope_parameters": {"sliding_attention": {"rope_theta": 100.0}}}),
        ),
        (
            "gemma3_text",
            json!({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}),
        ),
        (
            "phi3",
            json!({"rope_parameters": {"partial_rotary_factor": 0.75}}),
        ),
        ("phi3", json!({"original_max_position_embeddings": 256})),
        (
            "qwen3_vl",
            json!({"text_config": {"rope_parameters": {"rope_theta": 10.0}}}),
        ),
        ("mixtral", json!({"num_experts_per_tok": 1})),
        ("mixtral", json!({"num_experts_per_tok": 3})),
        ("qwen2_moe", json!({"norm_topk_prob": true})),
        ("qwen3_moe", json!({"norm_topk_prob": false})),
        ("qwen3_vl_moe", json!({"text_config": {"num_experts_per_tok": 3}})),
        ("deepseek_v2", json!({"topk_method": "greedy"})),
        ("deepseek_v2", json!({"topk_group": 3})),
        ("deepseek_v2", json!({"routed_scaling_factor": 1.0})),
        ("deepseek_v2_lite", json!({"rope_parameters": yarn})),
        ("deepseek_v3", json!({"topk_group": 4})),
        ("deepseek_v3", json!({"norm_topk_prob": false})),
        ("deepseek_v3", json!({"routed_scaling_factor": 1.0})),
        ("deepseek_v3", json!({"rope_interleave": false})),
        ("gpt_oss", json!({"swiglu_limit": 7.0})),
        ("gpt_oss", json!({"swiglu_alpha": 1.0})),
        ("gpt_oss", json!({"sliding_window": 100})),
    ];
    for (name, changes) in cases {
        let copy = copied(name);
        let path = copy.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        merge(&mut config, &changes);
        std::fs::write(&path, config.to_string()).unwrap();
        let worst = worst(copy.path());
        println!("{name} with {changes}: {worst:.1e}");
        assert!(worst > NOTICED, "{name} with {changes}: only {worst:.1e}");
    }
}

/// Sets the keys of `changes`; inside of `text_config`, those that it names. Other objects are replaced whole.
fn merge(config: &mut Value, changes: &Value) {
    for (key, value) in changes.as_object().unwrap() {
        match key.as_str() {
            "text_config" => merge(&mut config[key], value),
            _ => config[key] = value.clone(),
        }
    }
}
