#!/usr/bin/env bash
# Proves from outside that nothing acknowledged is lost: kills, power cuts, failed syncs, full disks, bad networks.
#
#   scripts/faults.sh [quick|full] [PART...]
#
# quick (the default) takes some 5 minutes, full is what docs/campaigns.md reports. A PART runs alone; without one all run.
# Read from the environment:
#   TENSORFERRY_FAULT_POINTS   faults of every part, instead of those of quick and full
#   TENSORFERRY_SEED           seed of the first episode; 1 unless set
#   TENSORFERRY_FAULT_BINARY   the program to test; the dev build unless set
#   TENSORFERRY_FAULT_DIR      where roots and images lie; the temporary folder unless set
#   TENSORFERRY_FAULT_TABLE    file to which full adds its rows
# The parts guest and reorder need a User-Mode Linux kernel: scripts/power_cut_guest.sh.
# A part that needs root or a tool that is not there says `not run`; under CI=true that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-quick}
case $what in quick | full) ;; *) echo "usage: scripts/faults.sh [quick|full] [PART...]" >&2; exit 2 ;; esac
shift $(($# > 0))

# Part, points in quick, points in full.
all="kills 60 1000
power-ext4 60 500
power-xfs 60 500
syscalls 30 400
eio 30 100
late-cuts 1 1
space 1 1
ranges 1 1
flips 300 10000
cut-staging 4 20
cut-source 2 10
clients 10 200
cuts 10 200
delays 4 8
silence 1 1
cancels 300 10000
guest 0 20
reorder 0 600"
wanted=" $* "
for part in "$@"; do
    grep -q "^$part " <<<"$all" || { echo "no part $part; there are:" $(cut -d' ' -f1 <<<"$all") >&2; exit 2; }
done

# The program of tests/faults, and the binary that it was built beside.
built=$(cargo test --no-run --locked --test faults --message-format json-render-diagnostics)
program=$(python3 -c '
import json, sys
rows = [json.loads(line) for line in sys.stdin if line.startswith("{")]
made = [r["executable"] for r in rows if r.get("executable") and r["target"]["name"] == "faults"]
print(made[-1])' <<<"$built")

options=(--seed "${TENSORFERRY_SEED:-1}" --workdir "${TENSORFERRY_FAULT_DIR:-${TMPDIR:-/tmp}}")
[ -z "${TENSORFERRY_FAULT_BINARY:-}" ] || options+=(--binary "$TENSORFERRY_FAULT_BINARY")
table=${TENSORFERRY_FAULT_TABLE:-}
if [ "$what" = full ]; then
    [ -n "$table" ] || table=$(mktemp)
    options+=(--table "$table")
fi

failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
while read -r part quick full; do
    [ $# = 0 ] || [[ $wanted == *" $part "* ]] || continue
    points=$quick
    [ "$what" = quick ] || points=$full
    # Slow parts are for full alone.
    [ "$points" != 0 ] || continue
    "$program" "$part" --points "${TENSORFERRY_FAULT_POINTS:-$points}" "${options[@]}" </dev/null | tee "$log" ||
        failed=1
    if grep -q '^not run' "$log" && [ "${CI:-}" = true ]; then failed=1; fi
done <<<"$all"

if [ "$what" = full ]; then
    printf '\n%s, %s, %s cores\n\n' "$(date -u +%F)" "$(uname -sr)" "$(nproc)"
    cat "$table"
fi
exit "$failed"
