#!/usr/bin/env bash
# Runs every check of the project and installs what they need.
#
#   scripts/test.sh          everything (what CI runs)
#   scripts/test.sh quick    formatting, lints, cargo tests, documents, landing checks, the Python package
#   scripts/test.sh all      the same as no argument
#
# A part whose tool cannot be had prints `not run: NAME`; under CI=true that is a failure.
# Python packages and the model are kept in ${TENSORFERRY_CACHE:-~/.cache/tensorferry}.
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-all}
case $what in quick | all) ;; *) echo "usage: scripts/test.sh [quick|all]" >&2; exit 2 ;; esac

cache=${TENSORFERRY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tensorferry}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CARGO_TERM_COLOR=never
missing=0

part() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }
not_run() { echo "not run: $1"; missing=1; }

# The system tool, installed where that is possible, out of a package of the same or another name.
need() {
    command -v "$1" >/dev/null && return 0
    local package=${2:-$1}
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get install -y -qq "$package" || { apt-get update -qq && apt-get install -y -qq "$package"; }; } >/dev/null 2>&1 || true
    fi
    command -v "$1" >/dev/null
}

python_packages="numpy==2.4.* h5py==3.16.* safetensors==0.8.* ml_dtypes==0.6.* google-crc32c==1.* blake3==1.0.* lz4==4.4.* h2==4.4.*
    grpcio==1.85.* grpcio-tools==1.85.* grpcio-status==1.85.* grpcio-health-checking==1.85.* grpcio-reflection==1.85.*"
venv=$cache/venv
python_ready() {
    "$venv/bin/python" -c 'import numpy, h5py, safetensors, ml_dtypes, google_crc32c, blake3, lz4.block, h2
import grpc_tools, grpc_status, grpc_health, grpc_reflection' 2>/dev/null
}
need_python() {
    python_ready && return 0
    mkdir -p "$cache"
    # shellcheck disable=SC2086  # the list is words
    { python3 -m venv "$venv" && "$venv/bin/pip" install --quiet --disable-pip-version-check $python_packages; } && python_ready
}

part "formatting"
cargo fmt --all -- --check

# Everything that pushes runs twice: as users do, and with several lanes, a codec and small chunks.
several=(env TENSORFERRY_LANES=3 TENSORFERRY_CODEC=lz4 TENSORFERRY_CHUNK=256K)

part "lints"
cargo clippy --locked --all-targets --features __internals -- -D warnings

part "tests"
cargo test --locked --no-fail-fast

part "tests, several lanes and lz4"
"${several[@]}" cargo test --locked --no-fail-fast --tests

part "documents"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --lib

part "scripts"
python3 -m unittest discover -s tests/tools -p 'test_*.py'

cargo build --locked --bin tensorferry
# A copy: the broken builds below are made in the same place.
binary=$work/tensorferry
cp "${CARGO_TARGET_DIR:-$PWD/target}/debug/tensorferry" "$binary"

