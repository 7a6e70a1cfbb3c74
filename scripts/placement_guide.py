#!/usr/bin/env python3
"""Writes reports/PLACEMENT.md from the committed records and plans made anew from them.

    scripts/placement_guide.py [moectl]

Needs Python's standard library and the program, `target/release/moectl` if it is not named.
"""

import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
REPORTS = ROOT / "reports"
MOECTL = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "target/release/moectl")
MODEL = "synth:qwen3-next-80b-a3b"
GIB = 1 << 30
H200 = "2026-11-29-h200-skewed-14g"
MACHINES = {
    "laptop-4090": ("laptop, RTX 4090 16 GB (modelled)", [6, 8, 10, 12, 14, 16]),
    "h100": ("H100 80 GB, 16 cores (partly measured)", [6, 8, 14, 24, 48, 64, 80]),
    str(REPORTS / H200 / "hardware.json"): (
        "H200, 16 cores (measured)",
        [6, 8, 14, 24, 48, 64, 80],
    ),
}


def plan(*flags):
    """The placement that `moectl plan` makes, or None where it does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(pathlib.Path(folder) / "placement.json")
        command = [MOECTL, "plan", "--json", "-q", "--model", MODEL, "-o", output, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 4:
            return None
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}: {done.stderr}")
        for name, target in [("sweep.png", "sweep"), ("sweep.svg", "sweep")]:
            found = pathlib.Path(folder) / name
            if found.exists():
                shutil.copy(found, REPORTS / "placement" / f"{plan.sweep_name}{found.suffix}")
        return json.loads(done.stdout)


def show_tokens(tokens):
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def slots(placement):
    return sum(layer["slots"] for layer in placement["layers"])


def figures(placement):
    """Slots, hits, decode and prefill of a plan; dashes where it does not fit."""
    if placement is None:
        return ["does not fit", "–", "–", "–"]
    decode = placement["decode"]
    share = slots(placement) / (placement["num_experts"] * len(placement["layers"]))
    hits = statistics.mean(placement["expected_hit_rates"])
    prefill = placement["prefill"]["tok_s"]
    return [f"{share:.0%}", f"{hits:.0%}", f"{decode['tok_s']:.1f}", f"{prefill:.0f}"]


def by_budget():
    parts = []
    for hardware, (name, budgets) in MACHINES.items():
        rows = []
        for budget in budgets:
            flags = ["--hardware", hardware, "--vram", f"{budget}G", "--ctx", "32k"]
            rows.append([f"{budget} GiB", *figures(plan(*flags))])
        header = ["budget", "experts in VRAM", "hits", "decode tok/s", "prefill tok/s"]
        parts.append(f"**{name}**\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def sweeps():
    (REPORTS / "placement").mkdir(exist_ok=True)
    links = []
    for hardware, (name, budgets) in MACHINES.items():
        stem = "h200" if hardware.endswith(".json") else hardware
        plan.sweep_name = stem
        plan(
            "--hardware", hardware, "--vram", "14G", "--ctx", "32k",
            "--sweep", f"{budgets[0]}G..{budgets[-1]}G",
        )  # fmt: skip
        links.append(f"![{name}: against GPU memory](placement/{stem}.png)")
    return "\n\n".join(links)


def by_context():
    rows = []
    for ctx in ["4k", "32k", "128k", "256k"]:
        row = [ctx]
        for kv in ["f16", "int8"]:
            common = ["--vram", "14G", "--ctx", ctx, "--kv", kv]
            for hardware in MACHINES:
                if not hardware.startswith("h100"):
                    placement = plan("--hardware", hardware, *common)
                    row.append("–" if placement is None else f"{placement['decode']['tok_s']:.1f}")
        rows.append(row)
    header = ["context", "laptop, f16", "H200, f16", "laptop, int8", "H200, int8"]
    return table(header, rows)


def by_head():
    rows = []
    for budget in ["3G", "4G", "6G", "14G"]:
        row = [budget]
        for head in ["vram", "ram"]:
            flags = ["--hardware", "laptop-4090", "--vram", budget, "--ctx", "8k", "--head", head]
            row += figures(plan(*flags))[:3:2]
        rows.append(row)
    header = ["budget", "in VRAM: experts", "decode tok/s", "in RAM: experts", "decode tok/s"]
    return table(header, rows)


# The routers of the first layers of the same model, with narrow experts: what they pick is all that is counted.
ROUTERS = f"{MODEL}?layers=4&moe_intermediate_size=64&vocab_size=8192"
DOMAINS = ["chat", "code", "math", "multilingual", "prose"]


def halves():
    """Profiles of every other record of the built-in domains, and of the others, by domain."""
    corpora = [str(ROOT / "workloads" / f"{domain}.jsonl") for domain in DOMAINS]
    for half in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            output = str(pathlib.Path(folder) / "profile.json")
            command = [MOECTL, "profile", *corpora, "-q", "--model", ROUTERS, "--ctx", "512"]
            subprocess.run([*command, "--shard", f"{half}/2", "-o", output], check=True)
            yield json.loads(pathlib.Path(output).read_text())["domains"]


def by_domain():
    """The share of one domain's picks that a list of the hottest quarter of another's experts covers, and
    what LRU hits with as many slots. Lists are made from one half of the records and held to the other."""
    chosen, held_out = halves()
    picks = {domain: [layer["picks"] for layer in chosen[domain]["prefill"]["layers"]] for domain in DOMAINS}
    picks["all five"] = [[sum(of) for of in zip(*layers)] for layers in zip(*picks.values())]
    rows = []
    for name, layers in picks.items():
        row = [name]
        for domain in DOMAINS:
            covered = total = 0
            for source, layer in zip(layers, held_out[domain]["prefill"]["layers"]):
                order = sorted(range(len(source)), key=lambda expert: -source[expert])
                covered += sum(layer["picks"][expert] for expert in order[: len(order) // 4])
                total += sum(layer["picks"])
            row.append(f"{covered / total:.0%}")
        rows.append(row)
    row = ["LRU, no list"]
    for domain in DOMAINS:
        curves = [layer["lru_hit_rate_by_slots"] for layer in held_out[domain]["prefill"]["summary"]]
        row.append(f"{statistics.mean(curve[len(curve) // 4] for curve in curves):.0%}")
    return table(["list made from", *DOMAINS], [*rows, row])


def policies():
    """Held-out hit rates and copies of committed plans, by share of the experts in slots."""
    placement = json.loads((REPORTS / H200 / "placement.json").read_text())
    rows = []
    for share in placement["validation"]["by_share"]:
        for score in share["scores"]:
            mark = " (chosen)" if score["chosen"] else ""
            rows.append(
                [
                    f"{share['share']:.1%}",
                    score["policy"] + mark,
                    f"{score['expert_hit_rate']:.1%}",
                    f"{score['h2d_bytes_per_token'] / 1e6:.1f} MB",
                ]
            )
    return table(["experts in slots", "policy", "hits", "copied per token"], rows)


def measured():
    """Every record of the whole shape on a GPU, with what its decode steps did."""
    rows = []
    for path in sorted(REPORTS.glob("*/run.json")):
        run = json.loads(path.read_text())
        if "cuda" not in run["labels"]["executed_on"] or "tiny" in path.parent.name:
            continue
        for context in run["contexts"]:
            repetitions = context["repetitions"]
            median = lambda of: statistics.median(map(of, repetitions))
            experts = [
                median(lambda r, key=key: (r.get("decode_split") or {}).get(key, 0.0))
                for key in ("experts_vram", "experts_cpu", "experts_pcie")
            ]
            total = sum(experts) or 1.0
            predicted = (context.get("prediction") or {}).get("decode_tok_s")
            rows.append(
                [
                    f"[{path.parent.name}]({path.parent.name}/report.md)",
                    show_tokens(context["context_tokens"]),
                    len(repetitions),
                    f"{median(lambda r: r['decode_tok_s']):.1f}",
                    f"{predicted:.1f}" if predicted else "–",
                    f"{median(lambda r: r['prefill_tok_s']):.0f}",
                    " / ".join(f"{part / total:.0%}" for part in experts),
                ]
            )
    header = ["record", "context", "n", "decode tok/s", "predicted", "prefill tok/s", "VRAM / CPU / PCIe"]
    return table(header, rows)


TEXT = """# Placement guide

