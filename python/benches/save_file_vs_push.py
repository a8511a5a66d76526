#!/usr/bin/env python3
"""How fast `save_file` sends arrays, against the command line program sending the same bytes from files.

    python save_file_vs_push.py --binary PATH [--bytes 2G] [--rounds 5]

Both send to the same server. The program is timed as a whole process; its files are in the page cache.
`save_file` is timed as a call in a process that has the arrays, with and without `detect_mutation`. The
bytes are random, so no codec shrinks them. What landed is compared once with what was sent, and deleted
after each run, outside of the clock.

Figures: `speed_of_push` is push's time over save_file's (1 = as fast, more = faster). `extra_anonymous_mib`
is how much the anonymous memory of the process with the arrays had grown at the peak of all its calls of the
kind, the warm-up included, over what it was before the first call of any kind.
Without --binary there is nothing to compare with, and only the latter and GiB/s are measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import harness
import numpy as np
from harness import GIB, MIB, Child

SENDER = r"""
import json, sys, time
from pathlib import Path
import numpy as np
import tensorferry

folder = Path(sys.argv[1])
# Arrays of this process: not maps of the files, which would be no anonymous memory.
arrays = {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}
print("{}", flush=True)
for line in sys.stdin:
    url, options = json.loads(line)
    begun = time.perf_counter()
    report = tensorferry.save_file(arrays, url, **options)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "bytes": report.bytes, "durability": str(report.durability)}), flush=True)
"""


def main() -> None:
    parser = harness.arguments(__doc__, size="2G", rounds=5)
    parser.add_argument("--count", type=int, default=16, help="arrays")
    args = harness.checked(parser.parse_args())
    with harness.work_folder(args) as folder:
        source = folder / "source"
        source.mkdir()
        nbytes = write_arrays(source, args.bytes, args.count, args.seed)
        # Else the disk would still be writing the source while the first round is measured.
        os.sync()
        with harness.Server(folder / "root", args.binary) as server, Child(SENDER, str(source)) as sender:
            sender.answer()
            measure(args, server, sender, source, nbytes)


def write_arrays(folder: Path, nbytes: int, count: int, seed: int) -> int:
    """Float32 files of random bits; gives their bytes without headers."""
    rng = np.random.default_rng(seed)
    elements = max(1, nbytes // count // 4)
    for number in range(count):
        np.save(folder / f"layer.{number:03}.npy", rng.integers(0, 1 << 32, elements, np.uint32).view(np.float32))
    return count * elements * 4


def measure(args, server: harness.Server, sender: Child, source: Path, nbytes: int) -> None:
    runs = iter(range(1 << 30))
    before = harness.anonymous_memory(sender.process.pid)
    peaks = {True: 0, False: 0}

    def save(detect_mutation: bool) -> dict:
        name = f"save{next(runs)}"
        options = {"detect_mutation": detect_mutation, **harness.options_of(args)}
        with harness.AnonymousPeak(sender.process.pid) as peak:
            report = sender.ask([server.url(name), options])
        peaks[detect_mutation] = max(peaks[detect_mutation], peak.bytes)
        if report["bytes"] != nbytes:
            raise RuntimeError(f"{report['bytes']} bytes landed instead of {nbytes}")
        if name == "save0":
            compare(source, server.root / name)
        server.remove(name)
        return report

    def push() -> dict:
        name = f"push{next(runs)}"
        command = [str(args.binary), "push", str(source), server.url(name), "--format", "json"]
        if args.durability is not None:
            command += ["--durability", args.durability]
        begun = time.perf_counter()
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begun
        if run.returncode != 0:
            raise RuntimeError(run.stderr)
        done = json.loads(run.stdout.splitlines()[-1])
        if done["bytes"] != nbytes:
            raise RuntimeError(f"{done['bytes']} bytes landed instead of {nbytes}")
        server.remove(name)
        return {"seconds": seconds, "durability": done["durability"]}

    arms = {"save": lambda: save(True), "save_undetected": lambda: save(False)}
    if args.binary is not None:
        arms["push"] = push
    found = harness.interleaved(arms, args.rounds, args.seed)
    for arm, detects in (("save", True), ("save_undetected", False)):
        seconds = [run["seconds"] for run in found[arm]]
        values = {
            "detect_mutation": detects,
            "gib_per_s": nbytes / GIB / harness.median(seconds),
            "seconds": seconds,
            "extra_anonymous_mib": (peaks[detects] - before) / MIB,
            "durability": found[arm][-1]["durability"],
        }
        if "push" in found:
            pushed = [run["seconds"] for run in found["push"]]
            each = harness.ratios(pushed, seconds)
            values |= {"speed_of_push": harness.median(each), "ratios": each, "push_seconds": pushed}
        harness.figure("save_file against push", args, **values)


def compare(source: Path, landed: Path) -> None:
    for path in source.glob("*.npy"):
        # Bits, for a random float may be no number, which equals nothing.
        ours, theirs = np.load(path, mmap_mode="r"), np.load(landed / path.name, mmap_mode="r")
        if not np.array_equal(ours.view(np.uint32), theirs.view(np.uint32)):
            sys.exit(f"{path.name} landed with other bytes")


if __name__ == "__main__":
    main()
