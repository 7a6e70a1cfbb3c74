#!/bin/sh
# Runs the unit tests of the cpu backend under valgrind, which knows no AVX-512: kernels run as plain
# Rust and on AVX2. Any error fails. Left out: a test that starts thousands of threads, and one that
# walks through all of exp.
set -eu
cd "$(dirname "$0")/.."
test_binary=$(cargo test --release --lib --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*moectl-[^"]*\)".*/\1/p' | tail -n 1)
exec valgrind --error-exitcode=9 --quiet --fair-sched=yes "$test_binary" backend::cpu:: \
    --test-threads=1 --skip a_thousand_pools --skip exp_and_silu
