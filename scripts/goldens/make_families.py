#!/usr/bin/env python3
"""Golden data of other families and of scaled rotary embedding, made with the real libraries.

    pip install transformers==5.24.0 torch==2.15.0 bitsandbytes==0.50.2
    python make_families.py ../../tests/data/goldens

Writes `yarn/`, whose weights are those of `tiny-c/bf16`, `qwen3_5_moe/` and `qwen3_moe/`. As in make_goldens.py
weights are random by seed, results are in f32, single threaded, and greedy tokens go past the end.

The folders `nf4` are the `bf16` ones with each Linear quantized by bitsandbytes, expert by expert, as
transformers 4.57 does where a family's experts are Linears. transformers 5.24, which computes the results, cannot
read such a file: it gets what bitsandbytes makes of the codes again, in f32.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import bitsandbytes.functional as bnbf
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DynamicCache,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from shared import NEW_TOKENS, init_weights, rng, write_json

torch.set_num_threads(1)
PROMPTS = {"len3": 3, "len66": 66, "len130": 130}


def quantized(name, weight):
    """The tensors of a weight in NF4, and what bitsandbytes makes of them in f32."""
    packed, state = bnbf.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    absmax = bnbf.dequantize_blockwise(state.absmax, state.state2) + state.offset
    back = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, 64, "nf4", list(weight.shape), torch.float32)
    parts = {name: packed}
    for key, value in state.as_dict(packed=True).items():
        parts[f"{name}.{key}"] = value
    return parts, back


def is_linear(name, weight):
    """What transformers 4.57 makes 4-bit, but for the output matrix and the router."""
    kept = ("lm_head.weight", "embed_tokens.weight", "mlp.gate.weight")
    return weight.dim() == 2 and name.endswith(".weight") and not name.endswith(kept)


@torch.no_grad()
def nf4(model, folder, vocab, attends_everywhere=False):
    """The checkpoint `bf16` of the folder as `nf4`, per expert, and its results."""
    weights, by_model = {}, model.state_dict()
    for name, stored in load_file(str(folder / "bf16" / "model.safetensors")).items():
        prefix, _, last = name.rpartition(".")
        if last in ("gate_up_proj", "down_proj") and stored.dim() == 3:
            parts = ["gate_proj", "up_proj"] if last == "gate_up_proj" else ["down_proj"]
            singles = {f"{prefix}.{expert}.{part}.weight": rows.contiguous()
                       for expert, both in enumerate(stored) for part, rows in zip(parts, both.chunk(len(parts)))}
        else:
            singles = {name: stored}
        for single, weight in singles.items():
            if not is_linear(single, weight):
                weights[single] = weight.clone()
                continue
            tensors, back = quantized(single, weight)
            weights |= {key: value.clone() for key, value in tensors.items()}
            inner = single.replace("model.language_model.", "model.", 1)
            before, _, after = inner.partition(".experts.")
            if not after:
                by_model[inner].copy_(back)
                continue
            expert, projection, _ = after.split(".")
            fused = by_model[f"{before}.experts.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"][int(expert)]
            rows = back.shape[0]
            fused[rows:].copy_(back) if projection == "up_proj" else fused[:rows].copy_(back)
    (folder / "nf4").mkdir(parents=True, exist_ok=True)
    save_file(weights, str(folder / "nf4" / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((folder / "bf16" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                     "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head", "gate"]}
    write_json(folder / "nf4" / "config.json", config)
    record(model, folder, "nf4", vocab, attends_everywhere)


class HalfCache(DynamicCache):
    """Keys and values as a GPU keeps them: f16."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.half().float(), values.half().float(), *args, **kwargs)


@torch.no_grad()
def record(model, folder, layout, vocab, attends_everywhere=False):
    """Runs the prompts; writes golden/LAYOUT-f32.safetensors, and adds to golden/manifest.json."""
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
        if attends_everywhere:
            # How far f16 keys and values alone move a logit: no GPU that keeps them so can do better.
            half = model(torch.tensor([ids]), past_key_values=HalfCache(config=model.config), use_cache=True).logits[0]
            modes[name]["f16_keys_and_values_move_a_logit_by"] = (half - logits).abs().max().item()
    golden = folder / "golden"
    golden.mkdir(parents=True, exist_ok=True)
    results = {key: value.contiguous().clone() for key, value in results.items()}
    save_file(results, str(golden / f"{layout}-f32.safetensors"))
    path = golden / "manifest.json"
    known = json.loads(path.read_text())["modes"] if path.is_file() else {}
    manifest = {"detail_prompt": "len3", "prompts": prompts, "modes": {**known, f"{layout}/f32": modes}}
    write_json(path, manifest)


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
    record(model, folder, "bf16", config["vocab_size"], attends_everywhere=True)
    nf4(model, folder, config["vocab_size"], attends_everywhere=True)


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
    nf4(model, folder, text["vocab_size"])


if __name__ == "__main__":
    out = Path(sys.argv[1])
    yarn(out)
    qwen3_5_moe(out)
    qwen3_moe(out)
