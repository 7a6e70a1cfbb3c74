#!/usr/bin/env bash
# Benchmarks on a machine with a GPU and no cargo: the binary comes from elsewhere.
#
#   scripts/gpu/bench.sh BINARY OUT [bench flags...]
#
# Writes OUT/<name>/run.json, tables and charts per configuration. Without flags: the full 80B shape
# with synthetic weights at several budgets.
set -euo pipefail
binary=$1 out=$2
shift 2
mkdir -p "$out"
if (($#)); then
  "$binary" bench -o "$out/run" "$@" 2>&1 | tee "$out/run.log"
  exit
fi
model='synth:qwen3-next-80b-a3b?locality=0'
"$binary" doctor --json >"$out/doctor.json" || true
"$binary" bench --model "$model" --vram 14G --ctx 4k,32k -n 128 --repetitions 5 --quality-tokens 0 \
  -o "$out/14G" 2>&1 | tee "$out/14G.log"
