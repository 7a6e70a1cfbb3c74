#!/usr/bin/env python3
"""Does moectl compute what transformers + bitsandbytes compute?  On any checkpoint that both can read.

    pip install -r scripts/requirements-compare.txt
    python3 scripts/compare_transformers.py MODEL_DIR [--prompt TEXT]... [-n 32]

For each prompt moectl generates N greedy tokens and prints the best logits of every step.  transformers then
runs once, in f32, over the prompt and those tokens: at every step its best token must be the one moectl took,
and its logits must agree within the tolerance.  So each step is judged given the same past, and by induction
the two greedy continuations are equal if all steps are.

A step where the reference's own lead is below twice the tolerance is a tie: either token is right.

Exit status: 0 they agree (ties included), 1 they do not, 2 the comparison could not be made.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PROMPTS = [
    "The river rises in the mountains and",
    "def fibonacci(n):\n    ",
    "Um die Datei zu öffnen, müssen Sie",
    "Problem: What is 12 + 30?\nAnswer:",
]
TOP = 8


class Unusable(Exception):
    """The comparison cannot be made; the message says why and what to do."""


# --------------------------------------------------------------------------
# the two sides


def run_moectl(args, ids):
    """moectl's greedy continuation of `ids`: its JSON object, checked for what is read from it."""
    command = [args.moectl, "run", "--model", str(args.model), "--json", "--temperature", "0", "--ignore-eos",
               "--prompt-ids", ",".join(map(str, ids)), "-n", str(args.tokens), "--logprobs", str(TOP)]
    if args.backend:
        command += ["--backend", args.backend]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    except OSError as e:
        raise Unusable(f"{args.moectl}: {e.strerror}; build it with `cargo build --release`, or name it with --moectl")
    if done.returncode:
        raise Unusable(f"moectl ended with status {done.returncode}: {' '.join(command)}")
    try:
        out = json.loads(done.stdout)
        steps = [{entry["id"]: float(entry["logit"]) for entry in best} for best in out["logprobs"]]
        found = (out["prompt_ids"] == ids, len(out["token_ids"]), len(steps))
    except (ValueError, KeyError, TypeError) as e:
        raise Unusable(f"moectl's JSON: {type(e).__name__}: {e}; expected prompt_ids, token_ids and logprobs")
    if found != (True, args.tokens, args.tokens):
        raise Unusable(f"moectl's JSON: prompt ids {'equal' if found[0] else 'changed'}, {found[1]} token ids, {found[2]} "
                       f"lists of logprobs, expected the prompt as given and {args.tokens} of each")
    return out["token_ids"], steps


def load_reference(directory):
    """The checkpoint in transformers, all arithmetic in f32, NF4 dequantized exactly."""
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM

    layouts = "this release of transformers reads per-expert layouts only: bf16, or NF4 of every Linear"
    try:
        model, info = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32, device_map={"": "cpu"},
                                                           output_loading_info=True)
    except Exception as e:                                         # transformers raises of every kind here
        raise Unusable(f"{directory}: {type(e).__name__}: {e} ({layouts})")
    if info["missing_keys"] or info["mismatched_keys"]:
        lost = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise Unusable(f"{directory}: {len(lost)} tensors are missing or of another shape, first `{lost[0]}` ({layouts})")
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.float()
    for m in model.modules():
        if isinstance(m, bitsandbytes.nn.Linear4bit):
            # The AVX512-BF16 path repacks the weights and rounds absmax to bf16; stay on the exact one.
            m.support_avx512bf16_for_cpu = False
            m.compute_dtype = torch.float32
            m.compute_type_is_set = True
    return model.eval()


def reference_logits(model, prompt_ids, token_ids):
    """`[N, vocab]` f32: the logits that each of the N tokens was, or should have been, the best of."""
    import torch

    ids = torch.tensor([prompt_ids + token_ids[:-1]])
    with torch.no_grad():
        return model(ids, use_cache=False, logits_to_keep=len(token_ids)).logits[0].float()


# --------------------------------------------------------------------------
# the judgement


