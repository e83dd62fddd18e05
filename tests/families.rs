//! Configs of all families against what transformers makes of them (fixtures/families/make.py), and configs written after
//! public models.

use quantflow::error::Result;
use quantflow::model::SiteKind;
use quantflow::model::families;
use quantflow::model::spec::{Activation, ModelSpec};
use quantflow::numerics::routing::{GroupLimit, Scoring};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

mod damaged;
mod random;

/// torch and Rust round powers differently in the last bit, and scalings add up to three such bits.
const FREQUENCY_TOLERANCE: f32 = 4e-7;

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a fixture")).expect("JSON")
}

fn published(name: &str) -> Value {
    read(&fixtures().join("configs").join(format!("{name}.json")))
}

fn fixture(name: &str) -> Value {
    read(&fixtures().join("families").join(name).join("config.json"))
}

fn windows(spec: &ModelSpec) -> Vec<Option<usize>> {
    spec.layers.iter().map(|layer| layer.window).collect()
}

#[test]
fn rotary_tables_are_those_of_transformers() {
    let cases = read(&fixtures().join("families/ropes.json"));
    for case in cases.as_array().expect("a list") {
        let name = case["name"].as_str().expect("a name");
        let config = case.get("config").cloned().unwrap_or_else(|| published(name));
        let spec = families::parse(&config).expect(name);
        let tables = case["tables"].as_array().expect("tables");
        assert_eq!(spec.block.ropes.len(), tables.len(), "{name}");
        for (ours, theirs) in spec.block.ropes.iter().zip(tables) {
            let factor = theirs["attention_factor"].as_f64().expect("a number") as f32;
            let frequencies = theirs["inv_freq"].as_array().expect("a list");
            assert_eq!(ours.attention_factor, factor, "{name}");
            assert_eq!(ours.inverse_frequencies.len(), frequencies.len(), "{name}");
            assert_eq!(ours.rotary_dim, 2 * frequencies.len(), "{name}");
            for (a, b) in ours.inverse_frequencies.iter().zip(frequencies) {
                let b = b.as_f64().expect("a number") as f32;
                assert!((a - b).abs() <= FREQUENCY_TOLERANCE * b, "{name}: {a} != {b}");
            }
        }
    }
}

/// layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, tied.
type Shape = (usize, usize, usize, usize, usize, usize, usize, bool);

#[test]
fn published_shapes() {
    let cases: &[(&str, Shape)] = &[
        ("llama-3.1-8b", (32, 4096, 32, 8, 128, 14_336, 128_256, false)),
        ("smollm2-135m", (30, 576, 9, 3, 64, 1536, 49_152, true)),
        ("mistral-7b-v0.1", (32, 4096, 32, 8, 128, 14_336, 32_000, false)),
        ("mistral-7b-v0.3", (32, 4096, 32, 8, 128, 14_336, 32_768, false)),
        ("qwen3-8b", (36, 4096, 32, 8, 128, 12_288, 151_936, false)),
        ("gemma-2-9b", (42, 3584, 16, 8, 256, 14_336, 256_000, true)),
        ("gemma-3-4b-it", (34, 2560, 8, 4, 256, 10_240, 262_208, true)),
        ("phi-3-mini-128k", (32, 3072, 32, 32, 96, 8192, 32_064, false)),
        ("qwen2.5-vl-7b", (28, 3584, 28, 4, 128, 18_944, 152_064, false)),
        ("llava-1.5-7b", (32, 4096, 32, 32, 128, 11_008, 32_064, false)),
        ("mixtral-8x7b", (32, 4096, 32, 8, 128, 14_336, 32_000, false)),
        ("qwen1.5-moe-a2.7b", (24, 2048, 16, 16, 128, 5632, 151_936, false)),
        ("qwen3-30b-a3b", (48, 2048, 32, 4, 128, 6144, 151_936, false)),
        ("qwen3-vl-30b-a3b", (48, 2048, 32, 4, 128, 6144, 151_936, false)),
        (
            "deepseek-v2-lite",
            (27, 2048, 16, 16, 192, 10_944, 102_400, false),
        ),
        ("deepseek-v2", (60, 5120, 128, 128, 192, 12_288, 102_400, false)),
        ("deepseek-v3", (61, 7168, 128, 128, 192, 18_432, 129_280, false)),
        ("gpt-oss-20b", (24, 2880, 64, 8, 64, 2880, 201_088, false)),
        ("tiny-vl", (5, 256, 4, 2, 64, 512, 2048, true)),
    ];
    for (name, expected) in cases {
        let s = families::parse(&published(name)).expect(name);
        let b = &s.block;
        let layers = s.layers.len();
        let shape = (
            layers,
            s.hidden_size,
            b.heads,
            b.kv_heads,
            b.head_dim,
            b.intermediate_size,
            s.vocab_size,
            s.tied_head,
        );
        assert_eq!(shape, *expected, "{name}");
        assert_eq!(b.hidden_size, s.hidden_size, "{name}");
    }
}

