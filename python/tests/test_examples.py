"""Every example, run as a user would run it, and every bench with sizes that measure nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorferry

HERE = Path(__file__).resolve().parent
EXAMPLES, BENCHES = HERE.parent / "examples", HERE.parent / "benches"
TIMEOUT_S = 300
KERAS, GRPC, SUMS = ("keras", "tensorflow"), ("grpc", "grpc_tools"), ("google_crc32c", "blake3")
# What a script imports at its top, beside tensorferry and numpy.
IMPORTS = {"keras_to_server.py": KERAS, "keras_callback.py": KERAS, "plain_grpc.py": (*GRPC, *SUMS)}


def run(script: str | Path, *arguments: str) -> list[str]:
    """Runs an example, or a script elsewhere; gives the lines that it printed."""
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert found.returncode == 0, f"{found.stdout}\n{found.stderr}"
    return found.stdout.splitlines()


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@needs(*KERAS)
def test_keras_to_server() -> None:
    lines = run("keras_to_server.py", "--epochs", "1")
    assert lines[0].startswith("4 tensors, 4612 bytes, "), lines
    assert lines[-1] == "the predictions are equal", lines


def test_resume_after_kill() -> None:
    lines = run("resume_after_kill.py", "--mib", "32")
    assert lines[0].startswith("cut off: "), lines
    assert lines[-1] == "all bytes are equal", lines


@needs(*GRPC, *SUMS)
def test_plain_grpc(tmp_path: Path) -> None:
    with tensorferry.Server(tmp_path / "root") as server:
        first = run("plain_grpc.py", server.address, "runs/plain", "--mib", "3")
        assert first == [
            "pushed 1 tensor, 3146752 bytes, unchanged: False",
            "pulled (3073, 256) of float32: the bytes are equal",
        ]
        again = run("plain_grpc.py", server.address, "runs/plain", "--mib", "3")
        assert again[0] == "pushed 1 tensor, 3146752 bytes, unchanged: True"
        # What a foreign client pushed is a checkpoint like any other.
        landed = tensorferry.open(tmp_path / "root/runs/plain")
        assert landed["layer.weight"].shape == (3073, 256)


@needs(*GRPC, *SUMS)
def test_plain_grpc_says_why_it_was_refused(tmp_path: Path) -> None:
    with tensorferry.Server(tmp_path / "root") as server:
        command = [sys.executable, str(EXAMPLES / "plain_grpc.py"), server.address, "../up"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert found.returncode != 0
    assert "INVALID_ARGUMENT" in found.stderr


def scripts(folder: Path) -> list:
    """Every script of a folder, with what it needs."""
    names = sorted(path.name for path in folder.glob("*.py") if path.name != "harness.py")
    return [pytest.param(name, marks=needs(*IMPORTS.get(name, ()))) for name in names]


@pytest.mark.parametrize("example", scripts(EXAMPLES))
def test_help_is_the_text_of_the_example(example: str) -> None:
    assert "usage:" in run(example, "--help")[0]


# ---------------------------------------------------------------- benches


def figures(bench: str, tmp_path: Path, *arguments: str) -> list[dict]:
    """What a bench found; afterwards nothing of it is left."""
    lines = run(BENCHES / bench, *arguments, "--rounds", "1", "--workdir", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    return [json.loads(line) for line in lines]


def test_bench_save_file_vs_push(tmp_path: Path) -> None:
    found = figures("save_file_vs_push.py", tmp_path, "--bytes", "1M", "--count", "3")
    assert [row["detect_mutation"] for row in found] == [True, False]
    assert all(row["gib_per_s"] > 0 and len(row["seconds"]) == 1 for row in found)


@needs(*GRPC)
def test_bench_save_file_vs_grpcio(tmp_path: Path) -> None:
    found = figures("save_file_vs_grpcio.py", tmp_path, "--bytes", "1M", "--count", "2")
    assert [row["peer"] for row in found] == ["floats_unary", "floats_stream", "chunks"]
    for row in found:
        assert row["speedup"] == pytest.approx(row["peer_seconds"][0] / row["save_seconds"][0], rel=0.01)


def test_bench_interrupt(tmp_path: Path) -> None:
    (found,) = figures("interrupt.py", tmp_path, "--bytes", "16M", "--count", "4", "--seconds", "15")
    assert 0 < found["seconds"] < 10
    assert found["resumed_mib"][0] >= found["safe_mib"][0] > 0
    assert found["again_mib"][0] < found["total_mib"] == 16


@needs(*KERAS)
def test_bench_keras_callback(tmp_path: Path) -> None:
    arguments = ("--bytes", "64K", "--steps", "6", "--every", "2", "--batch", "4")
    (found,) = figures("keras_callback.py", tmp_path, *arguments)
    assert found["steps_ratio"] <= found["steps_ratio_with_copies"]
    assert found["saved_bytes_each_run"] > 3 * 3 * 60_000


@pytest.mark.parametrize("bench", scripts(BENCHES))
def test_help_of_a_bench_says_what_it_measures(bench: str) -> None:
    assert "Figures" in "\n".join(run(BENCHES / bench, "--help"))
