//! GPTQ of mixtures and latent attention: better than rounding, the same bytes however it is run, and every expert accounted for.

use super::{FAMILIES, compare, model, read_rows, recipe, text};
use crate::quantize::{named_budget, run, without_activations};
use crate::watch::Watch;
use quantflow::calibration::Calibration;
use quantflow::error::Error;
use quantflow::pipelines::job::Job;
use quantflow::pipelines::quantize::quantize;
use quantflow::pipelines::verify::verify;
use quantflow::recipe::{Method, Recipe};
use quantflow::report::Row;
use std::path::Path;

fn gptq(name: &str, output: &Path, calibration: Calibration) -> Job {
    Job {
        calibration,
        workers: 2,
        ..Job::new(model(name), output.to_owned(), recipe(name, 0.5))
    }
}

#[test]
fn every_family_is_verified_and_better_than_rounding() {
    let folder = tempfile::tempdir().unwrap();
    for name in FAMILIES {
        let calibration = text(64, 24, 1);
        let score = |kind: &str, recipe: Recipe| {
            let output = folder.path().join(format!("{name}-{kind}"));
            let job = Job {
                recipe,
                ..gptq(name, &output, calibration.clone())
            };
            let summary = run(&job).unwrap();
            let found = verify(&output, &model(name)).unwrap();
            assert_eq!(found.problems, Vec::<String>::new(), "{name}");
            assert_eq!(found.quantized, summary.linears, "{name}");
            compare(&output, &model(name), text(8, 24, 2), 2).kl_mean
        };
        let method = Method::Rtn;
        let rounded = score(
            "rtn",
            Recipe {
                method,
                ..recipe(name, 0.0)
            },
        );
        let plain = score("gptq", recipe(name, 0.0));
        let matched = score("matched", recipe(name, 0.5));
        assert!(
            plain < rounded && matched < rounded,
            "{name}: {rounded} {plain} {matched}"
        );
    }
}

#[test]
fn the_output_is_the_same_for_any_workers_groups_and_order() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["qwen2_moe", "deepseek_v2_lite", "deepseek_v3", "qwen3_vl_moe"] {
        // Few tokens, so that some experts borrow; many batches, so that there is an order.
        let calibration = text(44, 24, 3);
        let batches = calibration.batches.len();
        assert!(batches > 1);
        let job = Job {
            fresh: true,
            ..gptq(name, &folder.path().join(name), calibration)
        };
        let (_, plan) = job.plan().unwrap();
        // The least budget holds fewer experts at a time.
        let refusal = run(&Job {
            memory: Some(1),
            ..job.clone()
        })
        .unwrap_err();
        let tight = Job {
            memory: Some(named_budget(&refusal)),
            ..job.clone()
        };
        let (_, alone) = tight.plan().unwrap();
        let experts = if name.starts_with("deep") { 8 } else { 6 };
        assert_eq!(plan.experts_per_step(), experts);
        // But where the experts are so small that other steps decide.
        let smaller = alone.experts_per_step() < experts && plan.steps() < alone.steps();
        assert!(smaller || name == "qwen3_vl_moe", "{name}");
        let whole = run(&job).unwrap().output_digest;
        assert_eq!(
            run(&tight).unwrap().output_digest,
            whole,
            "{name}: few experts at a time"
        );
        for workers in [1, 4] {
            let digest = run(&Job {
                workers,
                ..job.clone()
            })
            .unwrap()
            .output_digest;
            assert_eq!(digest, whole, "{name}: {workers} workers");
        }
        let arrival = Some((0..batches).rev().collect());
        assert_eq!(
            run(&Job { arrival, ..job }).unwrap().output_digest,
            whole,
            "{name}: reversed"
        );
    }
}

#[test]
fn an_interrupted_run_continues_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["mixtral", "deepseek_v3"] {
        let calibration = text(24, 24, 4);
        let at = |part: &str| folder.path().join(format!("{name}-{part}"));
        let whole = run(&gptq(name, &at("whole"), calibration.clone())).unwrap();
        let job = gptq(name, &at("parts"), calibration);
        // In the first block, in the middle of the second one's experts, and in the third.
        for linears in [3, whole.linears / 2, whole.linears / 3 + 2] {
            let broken = Watch::until(move |seen| seen.linears > linears)
                .over(|observer, halt| quantize(&job, observer, halt));
            assert!(matches!(broken, Err(Error::Interrupted)));
            assert!(!job.output.join("config.json").exists());
        }
        // Other groups of experts: the output does not know of them.
        let fit = job.fit(&job.plan().unwrap().1).unwrap();
        let memory = Some(without_activations(&fit));
        let rest = run(&Job { memory, ..job }).unwrap();
        assert!(rest.resumed_blocks >= 1, "{name}: {}", rest.resumed_blocks);
        assert_eq!(rest.output_digest, whole.output_digest, "{name}");
    }
}

