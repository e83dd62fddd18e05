//! Random configs: parsed or refused, never a panic; what is accepted is usable.

use super::fixture;
use proptest::prelude::*;
use quantflow::model::families;
use quantflow::numerics::routing::route;
use serde_json::Value;

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0i64..64).prop_map(Value::from),
        proptest::sample::select(vec![
            "llama",
            "yarn",
            "longrope",
            "llama3",
            "linear",
            "dynamic",
            "su",
            "silu",
            "sliding_attention",
            "bfloat16",
        ])
        .prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::vec((any_key(), inner), 0..6)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

fn any_key() -> impl Strategy<Value = String> {
    let known = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "hidden_activation",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rope_type",
        "type",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "short_factor",
        "attention_factor",
        "partial_rotary_factor",
        "full_attention",
        "sliding_attention",
        "sliding_window",
        "sliding_window_pattern",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "n_shared_experts",
        "mlp_only_layers",
        "decoder_sparse_step",
        "norm_topk_prob",
        "n_group",
        "topk_group",
        "topk_method",
        "routed_scaling_factor",
        "first_k_dense_replace",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "rope_interleave",
        "swiglu_limit",
        "tie_word_embeddings",
        "vocab_size",
        "dtype",
        "text_config",
        "model_type",
        "architectures",
    ];
    proptest::sample::select(known.to_vec()).prop_map(str::to_owned)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_json_is_parsed_or_refused(config in any_json()) {
        let _ = families::parse(&config);
    }

    /// A real config with some keys replaced, at the top or in the text tower; what is accepted is usable.
    #[test]
    fn replaced_keys_are_parsed_or_refused(
        name in proptest::sample::select(vec![
            "llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "qwen2_vl", "qwen3_vl", "llava", "gemma3",
            "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "gpt_oss",
        ]),
        deep in any::<bool>(),
        changes in proptest::collection::vec((any_key(), any_json()), 1..5),
    ) {
        let mut config = fixture(name);
        for (key, value) in changes {
            if deep && config["text_config"].is_object() {
                config["text_config"][key] = value;
            } else {
                config[key] = value;
            }
        }
        if let Ok(spec) = families::parse(&config) {
            let b = &spec.block;
            prop_assert!(b.heads > 0 && b.kv_heads > 0 && b.heads % b.kv_heads == 0 && b.head_dim % 2 == 0);
            prop_assert!(!spec.layers.is_empty() && spec.vocab_size > 0 && b.intermediate_size > 0);
            prop_assert!(b.attention_scale.is_finite() && b.norm.eps > 0.0);
            prop_assert!(spec.layers.iter().all(|l| l.window != Some(0) && l.rope.is_none_or(|r| r < b.ropes.len())));
            prop_assert!(spec.layers.iter().all(|l| !l.mixture || b.mixture.is_some()));
            if let Some(mixture) = &b.mixture {
                let rule = mixture.routing;
                prop_assert!(rule.experts_per_token >= 1 && rule.experts_per_token <= rule.experts);
                prop_assert!(mixture.intermediate_size > 0 && !mixture.names.is_empty() && rule.scale.is_finite());
                // The kernel panics where a rule does not hold.
                let routing = route(&vec![0.5; 2 * rule.experts], None, rule);
                prop_assert!(routing.gates.iter().all(|gate| gate.is_finite()));
            }
            for layer in &spec.layers[..1] {
                for site in b.sites(layer) {
                    prop_assert!(b.linears(layer, site).iter().all(|l| l.rows > 0 && l.columns == b.site_width(layer, site)));
                }
            }
            for rope in &b.ropes {
                prop_assert!(rope.rotary_dim <= b.head_dim && rope.inverse_frequencies.len() * 2 == rope.rotary_dim);
                prop_assert!(rope.inverse_frequencies.iter().all(|f| f.is_finite() && *f > 0.0));
            }
        }
    }
}
