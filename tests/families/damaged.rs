//! Configs with one thing wrong: each is refused by an error that names it.

use super::changed;
use quantflow::model::families;
use serde_json::json;

/// Each is refused by an error that has these words.
#[test]
fn damaged_mixtures_are_refused_by_name() {
    let cases = [
        (
            "mixtral",
            json!({"num_local_experts": 0}),
            "`num_local_experts` is 0",
        ),
        (
            "mixtral",
            json!({"num_local_experts": 1u64 << 40}),
            "`num_local_experts`",
        ),
        (
            "mixtral",
            json!({"num_experts_per_tok": 0}),
            "`num_experts_per_tok` is 0",
        ),
        (
            "mixtral",
            json!({"num_experts_per_tok": 7}),
            "more than `num_local_experts` = 6",
        ),
        (
            "qwen2_moe",
            json!({"moe_intermediate_size": 0}),
            "`moe_intermediate_size` is 0",
        ),
        (
            "qwen2_moe",
            json!({"shared_expert_intermediate_size": -1}),
            "`shared_expert_intermediate_size`",
        ),
        ("qwen2_moe", json!({"mlp_only_layers": [-1]}), "`mlp_only_layers`"),
        ("qwen2_moe", json!({"mlp_only_layers": 3}), "`mlp_only_layers`"),
        (
            "qwen3_moe",
            json!({"decoder_sparse_step": 0}),
            "`decoder_sparse_step` is 0",
        ),
        ("qwen3_moe", json!({"norm_topk_prob": "yes"}), "`norm_topk_prob`"),
        (
            "qwen3_vl_moe",
            json!({"text_config": {"num_experts": 0}}),
            "`text_config.num_experts` is 0",
        ),
        (
            "deepseek_v2",
            json!({"num_experts_per_tok": null}),
            "`num_experts_per_tok` is missing",
        ),
        ("deepseek_v2", json!({"n_group": 3}), "`n_group` is 3"),
        ("deepseek_v2", json!({"n_group": null}), "`n_group` is missing"),
        ("deepseek_v2", json!({"topk_group": 1}), "`topk_group` is 1"),
        ("deepseek_v2", json!({"topk_method": "noaux_tc"}), "`topk_method`"),
        (
            "deepseek_v2",
            json!({"norm_topk_prob": true}),
            "`norm_topk_prob` is true",
        ),
        ("deepseek_v2", json!({"moe_layer_freq": 2}), "`moe_layer_freq`"),
        ("deepseek_v3", json!({"n_group": 8}), "groups of at least 2"),
        ("deepseek_v3", json!({"topk_group": 5}), "`topk_group` is 5"),
        (
            "deepseek_v3",
            json!({"scoring_func": "softmax"}),
            "`scoring_func` is \"softmax\"",
        ),
        (
            "deepseek_v3",
            json!({"qk_rope_head_dim": 7}),
            "`qk_rope_head_dim` is 7",
        ),
        ("deepseek_v3", json!({"v_head_dim": 0}), "`v_head_dim` is 0"),
        ("deepseek_v3", json!({"kv_lora_rank": 0}), "`kv_lora_rank` is 0"),
        (
            "deepseek_v3",
            json!({"num_key_value_heads": 2}),
            "`num_key_value_heads` is 2",
        ),
        (
            "deepseek_v3",
            json!({"n_shared_experts": 4096, "moe_intermediate_size": 1 << 20}),
            "`n_shared_experts`",
        ),
        (
            "deepseek_v3",
            json!({"rope_parameters": {"rope_type": "yarn", "mscale_all_dim": 1.0}}),
            "`rope_parameters.factor` is missing",
        ),
        ("gpt_oss", json!({"swiglu_limit": 0.0}), "`swiglu_limit` is 0"),
        (
            "gpt_oss",
            json!({"num_local_experts": "many"}),
            "`num_local_experts`",
        ),
        ("gpt_oss", json!({"sliding_window": null}), "`sliding_window`"),
    ];
    for (name, changes, expected) in cases {
        let message = changed(name, changes.clone())
            .expect_err(&changes.to_string())
            .to_string();
        assert!(message.contains(expected), "{name} with {changes}: {message}");
    }
}