/// Mixture layers, experts, experts per token, inner width, shared width, parameters of all linears in blocks (millions).
type MixtureShape = (usize, usize, usize, usize, Option<usize>, u64);

#[test]
fn published_mixtures() {
    let cases: &[(&str, MixtureShape)] = &[
        ("mixtral-8x7b", (32, 8, 2, 14_336, None, 46_439)),
        ("qwen1.5-moe-a2.7b", (24, 60, 4, 1408, Some(5632), 13_690)),
        ("qwen3-30b-a3b", (48, 128, 8, 768, None, 29_896)),
        ("qwen3-vl-30b-a3b", (48, 128, 8, 768, None, 29_896)),
        ("deepseek-v2-lite", (26, 64, 6, 1408, Some(2816), 15_283)),
        ("deepseek-v2", (59, 160, 6, 1536, Some(3072), 234_643)),
        ("deepseek-v3", (58, 256, 8, 2048, Some(2048), 669_065)),
        ("gpt-oss-20b", (24, 32, 4, 2880, None, 19_747)),
    ];
    for (name, expected) in cases {
        let s = families::parse(&published(name)).expect(name);
        let m = s.block.mixture.as_ref().expect(name);
        let linears = (0..s.layers.len()).flat_map(|block| {
            let s = &s;
            s.sites(block)
                .into_iter()
                .flat_map(move |site| s.linears(block, site))
        });
        let parameters: u64 = linears.map(|l| (l.rows * l.columns) as u64).sum();
        let found = (
            s.layers.iter().filter(|layer| layer.mixture).count(),
            m.routing.experts,
            m.routing.experts_per_token,
            m.intermediate_size,
            m.shared.map(|shared| shared.intermediate_size),
            parameters / 1_000_000,
        );
        assert_eq!(found, *expected, "{name}");
    }

    let v3 = families::parse(&published("deepseek-v3")).unwrap();
    let sites = |block| v3.sites(block);
    assert_eq!(
        sites(2),
        [
            SiteKind::Qkv,
            SiteKind::QB,
            SiteKind::KvB,
            SiteKind::O,
            SiteKind::GateUp,
            SiteKind::Down
        ]
    );
    assert_eq!(sites(3).len(), 6 + 256);
    assert!(
        sites(3).is_sorted(),
        "sites come in the order in which they are reached"
    );
    assert_eq!(v3.linears(3, SiteKind::GateUp).len(), 2 + 2 * 256);
    let down = &v3.linears(3, SiteKind::ExpertDown(255))[0];
    assert_eq!(
        (&*down.name, down.rows, down.columns),
        ("mlp.experts.255.down_proj", 7168, 2048)
    );
    assert_eq!(v3.block.site_width(&v3.layers[3], SiteKind::KvB), 512);
    assert_eq!(v3.block.site_width(&v3.layers[3], SiteKind::O), 128 * 128);
    assert!(v3.linears(2, SiteKind::ExpertDown(0)).is_empty());
    let rule = v3.block.mixture.as_ref().unwrap().routing;
    assert_eq!(
        (rule.scoring, rule.normalize, rule.scale),
        (Scoring::Sigmoid, true, 2.5)
    );
    assert_eq!(
        rule.groups,
        Some(GroupLimit {
            groups: 8,
            used: 4,
            best: 2
        })
    );
    // 192^-0.5 * (0.1 ln 40 + 1)^2
    assert!((v3.block.attention_scale - 0.135_234).abs() < 1e-6);
    let lite = families::parse(&published("deepseek-v2-lite")).unwrap();
    assert_eq!(lite.block.mla.unwrap().q_lora_rank, None);
    assert_eq!(lite.block.mixture.as_ref().unwrap().routing.groups, None);
}

#[test]
fn published_options() {
    let parse = |name| families::parse(&published(name)).expect(name);

    let gemma2 = parse("gemma-2-9b");
    assert_eq!(gemma2.architecture, "Gemma2ForCausalLM");
    assert_eq!(gemma2.embedding_scale, Some(59.75), "sqrt(3584) = 59.867 in bf16");
    assert_eq!(
        (gemma2.final_softcap, gemma2.block.attention_softcap),
        (Some(30.0), Some(50.0))
    );
    assert_eq!(gemma2.block.attention_scale, 0.0625);
    assert_eq!(windows(&gemma2)[..4], [Some(4096), None, Some(4096), None]);
    assert!(gemma2.block.sandwich_norms && gemma2.block.norm.unit_offset && !gemma2.block.qk_norm);
    assert_eq!(gemma2.block.activation, Activation::GeluTanh);

    let gemma3 = parse("gemma-3-4b-it");
    assert_eq!(gemma3.embedding_scale, Some(50.5), "sqrt(2560) = 50.596 in bf16");
    assert_eq!(
        (gemma3.final_softcap, gemma3.block.attention_softcap),
        (None, None)
    );
    assert_eq!(
        windows(&gemma3).iter().filter(|window| window.is_none()).count(),
        5
    );
    assert_eq!((windows(&gemma3)[4], windows(&gemma3)[5]), (Some(1024), None));
    assert_eq!((gemma3.layers[4].rope, gemma3.layers[5].rope), (Some(1), Some(0)));
    assert!(gemma3.block.qk_norm);

    let phi = parse("phi-3-mini-128k");
    assert!(phi.block.fused_qkv && phi.block.fused_gate_up);
    assert_eq!(phi.max_sequence, Some(4096));
    assert_eq!(windows(&phi)[0], Some(262_144));

    assert_eq!(windows(&parse("mistral-7b-v0.1"))[31], Some(4096));
    assert_eq!(windows(&parse("mistral-7b-v0.3"))[31], None);
    assert_eq!(windows(&parse("qwen2.5-vl-7b")), [None; 28]);
    assert!(parse("qwen3-8b").block.qk_norm && !parse("llama-3.1-8b").block.qk_norm);
    assert_eq!(parse("llama-3.1-8b").max_sequence, None);
    assert_eq!(parse("llama-3.1-8b").names.len(), 1);

    let towers: Vec<_> = parse("tiny-vl")
        .names
        .into_iter()
        .map(|names| names.tower)
        .collect();
    assert_eq!(
        towers,
        ["model.language_model.", "language_model.model.", "model."]
    );
}

