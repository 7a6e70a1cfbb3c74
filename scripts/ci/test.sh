#!/bin/sh
# Runs the workflow's comparison as far as a shell can: no slow-down passes, a seeded one fails, and both publish
# summary, JUnit, trackers' JSON and charts.
#
#   [SLOWER=1.1] [MAX_SLOWDOWN=5%] scripts/ci/test.sh [moectl]
#
# A machine that does other work beside needs a wider gate, and a slow-down beyond it.
set -eu
cd "$(dirname "$0")/../.."
moectl=$(realpath "${1:-target/release/moectl}")
slower=${SLOWER:-1.1}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

compare() { # name, slow-down, expected exit code
    out=$folder/$1
    mkdir -p "$out"
    # The baseline is measured faster by this factor, which makes HEAD the slower one.
    status=0
    MOECTL=$moectl SLOWER=$(awk "BEGIN { print 1 / $2 }") GITHUB_STEP_SUMMARY=$out/step-summary.md \
        scripts/ci/bench.sh scripts/ci/slower.py "$moectl" "$out" --ctx 256 -n 16 --quality-tokens 64 \
        >"$out/log" 2>&1 || status=$?
    if [ "$status" -ne "$3" ]; then
        cat "$out/log"
        echo "$1: exit code $status, expected $3" >&2
        exit 1
    fi
    for file in step-summary.md ci/summary.md ci/verdict.json ci/junit.xml ci/bencher.json \
        ci/benchmark-bigger-is-better.json ci/benchmark-smaller-is-better.json ci/openmetrics.txt \
        bench/report.html bench/report.md bench/throughput.png bench/compare.png; do
        [ -s "$out/$file" ] || { echo "$1: no $file" >&2; exit 1; }
    done
}

compare none 1.0 0
compare seeded "$slower" 3
grep -q '<failure' "$folder/seeded/ci/junit.xml"
grep -q 'verdict: FAIL' "$folder/seeded/log"
if grep -q '<failure' "$folder/none/ci/junit.xml"; then exit 1; fi
echo "scripts/ci: no slow-down passes, one of $slower fails"
