#!/usr/bin/env bash
# All tests that want a GPU, in one call, on a machine with one and no cargo: binaries come from
# elsewhere (`cargo test --release --features cuda --test 'gpu*' --no-run` names them).
#
#   scripts/gpu/check.sh BIN_DIR OUT
#
# BIN_DIR holds gpu_kernels, gpu_engine, gpu_memory, gpu_goldens, gpu_program (with or without cargo's
# hash behind the name) and moectl. compute-sanitizer comes from the PATH or from COMPUTE_SANITIZER; where there is
# none, its steps are told as not run, and the exit status is 1. gpu_cache and gpu_measure are left out: they
# test what surrounds the GPU, on the emulator.
# MOECTL_TINY_MOE names the built-in model's folder if moectl does not hold it.
#
# Writes OUT/STEP.log and OUT/summary.txt: each step's result, seconds, and last line of results. A step
# that found no GPU has not passed.
set -uo pipefail
if (($# != 2)); then
  echo 'usage: scripts/gpu/check.sh BIN_DIR OUT' >&2
  exit 2
fi
bin=$(cd "$1" && pwd) || exit 2
mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# Where the tests find their data, and the program they start.
export CARGO_MANIFEST_DIR=$PWD MOECTL_BIN=$bin/moectl MOECTL_EMULATE=0
summary=$out/summary.txt
: >"$summary"
failed=0

binary() {
  local found
  for found in "$bin/$1" "$bin/$1"-????????????????; do
    [[ -x $found ]] && echo "$found" && return
  done
  echo "$bin/$1: no such binary" >&2
  return 1
}

say() {
  printf '%-22s %-8s %5s s  %s\n' "$@" | tee -a "$summary"
}

# step NAME LIMIT_S COMMAND...: its output in OUT/NAME.log.
step() {
  local name=$1 limit=$2 start=$SECONDS status=0 result=ok
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  if ((status == 124)); then
    result=TIMEOUT
  elif ((status != 0)); then
    result=FAILED
  elif grep -q 'no CUDA device' "$out/$name.log"; then
    result=NO-GPU
  fi
  [[ $result == ok ]] || failed=1
  say "$name" "$result" $((SECONDS - start)) \
    "$(grep -E 'test result|ERROR SUMMARY|RACECHECK SUMMARY|skipped:' "$out/$name.log" | tail -n 1)"
}

# tests NAME LIMIT_S BINARY ARGS...
tests() {
  local name=$1 limit=$2 path
  path=$(binary "$3") || {
    say "$name" MISSING 0 "$3" && failed=1
    return
  }
  shift 3
  step "$name" "$limit" "$path" --nocapture "$@"
}

# sanitize TOOL NAME LIMIT_S BINARY FILTER...: kernels are hundreds of times slower under it.
sanitize() {
  local tool=$1 name=$2 limit=$3 path
  shift 3
  path=$(binary "$1") || {
    say "$name" MISSING 0 "$1" && failed=1
    return
  }
  if [[ -z $sanitizer ]]; then
    say "$name" NOT-RUN 0 "compute-sanitizer was not found"
    failed=1
    return
  fi
  shift
  # The driver is asked for kernels that another module has, and for parameters after the last.
  step "$name" "$limit" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
    --report-api-errors no "$path" --test-threads=1 "$@"
}

sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer)}
nvidia-smi -L >"$out/gpu.txt" 2>&1 || echo 'nvidia-smi: no GPU' | tee "$out/gpu.txt"

tests kernels 120 gpu_kernels
tests goldens 120 gpu_goldens
tests engine 200 gpu_engine
tests memory 200 gpu_memory
tests two-processes 120 gpu_program

# Every kernel, but not at its largest sizes.
leave_out=(--skip many_tokens --skip many_splits --skip a_long_head)
sanitize memcheck memcheck-kernels 150 gpu_kernels "${leave_out[@]}"
sanitize memcheck memcheck-goldens 150 gpu_goldens every_placement
# The slowest tool; side by side, as the instrumented kernels wait more than they compute.
parts=()
for part in attention delta_net linear experts prefill router sample; do
  (
    failed=0
    sanitize racecheck "racecheck-$part" 300 gpu_kernels "$part::" "${leave_out[@]}"
    exit "$failed"
  ) &
  parts+=($!)
done
for part in "${parts[@]}"; do
  wait "$part" || failed=1
done

((failed == 0)) && echo 'all passed' | tee -a "$summary" || echo 'not all passed' | tee -a "$summary"
exit "$failed"
