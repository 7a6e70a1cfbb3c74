#!/bin/sh
# Compares a binary with itself, again and again, beside a load that comes and goes: whatever is found to be
# worse is wrong. Tells how many comparisons passed, were undecided and failed; fails if more than 1 in 100 did.
#
#   scripts/ci/aa.sh [moectl] [comparisons] [flags of `moectl bench`]
#
# MAX_SLOWDOWN is the share that fails, 5% if unset. A comparison takes about half a minute on two cores.
set -eu
cd "$(dirname "$0")/../.."
moectl=$(realpath "${1:-target/release/moectl}")
comparisons=${2:-20}
[ $# -ge 2 ] && shift 2 || shift $#
[ $# -gt 0 ] || set -- --ctx 128 -n 16 --quality-tokens 0
folder=$(mktemp -d)
load=
end() {
    [ -z "$load" ] || kill "$load" 2>/dev/null || true
    rm -rf "$folder"
}
trap end EXIT

pass=0 undecided=0 fail=0 i=0
while [ "$i" -lt "$comparisons" ]; do
    i=$((i + 1))
    # One core busy for some seconds in every ten, at other times in every comparison.
    (while :; do
        timeout $((i % 5 + 1)) sh -c 'while :; do :; done' || true
        sleep $((5 - i % 5))
    done) &
    load=$!
    status=0
    "$moectl" bench --against-binary "$moectl" --fail-above "${MAX_SLOWDOWN:-5%}" -o "$folder/$i" "$@" \
        >"$folder/log" 2>&1 || status=$?
    kill "$load"
    wait "$load" 2>/dev/null || true
    load=
    case $status in
        0) pass=$((pass + 1)) ;;
        1) undecided=$((undecided + 1)) ;;
        3) fail=$((fail + 1)) ;;
        *) cat "$folder/log"; exit "$status" ;;
    esac
    [ "$status" -eq 0 ] || { echo "comparison $i: exit code $status"; cat "$folder/log"; }
done
echo "$comparisons comparisons of a binary with itself: $pass passed, $undecided undecided, $fail failed"
[ $((100 * fail)) -le "$comparisons" ]
