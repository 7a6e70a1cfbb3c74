"""What the golden scripts have in common: seeds, weights, files."""

import hashlib
import json
from pathlib import Path

import torch

NEW_TOKENS = 32


def rng(*key) -> torch.Generator:
    """A generator seeded from a tuple of printable things."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def write_json(path: Path, obj) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(obj, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def init_weights(model, seed) -> None:
    """Random weights with enough contrast: spread-out logits and router scores, and
    decay rates between "forget at once" and "remember hundreds of tokens"."""
    with torch.no_grad():
        for name, p in model.state_dict().items():
            g = rng(seed, name)
            n = lambda std=1.0, mean=0.0: torch.randn(p.shape, generator=g) * std + mean
            u = lambda lo, hi: torch.rand(p.shape, generator=g) * (hi - lo) + lo
            fan = p.shape[-1] ** -0.5
            if name.endswith("embed_tokens.weight"):
                w = n(1.0)
            elif name.endswith("lm_head.weight"):
                w = n(3.0 * fan)
            elif name.endswith("A_log"):
                w = torch.log(u(0.02, 3.0))
            elif name.endswith("dt_bias"):
                w = u(-5.0, 0.5)
            elif name.endswith("conv1d.weight"):
                w = n(0.45)
            elif name.endswith("linear_attn.norm.weight"):
                w = n(0.1, 1.0)
            elif name.endswith("norm.weight"):           # zero-centred RMSNorm
                w = n(0.15)
            elif name.endswith("mlp.gate.weight"):
                w = n(2.0 * fan)
            elif "o_proj" in name or "out_proj" in name or "down_proj" in name:
                w = n(0.8 * fan)                         # keep each block's share of the residual modest
            elif "q_proj" in name or "k_proj" in name:
                w = n(1.2 * fan)
            else:
                w = n(1.3 * fan)
            p.copy_(w.to(p.dtype))