Which experts to hold in GPU memory, by what rule, and what each choice gives: for the 80B shape of Qwen3-Next (512
experts a layer, 10 of them per token, 48 layers; 41 GB of NF4), batch 1. Written by `scripts/placement_guide.py` from the
records in this folder and from plans; run it again after new records. **Predicted** figures are plans without a
profile, whose hit curve is one published for another model of 512 experts; **measured** ones are of synthetic weights,
whose routing follows text as a trained router's does.

## In short

- **All experts in VRAM, if they fit** (43 GiB and the context): no layer waits for the CPU, and all hand-offs
  vanish at once. Leaving a part in RAM beside a full card is predicted slower on all machines here.
- **Otherwise as many slots as the budget holds, spread evenly over the layers, with LFU that fades** (half-life about
  four tokens per expert) **and a pay-back test**: an expert moves in only when it is expected to save more than its copy
  costs. LRU hits more often, and copies ten times as much; where RAM bandwidth is the limit, it is predicted slower.
- **Give slots up for context, not the other way round**: what a token reads of keys and values comes first. From 128k
  on an int8 cache gives back half of the slots that context takes.
- **The output matrix in VRAM** as soon as it fits beside the dense weights.
- **No static list.** Chosen on one text it covers little of another; see the first lines of the table of policies.

