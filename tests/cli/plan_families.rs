//! Plans of every family from a config.json alone, as it is published, for the cards that people have.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::program::Sandbox;

/// The fields of a published Qwen3 mixture of experts that tell its shape.
fn qwen3_moe(hidden: u64, layers: u64, heads: u64, intermediate: u64, theta: u64) -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": false,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": hidden, "max_position_embeddings": 262144, "mlp_only_layers": [],
        "moe_intermediate_size": intermediate, "norm_topk_prob": true, "num_attention_heads": heads,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": layers,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": theta,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "use_sliding_window": false, "vocab_size": 151936,
    })
}

/// Qwen3.5 and 3.6 of 35B as they are published: text and images, the newer spelling.
fn qwen3_5_35b() -> Value {
    let types: Vec<&str> = (1..=40)
        .map(|i| {
            if i % 4 == 0 {
                "full_attention"
            } else {
                "linear_attention"
            }
        })
        .collect();
    json!({
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
        "image_token_id": 248056, "tie_word_embeddings": false,
        "vision_config": {"depth": 27, "hidden_size": 1152, "model_type": "qwen3_5_moe"},
        "text_config": {
            "model_type": "qwen3_5_moe_text", "attention_bias": false, "attn_output_gate": true,
            "dtype": "bfloat16", "eos_token_id": 248044, "full_attention_interval": 4,
            "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "layer_types": types,
            "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
            "linear_num_value_heads": 32, "linear_value_head_dim": 128,
            "max_position_embeddings": 262144, "moe_intermediate_size": 512,
            "mtp_num_hidden_layers": 1, "num_attention_heads": 16, "num_experts": 256,
            "num_experts_per_tok": 8, "num_hidden_layers": 40, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6, "shared_expert_intermediate_size": 512, "vocab_size": 248320,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10], "mrope_interleaved": true,
            },
        },
    })
}

fn coder_next() -> Value {
    json!({
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "head_dim": 256,
        "decoder_sparse_step": 1, "full_attention_interval": 4, "hidden_act": "silu",
        "hidden_size": 2048, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
        "max_position_embeddings": 262144, "mlp_only_layers": [], "moe_intermediate_size": 512,
        "norm_topk_prob": true, "num_attention_heads": 16, "num_experts": 512,
        "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6, "rope_scaling": null,
        "rope_theta": 5000000, "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 151936,
    })
}

#[test]
fn every_family_is_planned_for_cards_of_6_to_16_gib_in_under_a_second() {
    let sandbox = Sandbox::new();
    // The smallest card that holds what every token needs at a context of 16k, in GiB.
    for (name, config, least) in [
        ("30b-a3b", qwen3_moe(2048, 48, 32, 768, 1_000_000), 6),
        ("coder-30b", qwen3_moe(2048, 48, 32, 768, 10_000_000), 6),
        ("235b-a22b", qwen3_moe(4096, 94, 64, 1536, 1_000_000), 12),
        ("35b-a3b", qwen3_5_35b(), 6),
        ("coder-next", coder_next(), 6),
    ] {
        let folder = sandbox.path(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let mut slots = 0;
        for gib in [6, 8, 12, 16] {
            let start = Instant::now();
            let outcome = sandbox.run(&format!(
                "plan --json -m {} --vram {gib}G --ctx 16k --hardware laptop-4090 -o {name}-{gib}.json",
                folder.display()
            ));
            assert!(
                start.elapsed() < Duration::from_secs(1),
                "{name} {gib}G: {:?}",
                start.elapsed()
            );
            if gib < least {
                outcome.fails(4, &["GiB"]);
                continue;
            }
            let placement = outcome.ok().json();
            assert_eq!(placement["vram_budget_bytes"], json!(gib * (1u64 << 30)));
            let layers = placement["layers"].as_array().unwrap();
            let found: u64 = layers
                .iter()
                .map(|layer| layer["slots"].as_u64().unwrap())
                .sum();
            assert!(
                found >= slots,
                "{name} {gib}G: {found} slots, {slots} with less memory"
            );
            slots = found;
        }
        assert!(slots > 0, "{name}: no expert in 16 GiB");
    }
}
