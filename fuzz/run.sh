#!/usr/bin/env bash
# Fuzzes parsers with libFuzzer: fuzz/run.sh SECONDS [TARGET...]   [default: every target]
#
# Needs no nightly: the coverage that libFuzzer steers by is asked of LLVM through stable flags; address
# sanitizing, which the parsers (safe code) hardly need, is left to `cargo +nightly fuzz run TARGET`. A finding is
# written to fuzz/artifacts/TARGET; once mended it goes to fuzz/findings/TARGET, which `cargo test` reads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

seconds=${1:?usage: fuzz/run.sh SECONDS [TARGET...]}
shift
targets=("$@")
[ $# -gt 0 ] || mapfile -t targets < <(ls fuzz_targets | sed 's/\.rs$//')

host=$(rustc -vV | sed -n 's/^host: //p')
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
# With a target named, build scripts are not instrumented.
args=()
for target in "${targets[@]}"; do args+=(--bin "$target"); done
cargo build --release --locked --target "$host" "${args[@]}"

failed=0
for target in "${targets[@]}"; do
  mkdir -p "corpus/$target" "artifacts/$target"
  echo "== $target"
  seeds=("seeds/$target")
  [ -d "findings/$target" ] && seeds+=("findings/$target")
  "target/$host/release/$target" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -max_len=16384 \
    -artifact_prefix="artifacts/$target/" -print_final_stats=1 "corpus/$target" "${seeds[@]}" \
    >"artifacts/$target.log" 2>&1 || { failed=1; tail -n 30 "artifacts/$target.log"; }
  grep -E "stat::(number_of_executed_units|new_units_added|slowest_unit)" "artifacts/$target.log" || true
done
exit "$failed"
