#!/bin/sh
# Compares two builds of moectl, interleaved, and writes what CI shows: job summary, JUnit, trackers' JSON,
# OpenMetrics, charts.
#
#   scripts/ci/bench.sh BASE HEAD FOLDER [flags of `moectl bench`]
#
# BASE and HEAD are moectl binaries. MAX_SLOWDOWN is the share that fails, 5% if unset. The exit code is that of
# `moectl bench --fail-above`: 0 pass, 3 worse, 1 undecided or an error, 2 wrong flags.
set -eu

if [ $# -lt 3 ]; then
    echo "usage: $0 BASE HEAD FOLDER [flags of moectl bench]" >&2
    exit 2
fi
base=$1 head=$2 out=$3
shift 3

status=0
"$head" bench --against-binary "$base" --fail-above "${MAX_SLOWDOWN:-5%}" \
    -o "$out/bench" --ci "$out/ci" "$@" || status=$?

# On GitHub the summary appears on the page of the run.
if [ -n "${GITHUB_STEP_SUMMARY:-}" ] && [ -f "$out/ci/summary.md" ]; then
    cat "$out/ci/summary.md" >>"$GITHUB_STEP_SUMMARY"
fi
exit "$status"