def compare(logits, token_ids, steps, tolerance):
    """How the reference's `logits` and moectl's `token_ids` and best logits (`steps`) agree, step by step."""
    result = {"equal": 0, "ties": [], "wrong": [], "diff": 0.0, "at": 0, "margin": float("inf")}
    for step, (row, token, best) in enumerate(zip(logits, token_ids, steps)):
        top = row.topk(min(TOP, row.numel()))
        # Id by id, and rank by rank: the second finds an id that is missing from moectl's list, and is
        # not fooled by equal logits at its end.
        diffs = [abs(row[i].item() - logit) for i, logit in best.items()]
        diffs += [abs(a - b) for a, b in zip(top.values.tolist(), sorted(best.values(), reverse=True))]
        if max(diffs) > result["diff"]:
            result["diff"], result["at"] = max(diffs), step
        result["margin"] = min(result["margin"], (top.values[0] - top.values[1]).item())
        expected, lead = top.indices[0].item(), (top.values[0] - row[token]).item()
        found = {"step": step, "moectl": token, "reference": expected, "lead": lead}
        if token == expected:
            result["equal"] += 1
        else:
            result["ties" if lead <= 2 * tolerance else "wrong"].append(found)
    result["ok"] = not result["wrong"] and result["diff"] <= tolerance
    return result


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=Path, metavar="MODEL_DIR", help="checkpoint with config.json and tokenizer.json")
    ap.add_argument("--moectl", default="target/release/moectl", metavar="FILE", help="the binary [default: %(default)s]")
    ap.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated [default: four built-in ones]")
    ap.add_argument("-n", "--tokens", type=int, default=32, metavar="N", help="tokens to generate [default: %(default)s]")
    ap.add_argument("--tolerance", type=float, default=1e-3, metavar="X",
                    help="largest difference of a logit that still agrees [default: %(default)s]")
    ap.add_argument("--backend", default="reference", metavar="NAME",
                    help="moectl's --backend; faster ones need a wider --tolerance [default: %(default)s]")
    args = ap.parse_args()
    if args.tokens < 1:
        ap.error("-n: at least one token is needed")
    if not (args.model / "config.json").is_file():
        ap.error(f"{args.model}: no config.json there; MODEL_DIR is the folder of a checkpoint")
    try:
        from transformers import AutoTokenizer
        import bitsandbytes                                        # noqa: F401  (fails here, not after minutes)
    except ImportError as e:
        raise Unusable(f"{e}; pip install -r scripts/requirements-compare.txt")

    tokenizer = AutoTokenizer.from_pretrained(str(args.model))
    runs = []
    for text in args.prompt or PROMPTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise Unusable(f"prompt {text!r}: no tokens; give it some text")
        runs.append((text, ids, *run_moectl(args, ids)))
    model = load_reference(args.model)                             # after moectl, so that only one is in memory

    print(f"{'prompt':32} {'ids':>5} {'steps':>5} {'equal':>5} {'ties':>4} {'max |diff|':>10} {'min lead':>8}  verdict")
    failed = False
    for text, ids, token_ids, steps in runs:
        r = compare(reference_logits(model, ids, token_ids), token_ids, steps, args.tolerance)
        failed |= not r["ok"]
        shown = repr(text) if len(repr(text)) <= 32 else repr(text)[:29] + "..."
        print(f"{shown:32} {len(ids):5} {len(token_ids):5} {r['equal']:5} {len(r['ties']):4} {r['diff']:10.2e} "
              f"{r['margin']:8.4f}  {'agree' if r['ok'] else 'DIFFER'}")
        for kind, found in [("tie", f) for f in r["ties"]] + [("wrong", f) for f in r["wrong"][:1]]:
            names = {k: f"{found[k]} {tokenizer.decode([found[k]])!r}" for k in ("moectl", "reference")}
            print(f"  {kind} at step {found['step']}: moectl took {names['moectl']}, the reference prefers "
                  f"{names['reference']} by {found['lead']:.6f}" +
                  (", less than twice the tolerance: either is right" if kind == "tie" else ""))
        if len(r["wrong"]) > 1:
            print(f"  and {len(r['wrong']) - 1} more steps with another token")
        if not r["diff"] <= args.tolerance:
            print(f"  a logit of step {r['at']} differs by {r['diff']:.6f}, above the tolerance {args.tolerance:g}")
    print("moectl and transformers differ" if failed else "moectl and transformers agree")
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Unusable as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
