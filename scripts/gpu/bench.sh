#!/usr/bin/env bash
# The benchmarks of reports/, on a machine with a GPU and no cargo: the binary comes from elsewhere.
#
#   [REPETITIONS=N] scripts/gpu/bench.sh BINARY OUT [NAME...]
#
# Writes OUT/NAME/ (run.json, tables, charts) and OUT/NAME.log for each configuration, all of the full
# 80B shape with synthetic weights but `tiny`. MOECTL_TINY_MOE names the built-in model's folder if the
# binary does not hold it.
set -uo pipefail
binary=$1 out=$2
shift 2
mkdir -p "$out"
workloads=$(dirname "${BASH_SOURCE[0]}")/../../workloads
uniform='synth:qwen3-next-80b-a3b?locality=0'
skewed='synth:qwen3-next-80b-a3b'

bench() {
  local name=$1
  shift
  "$binary" bench -v -o "$out/$name" "$@" >"$out/$name.log" 2>&1 || echo "$name: exit $?"
  grep -A4 prefill_tok_s "$out/$name.log"
}

# This machine measured, once per OUT: what plans and predictions are made for.
measure() {
  machine=(--hardware "$out/hardware.json")
  [[ -e $out/hardware.json ]] ||
    "$binary" doctor --measure -o "$out/hardware.json" -q >"$out/doctor.log" 2>&1
}

# What the router picks on other text than bench measures, which are the long documents.
prepare() {
  [[ -e $out/profile.json ]] && return
  local corpus others=()
  for corpus in "$workloads"/*.jsonl; do
    [[ $corpus == */long.jsonl ]] || others+=("$corpus")
  done
  "$binary" profile "${others[@]}" --model "$skewed" --trace "$out/routing.trace" \
    -o "$out/profile.json" -q >"$out/profile.log" 2>&1
}

# planned NAME BUDGET FLAGS...: the placement from there, as OUT/BUDGET.json, and what it says against what
# comes out.
planned() {
  local name=$1 budget=$2 placement=$out/$2.json
  shift 2
  prepare && "$binary" plan --model "$skewed" --trace "$out/routing.trace" --vram "$budget" --ctx 32k \
    "${machine[@]}" -o "$placement" >"$out/plan-$budget.log" 2>&1 ||
    echo "$name: no plan; see the logs in $out"
  bench "$name" --model "$skewed" --placement "$placement" "${machine[@]}" --vram "$budget" --ctx 4k,32k \
    --quality-tokens 0 "$@"
}

run() {
  case $1 in
    tiny) bench tiny ;;
    # No help from the router: every expert as likely as any other. Without --policy static the plan's
    # dynamic policy would run, in the plan's slots.
    uniform-14g)
      "$binary" plan --model "$uniform" --vram 14G --ctx 32k "${machine[@]}" -o "$out/uniform.json" \
        -q >/dev/null
      bench uniform-14g --model "$uniform" --placement "$out/uniform.json" --policy static --vram 14G \
        --ctx 4k,32k -n 128 --quality-tokens 0 "${machine[@]}" ;;
    uniform-ram)
      bench uniform-ram --model "$uniform" --placement "$out/uniform.json" --vram 14G --cpu-moe \
        --ctx 4k -n 128 --quality-tokens 0 "${machine[@]}" ;;
    uniform-vram)
      "$binary" plan --model "$uniform" --vram 48G --ctx 4k "${machine[@]}" -o "$out/vram.json" -q >/dev/null
      bench uniform-vram --model "$uniform" --placement "$out/vram.json" --policy static --ctx 4k \
        -n 128 --quality-tokens 0 "${machine[@]}" ;;
    # Routing as skewed as a sibling's, and the loop closed: this machine measured, other text profiled, a plan
    # for each budget and its policy; at 14G beside static slots and no expert in VRAM, by turns in one
    # process. Together about eight minutes: a call of their own.
    planned-14g)
      planned "$1" 14G -n 256 --repetitions "${REPETITIONS:-4}" --against static,none ;;
    planned-8g) planned "$1" 8G -n 128 --repetitions "${REPETITIONS:-3}" ;;
    planned-24g) planned "$1" 24G -n 128 --repetitions "${REPETITIONS:-3}" ;;
    *) echo "$1: no such configuration" >&2 && return 2 ;;
  esac
}

(($#)) || set -- uniform-14g uniform-vram uniform-ram tiny planned-14g
measure || echo "this machine was not measured; see $out/doctor.log"
for name; do
  run "$name"
done
