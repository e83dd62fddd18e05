//! Statistics artifacts of mixtures and latent attention: the sums are those of the definition, and add and retract to the byte.

use super::{model, read_rows, recipe, text};
use crate::quantize::{named_budget, run, without_activations};
use candle_core::{DType, Device, Tensor};
use quantflow::artifact::Artifact;
use quantflow::calibration::{ContentId, Documents, Placed};
use quantflow::error::Result;
use quantflow::memory::Room;
use quantflow::model::{Linear, SiteKind, Source};
use quantflow::pipelines::job;
use quantflow::pipelines::statistics::{Change, Job, Summary, merge_artifacts, update};
use quantflow::pipelines::verify::verify;
use quantflow::report::{Observer, Silent};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Windows of pseudo-random token ids as documents.
fn documents(windows: usize, seed: u64) -> Documents {
    let mut documents = Documents::default();
    for (row, batch) in text(windows * 22, 24, seed).batches.into_iter().enumerate() {
        for (part, tokens) in batch.tokens.chunks(24).enumerate() {
            let id = ContentId::of(1, 24, tokens);
            let row = (row * 100 + part) as u32;
            documents.placed.push(Placed {
                source: 0,
                row,
                id,
                tokens: 24,
                length: 24,
                exact: true,
            });
            documents.tokens.insert(id, tokens.to_vec());
        }
    }
    documents
}

fn job(name: &str, change: Change, folder: &Path, documents: Documents) -> Job {
    Job {
        workers: 2,
        ..Job::new(model(name), folder.to_owned(), change, documents)
    }
}

fn change(job: &Job) -> Result<Summary> {
    let observer: Arc<dyn Observer> = Arc::new(Silent);
    update(job, &observer, &Arc::default())
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let header = Artifact::open(folder).unwrap().header;
    let read = |name: String| (name.clone(), std::fs::read(folder.join(name)).unwrap());
    header.blocks.into_iter().map(read).collect()
}

#[test]
fn sums_add_up_and_go_away_to_the_byte() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["qwen2_moe", "deepseek_v2", "gpt_oss"] {
        let at = |part: &str| folder.path().join(format!("{name}-{part}"));
        let (a, b) = (|| documents(1, 1), || documents(2, 2));
        change(&job(name, Change::Collect, &at("b"), b())).unwrap();
        change(&job(name, Change::Collect, &at("a"), a())).unwrap();
        change(&job(name, Change::Collect, &at("x"), a())).unwrap();
        let both = change(&job(name, Change::Add, &at("x"), b())).unwrap();
        change(&job(name, Change::Retract, &at("x"), a())).unwrap();
        assert_eq!(files(&at("x")), files(&at("b")), "{name}");
        assert_ne!(files(&at("a")), files(&at("b")), "{name}");
        let merged = merge_artifacts(&[at("b"), at("a")], &at("merged"), false).unwrap();
        assert_eq!(merged.header.digest(), both.digest, "{name}");
        // One expert at a time, one worker and many.
        for (workers, memory) in [(1, true), (4, false)] {
            let collect = |memory| Job {
                workers,
                memory,
                ..job(name, Change::Collect, &at(&format!("by-{workers}")), b())
            };
            let memory = memory.then(|| named_budget(&change(&collect(Some(1))).unwrap_err()));
            change(&collect(memory)).unwrap();
            assert_eq!(files(&at(&format!("by-{workers}"))), files(&at("b")), "{name}");
        }
    }
}

/// Embedding, first attention, router and experts in f64, from nothing but the weights; only the attention is asked of the block.
#[test]
fn an_experts_sums_are_those_of_the_definition() {
    // Of an expert's input in f32 and of the sums' fixed point.
    const TOLERANCE: f64 = 1e-4;
    let folder = tempfile::tempdir().unwrap();
    let documents = documents(1, 3);
    let tokens: Vec<u32> = documents
        .placed
        .iter()
        .flat_map(|document| documents.tokens[&document.id].clone())
        .collect();
    change(&job("mixtral", Change::Collect, folder.path(), documents)).unwrap();
    let artifact = Artifact::open(folder.path()).unwrap();

    let source = Source::open(&model("mixtral"), Device::Cpu).unwrap();
    let tower = &source.tower;
    let layer = tower.block(0, &tower.rotary(24).unwrap()).unwrap();
    let linears = |site| -> Vec<Linear> {
        let specs = tower.spec.linears(0, site);
        specs.iter().map(|spec| tower.linear(0, spec).unwrap()).collect()
    };
    let residual = tower.embed(&tokens).unwrap();
    let attended = layer
        .attend(&layer.enter(&residual).unwrap(), &linears(SiteKind::Qkv), 24)
        .unwrap();
    let residual = layer
        .join_attention(&residual, &attended, &linears(SiteKind::O))
        .unwrap();
    let x = layer.mlp_input(&residual).unwrap().to_dtype(DType::F64).unwrap();
    let matrix = |name: &str| -> Tensor {
        let name = format!("model.layers.0.block_sparse_moe.{name}.weight");
        tower
            .load(&name)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
            .t()
            .unwrap()
    };
    let rows = |x: &Tensor| x.to_vec2::<f64>().unwrap();
    // Softmax, the two largest, divided by their sum.
    let gates: Vec<Vec<f64>> = rows(&x.matmul(&matrix("gate")).unwrap())
        .into_iter()
        .map(|logits| {
            let mut best: Vec<usize> = (0..6).collect();
            best.sort_by(|&i, &j| logits[j].total_cmp(&logits[i]));
            let total = logits[best[0]].exp() + logits[best[1]].exp();
            (0..6)
                .map(|e| {
                    if best[..2].contains(&e) {
                        logits[e].exp() / total
                    } else {
                        0.0
                    }
                })
                .collect()
        })
        .collect();
    for expert in 0..6 {
        let gate = rows(&x.matmul(&matrix(&format!("experts.{expert}.w1"))).unwrap());
        let up = rows(&x.matmul(&matrix(&format!("experts.{expert}.w3"))).unwrap());
        let sums = artifact
            .site(0, SiteKind::ExpertDown(expert as u32), &Room::Memory)
            .unwrap();
        let sent = gates.iter().filter(|gates| gates[expert] > 0.0).count();
        assert!(sent > 28, "expert {expert} is sent {sent}");
        assert_eq!(sums.tokens(), sent as i64);
        let gram = sums.into_products().gram.unwrap();
        let inner = |t: usize, i: usize| gate[t][i] / (1.0 + (-gate[t][i]).exp()) * up[t][i];
        for i in 0..28 {
            for j in i..28 {
                let expected: f64 = (0..tokens.len())
                    .map(|t| gates[t][expert].powi(2) * inner(t, i) * inner(t, j))
                    .sum();
                let scale = (gram.at(i, i) * gram.at(j, j)).sqrt();
                assert!(
                    (gram.at(i, j) - expected).abs() < TOLERANCE * scale,
                    "expert {expert}, {i}, {j}: {} {expected}",
                    gram.at(i, j)
                );
            }
        }
    }
}

