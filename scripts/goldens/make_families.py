#!/usr/bin/env python3
"""Golden data of other families and of scaled rotary embedding, made with the real libraries.

    pip install transformers==5.24.0 torch==2.15.0
    python make_families.py ../../tests/data/goldens

Writes `yarn/`, whose weights are those of `tiny-c/bf16`, `qwen3_5_moe/` and `qwen3_moe/`. As in make_goldens.py
weights are random by seed, results are in f32, single threaded, and greedy tokens go past the end.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

torch.set_num_threads(1)
NEW_TOKENS = 32
PROMPTS = {"len3": 3, "len66": 66, "len130": 130}


def rng(*key):
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def init_weights(model, seed):
    """As in make_goldens.py: logits and router scores that differ, decays of all speeds."""
    with torch.no_grad():
        for name, p in model.state_dict().items():
            g = rng(seed, name)
            normal = lambda std, mean=0.0: torch.randn(p.shape, generator=g) * std + mean
            uniform = lambda lo, hi: torch.rand(p.shape, generator=g) * (hi - lo) + lo
            fan = p.shape[-1] ** -0.5
            if name.endswith("embed_tokens.weight"):
                w = normal(1.0)
            elif name.endswith("lm_head.weight"):
                w = normal(3.0 * fan)
            elif name.endswith("A_log"):
                w = torch.log(uniform(0.02, 3.0))
            elif name.endswith("dt_bias"):
                w = uniform(-5.0, 0.5)
            elif name.endswith("conv1d.weight"):
                w = normal(0.45)
            elif name.endswith("linear_attn.norm.weight"):
                w = normal(0.1, 1.0)
            elif name.endswith("norm.weight"):
                w = normal(0.15)
            elif name.endswith("mlp.gate.weight"):
                w = normal(2.0 * fan)
            elif "o_proj" in name or "out_proj" in name or "down_proj" in name:
                w = normal(0.8 * fan)
            elif "q_proj" in name or "k_proj" in name:
                w = normal(1.2 * fan)
            else:
                w = normal(1.3 * fan)
            p.copy_(w.to(p.dtype))


@torch.no_grad()
def record(model, folder, layout, vocab):
    """Runs the prompts; writes golden/LAYOUT-f32.safetensors and golden/manifest.json."""
    routers, results, modes, prompts = {}, {}, {}, {}

    def hook(layer):
        def see(_module, _args, out):
            routers[layer] = out
        return see

    for i, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(hook(i))
    for name, length in PROMPTS.items():
        ids = torch.randint(0, vocab, (length,), generator=rng("prompt", name)).tolist()
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        results[f"logits.{name}"] = logits
        gap = 1.0
        for i, (scores, weights, chosen) in routers.items():
            results[f"router.{name}.{i}.idx"] = chosen.to(torch.int32)
            results[f"router.{name}.{i}.weight"] = weights.float()
            p = torch.softmax(scores.float(), -1).sort(-1, descending=True).values
            k = chosen.shape[-1]
            gap = min(gap, ((p[:, k - 1] - p[:, k]) / p[:, k - 1]).min().item())
        greedy, seen = [], list(ids)
        for _ in range(NEW_TOKENS):
            last = model(torch.tensor([seen]), use_cache=False).logits[0, -1]
            greedy.append(int(last.argmax()))
            seen.append(greedy[-1])
        prompts[name] = {"ids": ids}
        modes[name] = {"greedy": greedy, "router_min_relative_gap": gap}
    golden = folder / "golden"
    golden.mkdir(parents=True, exist_ok=True)
    results = {key: value.contiguous().clone() for key, value in results.items()}
    save_file(results, str(golden / f"{layout}-f32.safetensors"))
    manifest = {"detail_prompt": "len3", "prompts": prompts, "modes": {f"{layout}/f32": modes}}
    write_json(golden / "manifest.json", manifest)


def yarn(out):
    source = out / "tiny-c" / "bf16"
    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = 256
    config["rope_scaling"] = {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    }
    folder = out / "yarn"
    write_json(folder / "bf16" / "config.json", config)
    (folder / "bf16" / "model.safetensors").unlink(missing_ok=True)
    (folder / "bf16" / "model.safetensors").symlink_to("../../tiny-c/bf16/model.safetensors")
    model = Qwen3NextForCausalLM.from_pretrained(str(folder / "bf16"), dtype=torch.float32).eval()
    record(model, folder, "bf16", config["vocab_size"])


def qwen3_moe(out):
    """Per-expert names, as they are published."""
    config = {
        "vocab_size": 336, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "norm_topk_prob": True, "rope_theta": 1000000.0, "eos_token_id": 323,
        "tie_word_embeddings": False, "mlp_only_layers": [], "decoder_sparse_step": 1,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).eval()
    init_weights(model, 2201)
    folder = out / "qwen3_moe"
    (folder / "bf16").mkdir(parents=True, exist_ok=True)
    weights = {}
    with torch.no_grad():
        for name, p in model.state_dict().items():
            if name.endswith("norm.weight"):
                p.add_(1.0)
            stored = p.to(torch.bfloat16)
            p.copy_(stored.to(p.dtype))
            prefix, _, last = name.rpartition(".")
            if last == "gate_up_proj":
                for expert, both in enumerate(stored):
                    gate, up = both.chunk(2)
                    weights[f"{prefix}.{expert}.gate_proj.weight"] = gate.clone()
                    weights[f"{prefix}.{expert}.up_proj.weight"] = up.clone()
            elif last == "down_proj" and prefix.endswith("experts"):
                for expert, down in enumerate(stored):
                    weights[f"{prefix}.{expert}.down_proj.weight"] = down.clone()
            else:
                weights[name] = stored.clone()
    save_file(weights, str(folder / "bf16" / "model.safetensors"), metadata={"format": "pt"})
    write_json(folder / "bf16" / "config.json", {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **config,
        "torch_dtype": "bfloat16",
    })
    record(model, folder, "bf16", config["vocab_size"])


def qwen3_5_moe(out):
    """With the prefix of a model that also sees images, and experts fused, as it is published."""
    text = {
        "vocab_size": 336, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 4096,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention"], "eos_token_id": 323,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1], "mrope_interleaved": True,
        },
    }
    config = Qwen3_5MoeTextConfig(**text)
    model = Qwen3_5MoeForCausalLM(config).eval()
    init_weights(model, 2101)
    folder = out / "qwen3_5_moe"
    (folder / "bf16").mkdir(parents=True, exist_ok=True)
    weights = {}
    with torch.no_grad():
        for name, p in model.state_dict().items():
            wide = name.endswith("A_log") or name.endswith("linear_attn.norm.weight")
            stored = p if wide else p.to(torch.bfloat16)
            p.copy_(stored.to(p.dtype))
            weights[name.replace("model.", "model.language_model.", 1)] = stored.clone()
    save_file(weights, str(folder / "bf16" / "model.safetensors"), metadata={"format": "pt"})
    write_json(folder / "bf16" / "config.json", {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": {**text, "model_type": "qwen3_5_moe_text", "dtype": "bfloat16"},
    })
    record(model, folder, "bf16", text["vocab_size"])


if __name__ == "__main__":
    out = Path(sys.argv[1])
    yarn(out)
    qwen3_5_moe(out)
    qwen3_moe(out)