part "what lands, seen from Python"
if need_python; then
    python=$venv/bin/python
    "$python" tests/tools/make_checkpoints.py "$work/sources"
    landing=("$python" tests/tools/check_landing.py --binary "$binary" --python "$python")
    made=("$work/sources/every_dtype_st" "$work/sources/every_dtype_npy" "$work/sources/one.npy")
    "${landing[@]}" "${made[@]}"
    "${several[@]}" "${landing[@]}" "${made[@]}"
    "$python" tests/tools/check_export.py --binary "$binary" "${made[@]}"
    "$python" tests/tools/make_formats.py "$work/formats"
    formats=("$work"/formats/npz/[!n]*.npz "$work"/formats/torch/*.p* "$work"/formats/torch/sharded
        "$work"/formats/torch/sharded/*.index.json "$work"/formats/distributed "$work"/formats/hdf5/*)
    "${landing[@]}" --brief "${formats[@]}"
    "$python" tests/tools/check_container.py --binary "$binary" "$work"/sources/every_dtype_st/*.safetensors
    if samples=$(python3 tests/tools/torch_samples.py "$cache/torch_samples"); then
        # shellcheck disable=SC2086  # the list is words
        "${landing[@]}" --brief $samples
    else
        not_run "files of torch.save"
    fi
    if "$python" scripts/fetch_model.py "$cache/model"; then
        "${landing[@]}" "$cache/model" "$cache/model/model.safetensors"
        "${several[@]}" "${landing[@]}" "$cache/model" "$cache/model/model.safetensors"
    else
        not_run "real model"
    fi

    part "a stock gRPC client"
    "$python" tests/interop/run.py --binary "$binary"

    part "kills of a pull"
    "$python" scripts/pull_kills.py --binary "$binary" --workdir "$work" --quick

    part "hostile HTTP/2"
    "$python" tests/tools/hostile_h2.py --binary "$binary" --seconds 1
else
    not_run "landing checks, stock gRPC client, hostile HTTP/2 (Python packages)"
fi

# The package is built with the profile and into the folder of the tests above, so that little is compiled anew.
package_venv=$cache/venv-py
package_packages="maturin==1.* pytest==9.* numpy==2.4.* ml_dtypes==0.6.* safetensors==0.8.* tqdm==4.* fsspec==2026.*"
package_ready() { "$package_venv/bin/python" -c 'import maturin, pytest, numpy, ml_dtypes, safetensors, tqdm, fsspec' 2>/dev/null; }
need_package() {
    package_ready && return 0
    mkdir -p "$cache"
    # shellcheck disable=SC2086  # the list is words
    { python3 -m venv "$package_venv" && "$package_venv/bin/pip" install --quiet --disable-pip-version-check $package_packages; } && package_ready
}

part "Python package"
same_target=(env "CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}")
cargo fmt --manifest-path python/Cargo.toml -- --check
"${same_target[@]}" cargo clippy --locked --manifest-path python/Cargo.toml --lib --bins -- -D warnings
if need_package; then
    "${same_target[@]}" TENSORFERRY_PROFILE=dev "$package_venv/bin/pip" install --quiet --disable-pip-version-check \
        --no-build-isolation --no-deps --force-reinstall ./python
    (cd "$work" && "$package_venv/bin/python" -m pytest -p no:cacheprovider "$OLDPWD/python/tests")
else
    not_run "Python package (Python packages)"
fi

# What follows takes the server or the client down, or looks at every system call.
campaigns() {
    part "kills$1"
    python3 scripts/kill_campaign.py --binary "$binary" --workdir "$work" --bytes 1G \
        --server-kills "${TENSORFERRY_KILLS:-5}" --client-kills "${TENSORFERRY_KILLS:-5}" \
        --seed "${TENSORFERRY_KILL_SEED:-1}"

    part "damage on the way$1"
    python3 tests/tools/corruption_check.py --binary "$binary"

    part "changed sources$1"
    python3 tests/tools/source_change_check.py --binary "$binary"

    if need strace; then
        part "order of syncs$1"
        python3 scripts/check_sync_order.py --binary "$binary"
        python3 scripts/check_sync_order.py --binary "$binary" --durability group --small 80

        part "crashes while publishing$1"
        python3 scripts/publish_crash.py --binary "$binary" --quick

        part "broken builds are noticed$1"
        python3 scripts/mutants.py "${@:2}"
    else
        not_run "order of syncs, crashes while publishing, broken builds (strace)"
    fi
}

# Libraries that take much room have an environment of their own.
large_packages="tensorflow-cpu==2.21.* keras==3.15.* gguf==0.19.* onnx==1.23.* numpy==2.4.* ml_dtypes==0.6.*"
large_venv=$cache/venv-big
large_ready() { "$large_venv/bin/python" -c 'import numpy, ml_dtypes, gguf, onnx, keras, tensorflow' >/dev/null 2>&1; }
need_large() {
    large_ready && return 0
    mkdir -p "$cache"
    # shellcheck disable=SC2086  # the list is words
    { python3 -m venv "$large_venv" && "$large_venv/bin/pip" install --quiet --disable-pip-version-check $large_packages; } && large_ready
}

if [ "$what" = all ]; then
    part "what lands from large libraries"
    if need_large; then
        for maker in tensorflow gguf onnx; do
            "$large_venv/bin/python" "tests/tools/make_$maker.py" "$work/large/$maker" --large
            "$large_venv/bin/python" tests/tools/check_libraries.py --binary "$binary" "$work/large/$maker"
        done
        if python_ready; then
            # Only this environment has Keras, and only the other one what compares.
            "$large_venv/bin/python" tests/tools/make_formats.py "$work/large/formats" 2>/dev/null
            keras=$work/large/formats/keras
            "${landing[@]}" --brief "$keras"/*.keras "$keras"/*.h5 "$keras"/sharded/*.json
        fi
    else
        not_run "what lands from large libraries (Python packages)"
    fi

    part "Python package with TensorFlow and Keras"
    if need_large && package_ready; then
        libraries=$("$large_venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        (cd "$work" && PYTHONPATH=$libraries "$package_venv/bin/python" -m pytest -p no:cacheprovider \
            -k "tensorflow or keras" "$OLDPWD/python/tests")
    else
        not_run "Python package with TensorFlow and Keras (Python packages)"
    fi

    part "faults"
    for tool in strace:strace mkfs.xfs:xfsprogs mkfs.ext4:e2fsprogs prlimit:util-linux; do
        need "${tool%:*}" "${tool#*:}" || not_run "faults (${tool%:*})"
    done
    TENSORFERRY_FAULT_DIR=$work scripts/faults.sh quick

    part "roles swapped: the same faults of a client that pulls"
    TENSORFERRY_TURNED=1 TENSORFERRY_FAULT_POINTS=12 TENSORFERRY_FAULT_DIR=$work \
        scripts/faults.sh quick kills power-ext4 eio ranges flips cuts

    campaigns "" --build
    (
        export TENSORFERRY_LANES=3 TENSORFERRY_CODEC=lz4 TENSORFERRY_CHUNK=256K
        campaigns ", several lanes and lz4" --binaries target/mutants
    )

    part "benches run"
    cargo test --locked --benches --features __internals

    part "measurements run"
    for tool in strace valgrind rsync cc; do
        need "$tool" || not_run "measurements ($tool)"
    done
    for script in count_copies memory_bound versus_rsync resume_start small_tensors; do
        python3 "scripts/$script.py" --binary "$binary" --quick --workdir "$work"
    done
    if need_large; then
        quickly=(--binary "$binary" --quick --python "$large_venv/bin/python")
        python3 scripts/copies_per_format.py "${quickly[@]}" --formats tf-names npz hdf5 pytorch gguf
        python3 scripts/open_formats.py "${quickly[@]}"
        python3 scripts/versus_tensorflow.py "${quickly[@]}"
    else
        not_run "measurements of formats (Python packages)"
    fi
    need tc iproute2 || not_run "long fat link, network cuts (tc)"
    need iptables-legacy iptables || not_run "network cuts (iptables-legacy)"
    for script in long_fat_link slow_lane rate_limit network_cuts; do
        python3 "scripts/$script.py" --binary "$binary" --quick
    done

    part "peers run"
    python3 benches/peers/run.py --binary "$binary" --quick --only ceiling,tensorferry,rsync
    python3 benches/peers/small.py --binary "$binary" --quick
fi

if [ "$missing" = 1 ] && [ "${CI:-}" = true ]; then
    echo "some parts were not run" >&2
    exit 1
fi
printf '\nall of "%s" passed in %s s\n' "$what" "$SECONDS"
