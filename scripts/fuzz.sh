#!/usr/bin/env bash
# Feeds fuzz targets with libFuzzer, from the committed corpus on, and prints a table.
#
#   scripts/fuzz.sh [TARGET|all] [RUNS]      default: all, 1,000,000 runs of each
#   scripts/fuzz.sh mutate [TARGET|all] [RUNS]
#
# `mutate` feeds the seeded mutations of `cargo test` instead, in a release build, without
# what libFuzzer needs: more in the same time, led by nothing.
#
# TENSORFERRY_FUZZ_SEED = the seed (printed; default: the time).
# TENSORFERRY_FUZZ_SANITIZER = address (default) or none.
# cargo-fuzz is installed when it is missing. What it finds new is kept in
# fuzz/target/corpus/TARGET, what fails in fuzz/artifacts/TARGET: copy the latter
# to fuzz/corpus/TARGET, and `cargo test fuzzing` feeds it from then on. A target that
# fails does not keep the others from being run; the script ends with 1 then.
set -euo pipefail
cd "$(dirname "$0")/.."

mode=libfuzzer
[ "${1:-}" = mutate ] && { mode=mutate; shift; }
target=${1:-all}
runs=${2:-1000000}
seed=${TENSORFERRY_FUZZ_SEED:-$(date +%s)}
sanitizer=${TENSORFERRY_FUZZ_SANITIZER:-address}
known=$(cd fuzz/fuzz_targets && ls | sed 's/\.rs$//')
targets=$target
[ "$target" = all ] && targets=$known

# The name of the test that feeds a target.
declare -A tests=([npy]=npy_headers [safetensors]=safetensors_headers [sender_frames]=streams_of_sender_frames
    [receiver_frames]=receiver_frames [journal]=journals [roles]=schedules_of_both_roles [chunk]=encoded_chunks
    [names]=names [gguf]=gguf_headers [onnx]=onnx_models [tensorflow_index]=tensorflow_indexes
    [tensorflow_graph]=tensorflow_graphs [saved_model]=saved_models [archive]=archives [torch]=pickles_of_pytorch
    [hdf5]=headers_of_hdf5)

log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
table=$(printf '%-16s %14s %10s %12s %s\n' target executions seconds "a second" result)
row() { table+=$'\n'$(printf '%-16s %14s %10s %12s %s' "$@"); }

if [ "$mode" = mutate ]; then
    cargo test --locked --release --lib --no-run
else
    # What cargo-fuzz needs of the compiler is not stable; the stable one has it.
    export RUSTC_BOOTSTRAP=1
    cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
fi
for one in $targets; do
    begun=$(date +%s)
    result=ok
    if [ "$mode" = mutate ]; then
        echo "== $one: $runs mutations, seed $seed"
        TENSORFERRY_FUZZ_RUNS=$runs TENSORFERRY_FUZZ_SEED=$seed cargo test --locked --release --lib -- \
            --exact "fuzzing::tests::${tests[$one]}" --nocapture 2>&1 | tee "$log" || result=FAILED
        executed=$(sed -n "s/^.*$one: \([0-9]*\) mutations in.*/\1/p" "$log" | tail -1)
    else
        new=fuzz/target/corpus/$one
        mkdir -p "$new"
        dictionary=()
        [ -f "fuzz/dictionaries/$one.dict" ] && dictionary=(-dict="fuzz/dictionaries/$one.dict")
        echo "== $one: $runs runs, seed $seed, sanitizer $sanitizer"
        cargo fuzz run -s "$sanitizer" "$one" "$new" "fuzz/corpus/$one" -- \
            -runs="$runs" -seed="$seed" -max_len=4096 -timeout=10 -rss_limit_mb=2048 \
            "${dictionary[@]}" -print_final_stats=1 -verbosity=1 2>&1 | tee "$log" || result=FAILED
        executed=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -1)
    fi
    seconds=$(($(date +%s) - begun))
    [ "$result" = ok ] || failed=1
    row "$one" "${executed:-0}" "$seconds" "$((${executed:-0} / (seconds > 0 ? seconds : 1)))" "$result"
done
printf '\n%s\n' "$table"
exit "$failed"