## Budget

Predicted, context 32k, keys and values in f16. (Prefill is promised two to four times as fast as it was measured on the
H100 and H200 with two f16 terms, see the last table: use those figures for comparisons of budgets only.)

{by_budget}

{sweeps}

## Policies

Hit rates on documents that neither the slots nor the choice were made from, simulated by the object that runs
(`{h200}/placement.json`). `belady` knows the future and bounds the others.

{policies}

## Domains of text

Share of the picks in one half of a domain's records that a list of a quarter of the experts covers, chosen by the other
half of this domain or another, and below what LRU hits with as many slots; chance is 25%. Counted with the routers of
the first four layers of synthetic weights, whose routing follows text.

{by_domain}

A list covers most of its own kind of text, and of another kind little more than chance; one from all kinds lies between
the two in all of them. A cache that changes beats every list, on text it was never told of.

## Context and type of the KV cache

Predicted decode tok/s, 14 GiB.

{by_context}

## Place of the output matrix

Predicted on the laptop, context 8k.

{by_head}

## Measured

Medians; `n` repetitions. The last column is where the chosen experts of a decode step were: in VRAM, computed by the
CPU from RAM, or read by the GPU over PCIe, a share that calibration at load finds.

{measured}

## How to choose for your machine and text

    moectl doctor --measure -o hardware.json          # rates of this machine, by the kernels of this program
    moectl profile my-text.jsonl --trace my.trace     # what the router picks on your text
    moectl plan --hardware hardware.json --trace my.trace --vram 14G --ctx 32k --explain
    moectl bench --placement placement.json --against static,none --ctx 4k,32k

`--explain` tells what a GiB more, the other KV type, the other place of the output matrix and half the context would
give; `bench --against` measures the policy, a set that never changes and no expert in VRAM interleaved on one loaded model.

## What did not pay

- LRU where RAM is the limit: the copies of its misses take the bandwidth that misses are computed with.
- Slots of different number per layer, with a curve that is alike in all of them: the exact solution spreads evenly.
- A few slots only: below some hundred slots their copies cost more than their hits bring, and the plan leaves them empty.
"""


def main():
    plan.sweep_name = ""
    (REPORTS / "PLACEMENT.md").write_text(
        TEXT.format(
            by_budget=by_budget(),
            sweeps=sweeps(),
            policies=policies(),
            by_domain=by_domain(),
            by_context=by_context(),
            by_head=by_head(),
            measured=measured(),
            h200=H200,
        )
    )


if __name__ == "__main__":
    main()