/// Each is refused by an error that has these words.
#[test]
fn damaged_configs_are_refused_by_name() {
    let cases = [
        (
            "llama",
            json!({"num_attention_heads": 0}),
            "`num_attention_heads` is 0",
        ),
        (
            "llama",
            json!({"num_attention_heads": -4}),
            "`num_attention_heads` is -4",
        ),
        (
            "llama",
            json!({"num_attention_heads": 1e300}),
            "`num_attention_heads`",
        ),
        (
            "llama",
            json!({"num_key_value_heads": 3}),
            "`num_key_value_heads` is 3",
        ),
        (
            "llama",
            json!({"num_key_value_heads": 0}),
            "`num_key_value_heads` is 0",
        ),
        ("llama", json!({"head_dim": 15}), "`head_dim` is 15"),
        (
            "llama",
            json!({"head_dim": null, "num_attention_heads": 6}),
            "`num_attention_heads` is 6",
        ),
        (
            "llama",
            json!({"hidden_size": "wide"}),
            "`hidden_size` is \"wide\"",
        ),
        ("llama", json!({"hidden_size": u64::MAX}), "`hidden_size`"),
        (
            "llama",
            json!({"num_hidden_layers": 1u64 << 40}),
            "`num_hidden_layers`",
        ),
        ("llama", json!({"vocab_size": 3.5}), "`vocab_size` is 3.5"),
        ("llama", json!({"rms_norm_eps": "NaN"}), "`rms_norm_eps`"),
        ("llama", json!({"rms_norm_eps": 0.0}), "`rms_norm_eps`"),
        ("llama", json!({"rms_norm_eps": 100.0}), "`rms_norm_eps`"),
        ("llama", json!({"hidden_act": "gelu"}), "`hidden_act` is \"gelu\""),
        (
            "llama",
            json!({"tie_word_embeddings": "yes"}),
            "`tie_word_embeddings`",
        ),
        ("llama", json!({"num_local_experts": 8}), "mixture of experts"),
        (
            "llama",
            json!({"layer_types": ["sliding_attention"]}),
            "`layer_types`",
        ),
        (
            "llama",
            json!({"rope_parameters": [1]}),
            "`rope_parameters` is a list",
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "spiral"}}),
            "`rope_parameters.rope_type` is \"spiral\"",
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "linear"}}),
            "`rope_parameters.factor` is missing",
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "linear", "factor": 0}}),
            "`rope_scaling.factor` is 0",
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_theta": 1.0, "rope_type": "yarn", "factor": 2}}),
            "no usable",
        ),
        (
            "llama",
            json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
            "partial_rotary_factor",
        ),
        (
            "llama",
            json!({"rope_parameters": {"full_attention": {}}}),
            "`rope_parameters.full_attention`",
        ),
        (
            "llama",
            json!({"architectures": ["GPT2LMHeadModel"]}),
            "supported are LlamaForCausalLM",
        ),
        (
            "llama",
            json!({"architectures": ["Qwen2MoeForCausalLM"]}),
            "`model_type` is \"llama\"",
        ),
        (
            "llama",
            json!({"architectures": "LlamaForCausalLM"}),
            "`architectures`",
        ),
        (
            "llama",
            json!({"model_type": "mixtral"}),
            "`model_type` is \"mixtral\"",
        ),
        (
            "llama",
            json!({"architectures": null, "model_type": "qwen2_vl_text"}),
            "is not supported",
        ),
        (
            "llama",
            json!({"architectures": [], "model_type": null}),
            "are missing",
        ),
        (
            "qwen2",
            json!({"layer_types": ["full_attention"]}),
            "`layer_types` has 1 entries",
        ),
        ("qwen2", json!({"use_sliding_window": false}), "`sliding_window`"),
        ("qwen2", json!({"use_sliding_window": 1}), "`use_sliding_window`"),
        ("qwen2", json!({"max_window_layers": -1}), "`max_window_layers`"),
        ("gemma2", json!({"sliding_window": null}), "`sliding_window`"),
        ("gemma2", json!({"sliding_window": 0}), "`sliding_window` is 0"),
        (
            "gemma2",
            json!({"attn_logit_softcapping": 0.0}),
            "`attn_logit_softcapping`",
        ),
        (
            "gemma2",
            json!({"query_pre_attn_scalar": 0}),
            "`query_pre_attn_scalar`",
        ),
        ("gemma2", json!({"dtype": "int8"}), "`dtype` is \"int8\""),
        (
            "gemma3_text",
            json!({"use_bidirectional_attention": true}),
            "only causal",
        ),
        (
            "gemma3_text",
            json!({"attn_logit_softcapping": 50.0}),
            "no softcap",
        ),
        (
            "gemma3_text",
            json!({"rope_parameters": {"rope_type": "default"}}),
            "`rope_parameters.rope_type`",
        ),
        (
            "phi3",
            json!({"partial_rotary_factor": 0.75, "rope_parameters": {"rope_type": "longrope"}}),
            "short_factor",
        ),
        ("gemma3", json!({"text_config": null}), "`text_config` is missing"),
        (
            "gemma3",
            json!({"text_config": {"head_dim": 7}}),
            "`text_config.head_dim` is 7",
        ),
        (
            "qwen3_vl",
            json!({"text_config": {"model_type": "qwen3_vl_moe_text"}}),
            "`text_config.model_type`",
        ),
        (
            "llava",
            json!({"text_config": {"model_type": "mamba"}}),
            "`text_config.model_type` is \"mamba\"",
        ),
        (
            "llava",
            json!({"text_config": {"model_type": "llava"}}),
            "`text_config.model_type` is \"llava\"",
        ),
    ];
    for (name, changes, expected) in cases {
        let error = changed(name, changes.clone()).expect_err(&changes.to_string());
        let message = error.to_string();
        assert!(message.contains(expected), "{name} with {changes}: {message}");
        assert!(error.hint().is_some(), "{message}");
    }
    for config in [json!(null), json!([]), json!("llama"), json!({})] {
        assert!(families::parse(&config).is_err());
    }
}
