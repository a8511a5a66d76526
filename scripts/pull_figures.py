#!/usr/bin/env python3
"""Measures pulls: against pushes of the same bytes, and the time to the first tensor that can be used.

    pull_figures.py --binary PATH [--bytes N] [--rounds N] [--workdir DIR] [--small]

`--binary` is a release build, `--workdir` a file system in memory for the figures in docs/figures.md. Push, pull and copy
take turns in every round, whole processes timed from their start to their end; the ratio is that of the medians, and of the
rounds one by one. The source is one safetensors file of noise, read before the clock starts. With `--first` the last tensor
of the file is wanted; its time is that at which the event arrives and the file named in it has been compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

TENSORS = 64


class Server:
    """A server on a port of its own."""

    def __init__(self, binary: Path, root: Path, *options: str | Path) -> None:
        words = [binary, "serve", root, "--listen", "127.0.0.1:0", "--format", "json", *options]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout
        self.lines = self.process.stdout
        self.address = json.loads(self.lines.readline())["address"]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def make_source(path: Path, size: int, seed: int) -> np.ndarray:
    """One safetensors file. Returns the bytes of its last tensor."""
    each = size // TENSORS // 4 * 4
    header = {
        f"layer.{i:03}": {"dtype": "F32", "shape": [each // 4], "data_offsets": [i * each, (i + 1) * each]}
        for i in range(TENSORS)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(TENSORS):
            last = random.integers(0, 256, each, dtype=np.uint8)
            file.write(last.tobytes())
    return last


def seconds_of(words: list[str | Path]) -> tuple[float, dict[str, object]]:
    begun = time.perf_counter()
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - begun, json.loads(done.stdout.splitlines()[-1])


def first_tensor(binary: Path, source: str, folder: Path, last: np.ndarray) -> tuple[float, float]:
    """Seconds until the tensor can be used, and until all is published."""
    words = [binary, "pull", source, folder, "--format", "json", "--first", f"layer.{TENSORS - 1:03}"]
    begun = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    ready = None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "ready":
            tensor = np.load(event["path"], mmap_mode="r")
            assert np.array_equal(tensor.view(np.uint8), last), "the first tensor is not what was sent"
            ready = time.perf_counter() - begun
    assert process.wait() == 0 and ready is not None
    return ready, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", type=Path, required=True)
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--first-bytes", type=int, default=4 << 30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--small", action="store_true", help="a trial of this script")
    args = parser.parse_args()
    binary = args.binary.resolve()
    size, first_size = (8 << 20, 32 << 20) if args.small else (args.bytes, args.first_bytes)
    rounds = 2 if args.small else args.rounds
    with tempfile.TemporaryDirectory(dir=args.workdir, prefix="pull-figures-") as name:
        work = Path(name)
        source = work / "model.safetensors"
        make_source(source, size, args.seed)
        near = Server(binary, work / "near", "--export", f"model={source}")
        far = Server(binary, work / "far")
        times: dict[str, list[float]] = {"push": [], "pull": [], "copy": []}
        limits: dict[str, set[str]] = {"push": set(), "pull": set(), "copy": set()}
        for turn in range(rounds + 1):
            commands = {
                "push": [binary, "push", source, f"ferry://{far.address}/pushed", "--format", "json"],
                "pull": [binary, "pull", f"ferry://{near.address}/model", work / "pulled", "--format", "json"],
                "copy": [
                    *[binary, "copy", f"ferry://{near.address}/model", f"ferry://{far.address}/copied"],
                    *["--format", "json"],
                ],
            }
            for way, words in commands.items():
                seconds, done = seconds_of(words)
                assert done["bytes"] == size // TENSORS // 4 * 4 * TENSORS and done["resumed_bytes"] == 0, done
                # The first round warms the machine's pages.
                if turn > 0:
                    times[way].append(seconds)
                    limits[way].add(str(done["bottleneck"]))
                for folder in (work / "pulled", work / "far/pushed", work / "far/copied"):
                    shutil.rmtree(folder, ignore_errors=True)
        for way, all_of in times.items():
            print(f"{way}: median {statistics.median(all_of):.3f} s, {[round(s, 3) for s in all_of]}, {limits[way]}")
        for way in ("pull", "copy"):
            each = [push / other for push, other in zip(times["push"], times[way])]
            median = statistics.median(times["push"]) / statistics.median(times[way])
            print(f"throughput of {way} against push: {median:.3f} of medians, {[round(r, 2) for r in each]}")
        for server in (near, far):
            server.stop()
        source.unlink()
        last = make_source(source, first_size, args.seed)
        near = Server(binary, work / "near", "--export", f"model={source}")
        for _ in range(min(rounds, 3)):
            ready, whole = first_tensor(binary, f"ferry://{near.address}/model", work / "pulled", last)
            print(f"first tensor: {ready:.3f} s of {whole:.3f} s, {100 * ready / whole:.1f} %")
            shutil.rmtree(work / "pulled")
        near.stop()


if __name__ == "__main__":
    main()
