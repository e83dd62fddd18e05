//! Damaged sources are errors that name the tensor, with a way out, and damaged outputs are what `verify` finds.

use super::stored::{Checkpoint, Kind};
use super::{is_linear, job, recipe};
use crate::mixtures::{model, rtn};
use crate::quantize::run;
use quantflow::pipelines::verify::verify;
use quantflow::recipe::Method;
use serde_json::{Value, json};

#[test]
fn damage_is_an_error_that_names_the_tensor_and_leaves_no_output() {
    type Damage = fn(&mut Checkpoint);
    let up = "model.layers.1.mlp.up_proj";
    let damages: [(Kind, Damage, &str, &str); 15] = [
        (
            Kind::Blocks,
            |c| c.drop("weight_scale_inv"),
            "weight_scale_inv nor",
            "download",
        ),
        (Kind::Blocks, |c| c.drop("weight"), "has no tensor", "incomplete"),
        (
            Kind::Blocks,
            |c| c.reshape("weight_scale_inv", |s| s.reverse()),
            "has shape",
            "block size",
        ),
        (
            Kind::Blocks,
            |c| c.reshape("weight", |s| s.reverse()),
            "expected",
            "block size",
        ),
        (
            Kind::Blocks,
            |c| c.bytes("weight", 0x7f),
            "is not a number",
            "download",
        ),
        (
            Kind::Blocks,
            |c| c.bytes("weight_scale_inv", 0xff),
            "element",
            "finite",
        ),
        (
            Kind::Blocks,
            |c| c.config["quantization_config"]["weight_block_size"] = json!([16, 8]),
            "weight_scale_inv: has shape",
            "block size",
        ),
        (
            Kind::Blocks,
            |c| c.config["quantization_config"]["weight_block_size"] = json!([16, 0]),
            "weight_block_size",
            "readable",
        ),
        (
            Kind::Blocks,
            |c| c.config["quantization_config"]["weight_block_size"] = Value::Null,
            "expected",
            "weight_block_size",
        ),
        (
            Kind::Blocks,
            |c| c.config["quantization_config"]["quant_method"] = json!("awq"),
            "\"awq\"",
            "readable are",
        ),
        (
            Kind::Blocks,
            |c| {
                c.config.as_object_mut().unwrap().remove("quantization_config");
            },
            "is F8_E4M3",
            "quantization_config",
        ),
        (
            Kind::Rows,
            |c| c.config["quantization_config"]["kv_cache_scheme"] = json!({"num_bits": 8}),
            "kv_cache_scheme",
            "start from",
        ),
        (
            Kind::Rows,
            |c| c.config["quantization_config"]["transform_config"] = json!({"config_groups": {"u": {}}}),
            "rotated",
            "original",
        ),
        (
            Kind::Bytes,
            |c| c.drop("weight_scale"),
            "weight_scale",
            "incomplete",
        ),
        (
            Kind::Bytes,
            |c| {
                c.config["quantization_config"]["config_groups"]["group_0"]["targets"] = json!(["re:nothing"])
            },
            "no entry of config_groups",
            "original",
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (at, (kind, damage, words, hint)) in damages.into_iter().enumerate() {
        let (coded, plain) = (
            folder.path().join(format!("{at}")),
            folder.path().join(format!("{at}-values")),
        );
        kind.store(&model("llama"), &coded, &plain, &is_linear);
        let mut checkpoint = Checkpoint::read(&coded);
        damage(&mut checkpoint);
        checkpoint.write(&coded);
        let job = job(
            &coded,
            folder.path().join(format!("{at}-out")),
            &recipe(Method::Rtn, true),
        );
        let error = run(&job).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(words), "{at}: {text}");
        assert!(
            text.contains(up) || text.contains("quantization_config") || text.contains("layers.0"),
            "{at}: {text}"
        );
        let told = error.hint().unwrap_or_default();
        assert!(told.contains(hint), "{at}: {text}: {told}");
        assert!(!job.output.join("config.json").exists(), "{at}");
        // What the headers tell is told before anything is written.
        let in_data = words == "is not a number" || words == "element";
        assert_eq!(job.output.exists(), in_data, "{at}: {text}");
    }
}

#[test]
fn a_weight_that_is_there_twice_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut checkpoint = Checkpoint::read(&model("deepseek_v3_w4"));
    let name = "model.layers.1.mlp.experts.0.up_proj.weight";
    let other = checkpoint.tensors["model.layers.1.mlp.shared_experts.up_proj.weight"].clone();
    checkpoint.tensors.insert(name.into(), other);
    let source = folder.path().join("source");
    checkpoint.write(&source);
    let error = run(&rtn(&source, &folder.path().join("out"), 1)).unwrap_err();
    assert!(error.to_string().contains(name), "{error}");
}

#[test]
fn verify_finds_what_is_left_over_and_what_is_not_the_value() {
    let folder = tempfile::tempdir().unwrap();
    let source = model("deepseek_v3_fp8");
    let output = folder.path().join("out");
    let mut job = rtn(&source, &output, 1);
    job.recipe.ignore = vec!["self_attn".into()];
    run(&job).unwrap();
    let whole = Checkpoint::read(&output);
    let problems = |change: fn(&mut Checkpoint)| {
        let mut damaged = whole.clone();
        change(&mut damaged);
        damaged.write(&output);
        let problems = verify(&output, &source).unwrap().problems;
        // The digest differs, too.
        assert!(problems.len() == 2, "{problems:?}");
        problems.join("\n")
    };
    let text = problems(|c| {
        let scale = Checkpoint::read(&model("deepseek_v3_fp8")).tensors["model.layers.0.mlp.up_proj.weight_scale_inv"].clone();
        c.tensors
            .insert("model.layers.0.mlp.up_proj.weight_scale_inv".into(), scale);
    });
    assert!(
        text.contains("up_proj.weight_scale_inv is in no source"),
        "{text}"
    );
    let value = "model.layers.2.self_attn.o_proj.weight";
    let text = problems(|c| {
        c.tensors
            .get_mut("model.layers.2.self_attn.o_proj.weight")
            .unwrap()
            .bytes[0] ^= 1
    });
    assert!(text.contains(&format!("{value} differs")), "{text}");
    let text = problems(|c| drop(c.tensors.remove("model.layers.2.self_attn.o_proj.weight")));
    assert!(text.contains(&format!("{value} is missing")), "{text}");
}
