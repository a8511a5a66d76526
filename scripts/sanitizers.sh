#!/usr/bin/env bash
# Runs tests under a sanitizer of the compiler: memory errors (address) or data races
# (thread).
#
#   scripts/sanitizers.sh [address|thread] [ARGUMENTS OF cargo test]
#
# Default: address, with the library's tests and the integration tests that push. Builds lie
# in target/sanitize/NAME. The first build takes minutes.
#
# `thread` builds the standard library along, so that its locks are seen, and needs its source
# (rustup component add rust-src). scripts/thread_suppressions.txt says what is reported and
# is no race.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-address} in
    thread | address) kind=${1:-address}; shift || true ;;
    *) echo "usage: scripts/sanitizers.sh [address|thread] [ARGUMENTS OF cargo test]" >&2; exit 2 ;;
esac
tests=("$@")
# Which stage is the slowest is not known where everything is slow.
[ ${#tests[@]} -gt 0 ] || tests=(--lib --test transfer --test resume --test lanes --test two_writers --test hostile_chunks
    --test pull -- --skip throttle_tests)

# What these flags need is not stable; the stable compiler has it.
export RUSTC_BOOTSTRAP=1
# Everything is some ten times slower: fewer of what is many.
export TENSORFERRY_SEEDS=${TENSORFERRY_SEEDS:-300} TENSORFERRY_FUZZ_RUNS=${TENSORFERRY_FUZZ_RUNS:-500}
export TENSORFERRY_JOURNAL_CASES=${TENSORFERRY_JOURNAL_CASES:-4} TENSORFERRY_CONVERSATIONS=${TENSORFERRY_CONVERSATIONS:-10}
target=$(rustc -vV | sed -n 's/^host: //p')
export TSAN_OPTIONS="halt_on_error=0:exitcode=66:second_deadlock_stack=1:report_thread_leaks=0:suppressions=$PWD/scripts/thread_suppressions.txt"
export ASAN_OPTIONS="detect_stack_use_after_return=1:handle_sigbus=0"

build=()
[ "$kind" = address ] || build=(-Zbuild-std)

echo "== $kind"
RUSTFLAGS="-Zsanitizer=$kind -Cunsafe-allow-abi-mismatch=sanitizer" \
    cargo test "${build[@]}" --locked --no-fail-fast --target "$target" --target-dir "target/sanitize/$kind" "${tests[@]}"