fn solve(name: &str, artifact: &Path, output: &Path) -> job::Job {
    job::Job {
        statistics: Some(Arc::new(Artifact::open(artifact).unwrap())),
        workers: 2,
        ..job::Job::new(model(name), output.to_owned(), recipe(name, 0.0))
    }
}

#[test]
fn one_artifact_is_solved_by_any_number_of_workers_in_any_groups() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["qwen2_moe", "deepseek_v3", "gpt_oss"] {
        let at = |part: &str| folder.path().join(format!("{name}-{part}"));
        change(&job(name, Change::Collect, &at("s"), documents(3, 4))).unwrap();
        let job = solve(name, &at("s"), &at("out"));
        let whole = run(&job).unwrap();
        let found = verify(&at("out"), &model(name)).unwrap();
        assert_eq!(
            (found.problems, found.quantized),
            (Vec::new(), whole.linears),
            "{name}"
        );
        for (workers, tight) in [(1, false), (4, false), (2, true)] {
            let mut again = job::Job {
                workers,
                output: at(&format!("{workers}-{tight}")),
                ..job.clone()
            };
            if tight {
                let fit = again.fit(&again.plan().unwrap().1).unwrap();
                again.memory = Some(without_activations(&fit));
            }
            assert_eq!(
                run(&again).unwrap().output_digest,
                whole.output_digest,
                "{name}: {workers} workers"
            );
        }
    }
}

#[test]
fn an_artifact_tells_of_experts_with_too_few_tokens_or_has_all_tokens_for_each() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let few = || {
        let mut few = documents(1, 5);
        few.placed.truncate(5);
        few
    };
    change(&job("qwen3_moe", Change::Collect, &at("routed"), few())).unwrap();
    let collect = Job {
        all_experts: true,
        ..job("qwen3_moe", Change::Collect, &at("all"), few())
    };
    change(&collect).unwrap();
    let routed = run(&solve("qwen3_moe", &at("routed"), &at("routed-out"))).unwrap();
    let all = run(&solve("qwen3_moe", &at("all"), &at("all-out"))).unwrap();
    assert!(routed.fallbacks > 0);
    assert_eq!(all.fallbacks, 0);
    let experts = |output: &str| {
        read_rows(&at(output))
            .into_iter()
            .filter(|row| row.name.contains("experts."))
            .collect::<Vec<_>>()
    };
    for row in experts("routed-out") {
        let down = row.name.ends_with("down_proj");
        assert!(row.tokens < 120, "{}", row.name);
        let told = row.fallback.unwrap_or_default();
        assert_eq!(
            told.contains("for the rest count plain rounding;"),
            down && row.tokens < 96,
            "{}: {told}",
            row.name
        );
    }
    assert!(experts("all-out").iter().all(|row| row.tokens == 120));
    // The two kinds do not mix: not merged, not asked for, and what is added follows the artifact.
    let mixed = merge_artifacts(&[at("routed"), at("all")], &at("mixed"), false).unwrap_err();
    assert!(mixed.to_string().contains("--all-experts"), "{mixed}");
    let mut wrong = solve("qwen3_moe", &at("routed"), &at("wrong"));
    wrong.recipe.all_experts = true;
    let error = run(&wrong).unwrap_err();
    assert!(error.hint().unwrap().contains("--all-experts"), "{error}");
    change(&job("qwen3_moe", Change::Add, &at("all"), documents(1, 6))).unwrap();
    let artifact = Artifact::open(&at("all")).unwrap();
    let tokens = artifact.header.tokens();
    assert!(tokens > 120);
    assert_eq!(
        artifact.tokens(1, [SiteKind::ExpertDown(3)].into_iter()).unwrap(),
        [tokens]
    );
}
