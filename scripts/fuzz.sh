#!/usr/bin/env bash
# Feeds fuzz targets with libFuzzer, from the committed corpus on.
#
#   scripts/fuzz.sh [TARGET|all] [RUNS]      default: all, 1,000,000 runs of each
#
# TENSORFERRY_FUZZ_SEED = libFuzzer's seed (printed; default: the time).
# TENSORFERRY_FUZZ_SANITIZER = address (default) or none.
# cargo-fuzz is installed when it is missing. What it finds new is kept in
# fuzz/target/corpus/TARGET, what fails in fuzz/artifacts/TARGET: copy the latter
# to fuzz/corpus/TARGET, and `cargo test fuzzing` feeds it from then on.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:-all}
runs=${2:-1000000}
seed=${TENSORFERRY_FUZZ_SEED:-$(date +%s)}
sanitizer=${TENSORFERRY_FUZZ_SANITIZER:-address}

# What cargo-fuzz needs of the compiler is not stable; the stable one has it.
export RUSTC_BOOTSTRAP=1
cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz

if [ "$target" = all ]; then
    targets=$(cd fuzz/fuzz_targets && ls | sed 's/\.rs$//')
else
    targets=$target
fi
for one in $targets; do
    new=fuzz/target/corpus/$one
    mkdir -p "$new"
    echo "== $one: $runs runs, seed $seed, sanitizer $sanitizer"
    cargo fuzz run -s "$sanitizer" "$one" "$new" "fuzz/corpus/$one" -- \
        -runs="$runs" -seed="$seed" -max_len=4096 -timeout=10 -rss_limit_mb=2048 \
        -print_final_stats=1 -verbosity=1
done
