#!/usr/bin/env bash
# Many sequences on one GPU, with a binary that comes from elsewhere: a plan for four of them beside what the
# server then holds, a conversation's second turn, and what it takes to keep a sequence in RAM.
#
#   [MODEL=synth:...] [VRAM=14G] [CTX=32k] [PARALLEL=4] scripts/gpu/sequences.sh BINARY OUT
#
# Writes OUT/placement.json, OUT/metrics.txt, OUT/serve.log and OUT/bench.log.
set -uo pipefail
binary=$1 out=$2
mkdir -p "$out"
model=${MODEL:-synth:qwen3-next-80b-a3b} vram=${VRAM:-14G} ctx=${CTX:-32k} parallel=${PARALLEL:-4}

"$binary" plan --model "$model" --vram "$vram" --ctx "$ctx" --parallel "$parallel" -o "$out/placement.json" -q
"$binary" serve --model "$model" --vram "$vram" --ctx "$ctx" --placement "$out/placement.json" --port 18417 \
  >"$out/serve.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null' EXIT
for _ in $(seq 300); do
  curl -fs http://127.0.0.1:18417/health >/dev/null && break
  kill -0 $server || break
  sleep 1
done
# All sequences in use, each with a prompt of its own.
for i in $(seq "$parallel"); do
  curl -fs http://127.0.0.1:18417/v1/completions -H 'content-type: application/json' \
    -d "{\"prompt\": \"Sequence number $i tells of the river and the town.\", \"max_tokens\": 32}" >/dev/null &
  requests+=($!)
done
wait "${requests[@]}"
curl -fs http://127.0.0.1:18417/metrics >"$out/metrics.txt"
kill $server
wait $server
python3 - "$out" <<'PYTHON'
import json, pathlib, re, sys
out = pathlib.Path(sys.argv[1])
rows = json.loads((out / "placement.json").read_text())["memory"]
planned = sum(row["bytes"] for row in rows if row["tier"] == "vram")
for row in rows:
    if row["tier"] == "vram":
        print(f"{row['component']:20} {row['bytes'] / 2**20:10.1f} MiB")
found = re.search(r"^moectl:vram_bytes(?:{.*})? (\S+)", (out / "metrics.txt").read_text(), re.M)
held = float(found.group(1)) if found else 0.0
print(f"planned {planned / 2**20:.1f} MiB, held {held / 2**20:.1f} MiB: {held / planned - 1:+.2%}")
PYTHON

"$binary" bench -v --model "$model" --vram "$vram" --ctx "$ctx" -n 16 --repetitions 1 --warmups 0 \
  --quality-tokens 0 -o "$out/bench" >"$out/bench.log" 2>&1
grep -E 'second turn|kept prefix' "$out/bench.log"
