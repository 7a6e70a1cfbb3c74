#!/usr/bin/env bash
# Prefill of several binaries on one machine, interleaved: the 80B shape held to 14 GiB, skewed routing, text of
# the built-in corpora. Binaries come from elsewhere; see scripts/gpu/bench.sh.
#
#   CTX=4k,32k KV=f16 REPETITIONS=2 ROUNDS=2 scripts/gpu/ab_prefill.sh OUT BINARY...
#
# Writes OUT/NAME-ROUND/ of each binary and prints its prefill speeds.
set -uo pipefail
out=$1
shift
mkdir -p "$out"
model='synth:qwen3-next-80b-a3b'
for round in $(seq "${ROUNDS:-2}"); do
  for binary; do
    name=$(basename "$binary")-$round
    "$binary" bench --model "$model" --vram "${VRAM:-14G}" --ctx "${CTX:-4k,32k}" -n 16 \
      --repetitions "${REPETITIONS:-2}" --quality-tokens 0 --kv-dtype "${KV:-f16}" -v -o "$out/$name" \
      >"$out/$name.log" 2>&1 || echo "$name: exit $?"
    echo "== $name"
    grep -E -A4 'prefill_tok_s|kernels of a chunk' "$out/$name.log"
  done
done