#[test]
fn fixture_windows() {
    let w = Some(5);
    let cases: &[(&str, [Option<usize>; 3])] = &[
        ("llama", [None; 3]),
        ("mistral", [w; 3]),
        ("qwen2", [None, w, w]),
        ("qwen3", [None; 3]),
        ("gemma2", [w, None, w]),
        ("gemma3_text", [w, None, w]),
        ("gemma3", [w, None, w]),
        ("phi3", [None; 3]),
        ("qwen2_vl", [None; 3]),
    ];
    for (name, expected) in cases {
        let spec = families::parse(&fixture(name)).expect(name);
        assert_eq!(windows(&spec), expected, "{name}");
    }
}

/// The config of fixture `name` with `changes` set.
fn changed(name: &str, changes: Value) -> Result<ModelSpec> {
    let mut config = fixture(name);
    for (key, value) in changes.as_object().expect("an object") {
        config[key] = value.clone();
    }
    families::parse(&config)
}

#[test]
fn both_spellings_of_rope_mean_the_same() {
    let new = changed("llama", json!({})).unwrap();
    let rope = fixture("llama")["rope_parameters"].clone();
    let old = changed(
        "llama",
        json!({"rope_parameters": null, "rope_scaling": rope, "rope_theta": 1000.0}),
    )
    .unwrap();
    assert_eq!(new, old);

    let new = changed("gemma3_text", json!({})).unwrap();
    let scaling = json!({"rope_type": "linear", "factor": 8.0});
    let old = json!({
        "rope_parameters": null, "rope_scaling": scaling, "rope_theta": 1e6, "rope_local_base_freq": 100.0,
        "layer_types": null, "sliding_window_pattern": 2,
    });
    let old = changed("gemma3_text", old).unwrap();
    assert_eq!(new.block, old.block);
}

#[test]
fn hub_spellings() {
    assert!(
        changed("llama", json!({"architectures": null})).is_ok(),
        "the type alone"
    );
    assert!(
        changed("llama", json!({"model_type": null})).is_ok(),
        "the architecture alone"
    );
    let scale = |changes| changed("gemma2", changes).unwrap().embedding_scale;
    assert_eq!(scale(json!({"dtype": "bfloat16"})), Some(5.65625));
    assert_eq!(
        scale(json!({"dtype": null, "torch_dtype": "float16"})),
        Some(5.65625)
    );
    assert_eq!(scale(json!({})), Some(32f32.sqrt()));
    let outer = changed("gemma3", json!({"dtype": "bfloat16"})).unwrap();
    assert_eq!(
        outer.embedding_scale,
        Some(5.65625),
        "the outer dtype, as the text tower names none"
    );
    let phi = published("phi-3-mini-128k");
    for alias in ["su", "yarn"] {
        let mut old = phi.clone();
        old["rope_scaling"]["type"] = alias.into();
        assert_eq!(
            families::parse(&old).unwrap(),
            families::parse(&phi).unwrap(),
            "{alias}"
        );
    }
    let flat = published("qwen2.5-vl-7b");
    let mut nested = json!({"text_config": flat});
    for key in ["architectures", "model_type"] {
        nested[key] = flat[key].clone();
        nested["text_config"].as_object_mut().unwrap().shift_remove(key);
    }
    assert_eq!(families::parse(&flat).unwrap(), families::parse(&nested).unwrap());
}

#[test]
fn every_supported_architecture_has_a_fixture() {
    let folder = fixtures().join("families");
    let have: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .map(|path| {
            families::parse(&read(&path.join("config.json")))
                .unwrap()
                .architecture
        })
        .collect();
    for name in families::supported() {
        assert!(have.iter().any(|have| have == name), "{name} has no fixture");
    }
}
