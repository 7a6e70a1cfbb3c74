#!/usr/bin/env python3
"""bf16 tiny MoE -> the bitsandbytes NF4 checkpoint that is built in, with reference outputs.

    python3 quantize.py BF16_DIR DATA_DIR OUT_DIR

BF16_DIR is train.py's output, DATA_DIR prepare.py's (tokenizer, valid.npz).
Needs transformers 4.57.6 (5.x cannot load per-expert NF4), bitsandbytes 0.50.2, torch on the CPU
(scripts/requirements-compare.txt).
Writes OUT_DIR/model/ (the checkpoint), OUT_DIR/golden.json (prompts, token ids, f32 top logits, greedy
continuations with their smallest top-1/top-2 margin, router picks, held-out loss of bf16 and NF4) and
OUT_DIR/heldout_tokens.json (the text of that loss).
"""
import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

PROMPTS = {
    "chat": '<|im_start|>user\nWhat is the meaning of the noun "river"?<|im_end|>\n<|im_start|>assistant\n',
    "code": "def fibonacci(n):\n", "prose": "And it came to pass in those days, that",
    "math": "Problem: What is 12 + 30?\nAnswer:", "spanish": "La función devuelve",
    "docs": "The SELECT statement", "german": "Um den Cursor in die Zelle",
}
ROWS, ROW_TOKENS = 24, 512                                # of the held-out text


def plain_path(model):
    """bitsandbytes' AVX512-BF16 repacking rounds absmax; keep the exact dequantization."""
    for m in model.modules():
        if hasattr(m, "support_avx512bf16_for_cpu"):
            m.support_avx512bf16_for_cpu = False
    return model.eval()


@torch.no_grad()
def heldout_loss(model, tokens):
    total = 0.0
    for row in torch.from_numpy(tokens.astype(np.int64)).view(ROWS, ROW_TOKENS):
        logits = model(row[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, row[1:]).item()
    return total / ROWS


@torch.no_grad()
def record(model, tok):
    out = {}
    for name, text in PROMPTS.items():
        ids = tok(text, return_tensors="pt").input_ids
        full = model(ids, output_router_logits=True)
        top = full.logits[0, -1].float().topk(8)
        greedy, margin = ids, float("inf")
        for _ in range(48):
            best = model(greedy).logits[0, -1].float().topk(2)
            margin = min(margin, (best.values[0] - best.values[1]).item())
            greedy = torch.cat([greedy, best.indices[None, :1]], 1)
        picks = [sorted(r.float().softmax(-1).topk(8).indices[-1].tolist()) for r in full.router_logits]
        out[name] = {"text": text, "ids": ids[0].tolist(), "top_ids": top.indices.tolist(),
                     "top_logits": [round(v, 6) for v in top.values.tolist()],
                     "greedy_ids": greedy[0, ids.shape[1]:].tolist(), "greedy_text": tok.decode(greedy[0, ids.shape[1]:]),
                     "last_token_experts": picks, "greedy_min_margin": round(margin, 6)}
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("bf16", type=Path, metavar="BF16_DIR"); ap.add_argument("data", type=Path, metavar="DATA_DIR")
    ap.add_argument("out", type=Path, metavar="OUT_DIR")
    a = ap.parse_args()
    src, out = a.bf16, a.out
    valid = np.load(a.data / "valid.npz")["tokens"][:ROWS * ROW_TOKENS]
    if len(valid) < ROWS * ROW_TOKENS:
        ap.error(f"{a.data / 'valid.npz'}: {len(valid)} tokens, expected at least {ROWS * ROW_TOKENS}; fetch more text")
    flat = out / "bf16-457"; shutil.rmtree(flat, ignore_errors=True); shutil.copytree(src, flat)
    cfg = json.loads((flat / "config.json").read_text())
    rope = cfg.pop("rope_parameters", None)
    if rope:                                              # 4.57 reads the flat spelling
        cfg["rope_theta"], cfg["partial_rotary_factor"] = rope["rope_theta"], rope["partial_rotary_factor"]
    cfg["full_attention_interval"] = 4
    (flat / "config.json").write_text(json.dumps(cfg, indent=1))
    for f in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(a.data / f, flat / f)
    tok = AutoTokenizer.from_pretrained(flat)
    q = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                           bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head", "gate"])
    nf4 = AutoModelForCausalLM.from_pretrained(flat, quantization_config=q, dtype=torch.bfloat16, device_map={"": "cpu"})
    nf4.save_pretrained(out / "model", max_shard_size="1GB")
    for f in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(flat / f, out / "model" / f)
    del nf4
    model = plain_path(AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32, device_map={"": "cpu"}))
    for m in model.modules():
        if hasattr(m, "compute_dtype"):
            m.compute_dtype = torch.float32
    golden = {"compute": "f32", "prompts": record(model, tok), "heldout_loss_nf4": heldout_loss(model, valid)}
    bf = AutoModelForCausalLM.from_pretrained(flat, dtype=torch.float32).eval()
    golden["heldout_loss_bf16"] = heldout_loss(bf, valid)
    golden["heldout"] = (f"mean over {ROWS} rows of {ROW_TOKENS} tokens (heldout_tokens.json) of the mean cross entropy of "
                         f"tokens 2..{ROW_TOKENS} given what precedes, in nats")
    (out / "heldout_tokens.json").write_text(json.dumps({"rows": ROWS, "row_tokens": ROW_TOKENS, "tokens": valid.tolist()}))
    (out / "golden.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False))
    print({k: v for k, v in golden.items() if k.startswith("heldout")})
    for k, v in golden["prompts"].items():
        print(k, repr(v["greedy_text"][:160]))


if __name__ == "__main__":
    main()