/// The rows of an output's experts, by block.
fn downs(output: &Path, block: usize) -> Vec<Row> {
    let of = |row: &Row| row.name.contains(&format!("layers.{block}.")) && row.name.contains(".experts.");
    let rows = read_rows(output).into_iter().filter(of);
    rows.filter(|row| row.name.ends_with("down_proj") || row.name.ends_with("w2"))
        .collect()
}

#[test]
fn tokens_are_counted_by_expert_and_too_few_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // Enough tokens for each expert: nothing to tell.
    let enough = run(&gptq("mixtral", &at("enough"), text(64, 24, 5))).unwrap();
    let rows = downs(&at("enough"), 1);
    assert_eq!((rows.len(), enough.fallbacks), (6, 0));
    assert_eq!(rows.iter().map(|row| row.tokens).sum::<u64>(), 2 * 64 * 24);
    for row in read_rows(&at("enough")) {
        let expert = row
            .name
            .split("experts.")
            .nth(1)
            .and_then(|rest| rest.split('.').next());
        let own = expert.map_or(64 * 24, |e| {
            downs(&at("enough"), block_of(&row))[e.parse::<usize>().unwrap()].tokens
        });
        assert_eq!(row.tokens, own, "{}", row.name);
    }

    // Four tokens, three experts each: some of the eight experts are sent none.
    let summary = run(&gptq("deepseek_v3", &at("few"), text(1, 4, 6))).unwrap();
    assert!(
        verify(&at("few"), &model("deepseek_v3"))
            .unwrap()
            .problems
            .is_empty()
    );
    let rows = downs(&at("few"), 1);
    assert_eq!(rows.iter().map(|row| row.tokens).sum::<u64>(), 3 * 4);
    assert!(rows.iter().any(|row| row.tokens == 0) && rows.iter().any(|row| row.tokens > 0));
    for row in &rows {
        let told = row.fallback.as_deref().unwrap_or_default();
        let lent = format!(
            "{} tokens of the 96 that 24 channels need; for the rest count {} that were sent to other experts and plain",
            row.tokens,
            4 - row.tokens
        );
        let all = row.tokens == 4;
        assert!(
            told.starts_with(&lent) || all && told.contains("plain rounding"),
            "{}: {told:?}",
            row.name
        );
        assert!(row.relative_error.is_finite());
    }
    assert!(summary.fallbacks >= 2 * 8);
}

fn block_of(row: &Row) -> usize {
    let rest = row.name.split("layers.").nth(1).unwrap();
    rest.split('.').next().unwrap().parse().unwrap()
}

#[test]
fn all_experts_see_all_tokens_for_statistics_alone() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let routed = run(&gptq("qwen2_moe", &at("routed"), text(5, 24, 9))).unwrap();
    let mut job = gptq("qwen2_moe", &at("all"), text(5, 24, 9));
    job.recipe.all_experts = true;
    let all = run(&job).unwrap();
    assert!(routed.fallbacks > 0);
    assert_eq!(all.fallbacks, 0);
    assert_ne!(all.output_digest, routed.output_digest);
    for block in [1, 2] {
        assert!(downs(&at("all"), block).iter().all(|row| row.tokens == 5 * 24));
    }
    // What is quantized before the first experts is the same: the forward pass is as routed.
    let first = |name: &str| {
        read_rows(&at(name))
            .into_iter()
            .filter(|row| block_of(row) == 0)
            .map(|row| row.relative_error)
            .collect::<Vec<_>>()
    };
    assert_eq!(first("all"), first("routed"));
    let mut dense = Job::new(
        super::fixtures().join("families/llama"),
        at("dense"),
        Recipe::default(),
    );
    dense.recipe.all_experts = true;
    dense.recipe.group_size = 0;
    let error = dense.plan().unwrap_err();
    assert!(error.to_string().contains("no experts"), "{error}");
    job.recipe.method = Method::Rtn;
    let error = job.plan().unwrap_err();
    assert!(error.to_string().contains("statistics"), "{error}");
}
