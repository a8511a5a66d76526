#!/usr/bin/env python3
"""Measures how soon a TensorFlow checkpoint is there as .npy files, against the way Python offers.

Each round, interleaved: `push CKPT FOLDER` (a whole process, from its start to its end); and TensorFlow in a
process that has imported everything before its clock starts: `tf.train.load_checkpoint`, then `get_tensor` and
`np.save` of every variable. Both write a fresh folder, which is deleted after the clock stops. Then one landed
file is compared with what TensorFlow reads. The goal: Python takes at least 3 times as long.

Measured on tmpfs (judged) and on the file system of --workdir (as information; there a push also syncs,
which np.save does not).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import figures
from figures import GIB, MIB, Figure, harness

GOAL = 3.0
PYTHON_WAY = r"""
import json, os, sys, time
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
import numpy as np
import tensorflow as tf

tf.train.load_checkpoint  # what is imported late is imported now
print("ready", flush=True)
for line in sys.stdin:
    prefix, out = json.loads(line)
    before = os.times()
    begun = time.monotonic()
    os.mkdir(out)
    reader = tf.train.load_checkpoint(prefix)
    count = 0
    for number, (key, dtype) in enumerate(sorted(reader.get_variable_to_dtype_map().items())):
        if dtype != tf.string:
            np.save(os.path.join(out, f"{number}.npy"), reader.get_tensor(key))
            count += 1
    seconds = time.monotonic() - begun
    after = os.times()
    cpu = after.user + after.system - before.user - before.system
    print(json.dumps([seconds, cpu, count]), flush=True)
"""


def main() -> int:
    parser = figures.arguments(__doc__)
    parser.add_argument("--bytes", type=harness.parse_size, default=GIB)
    parser.add_argument("--count", type=int, default=64, help="variables")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--durability", default=None, help="of the pushes; their own default if absent")
    parser.add_argument("--python", type=Path, default=figures.LARGE_PYTHON, help="has TensorFlow")
    args = parser.parse_args()
    if not args.python.exists():
        harness.not_run(f"{args.python} (scripts/test.sh makes it)")
    if args.quick:
        args.bytes, args.count, args.rounds = 16 * MIB, 8, 1
    folders = [figures.TMPFS if figures.TMPFS.is_dir() else args.workdir]
    if figures.file_system(args.workdir) != figures.file_system(folders[0]):
        folders.append(args.workdir)
    status = 0
    for number, folder in enumerate(folders):
        args.workdir = folder
        with figures.figure("a TensorFlow checkpoint as .npy files", args) as figure:
            measure(figure, is_judged=number == 0)
            status |= figure.end()
    return status


class PythonWay:
    """A process that has imported TensorFlow and waits for work."""

    def __init__(self, python: Path) -> None:
        command = [str(python), "-c", PYTHON_WAY]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(command, **pipes)
        self._answer()

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise harness.Failed(f"TensorFlow ended with {self.process.wait()}")
        return line

    def run(self, source: Path, out: Path) -> tuple[float, float, int]:
        """Seconds, processor seconds, tensors."""
        self.process.stdin.write(json.dumps([str(source), str(out)]) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self._answer()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(figure: Figure, is_judged: bool) -> None:
    """All rounds on one file system."""
    args, folder = figure.args, figure.folder
    extra = ["--count", str(args.count), "--bytes", str(args.bytes), "--seed", str(args.seed)]
    source = figures.make_format(args.python, "tf-bundle", folder / "source", extra)
    push = figures.flags(args.binary, "push", {"durability": args.durability})
    time.sleep(figures.SETTLE_S)
    python = PythonWay(args.python)
    ratios: list[float] = []
    try:
        for number in range(args.rounds + 1):
            out = {"push": folder / f"push{number}", "python": folder / f"python{number}"}

            def by_push() -> tuple[float, float, int]:
                run = figures.timed([args.binary, "push", source, out["push"], "--format", "json", *push])
                done = json.loads(run.out.splitlines()[-1])
                return run.seconds, run.cpu, done["tensors"]

            steps = {"push": by_push, "python": lambda: python.run(source, out["python"])}
            found = {name: steps[name]() for name in (list(steps) if number % 2 else reversed(list(steps)))}
            for name, (_, _, count) in found.items():
                if count != args.count:
                    raise harness.Failed(f"{name}: {count} of {args.count} tensors landed")
            same(out["push"], out["python"])
            ratio = found["python"][0] / found["push"][0]
            words = ", ".join(f"{name} {s:.3f} s cpu {cpu:.2f}" for name, (s, cpu, _) in found.items())
            print(f"round {number}: {words}, ratio {ratio:.2f}{'' if number else ' (warm-up)'}", flush=True)
            if number:
                ratios.append(ratio)
            for path in out.values():
                shutil.rmtree(path)
            # What ext4 still has to write must not be the next round's burden.
            subprocess.run(["sync", "-f", folder], check=True)
    finally:
        python.close()
    kind = figures.file_system(folder)
    what = f"load_checkpoint and np.save / push, {kind}, median"
    if is_judged:
        figure.judge(what, figures.median(ratios), ">=", GOAL)
    else:
        print(f"{what}: {figures.median(ratios):.2f} (as information)")


def same(pushed: Path, saved: Path) -> None:
    """The files hold the same bytes, whatever they are called."""
    manifest = json.loads((pushed / "manifest.json").read_text())
    by_key = sorted(manifest["tensors"], key=lambda row: row.get("source_name") or row["name"])
    paths = sorted(saved.iterdir(), key=lambda path: int(path.stem))
    for row, path in zip(by_key, paths):
        landed = pushed / row["file"]
        if subprocess.run(["cmp", "-s", landed, path]).returncode:
            raise harness.Failed(f"{landed} and {path} differ")


if __name__ == "__main__":
    sys.exit(main())
