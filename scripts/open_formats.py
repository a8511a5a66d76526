#!/usr/bin/env python3
"""Measures how long a checkpoint of many tensors takes to open and list, in every format that can be mapped.

`inspect --format json` of 10,000 tensors, 20 GB of holes, headers in the page cache: wall time of the
whole process (median of the rounds, formats taking turns) and the peak of its memory. Goals: 300 ms and
64 MiB. The memory judged is RssAnon, read as often as it can be while the process runs; the peak of its
whole resident set (which counts its program and libraries, pages that are shared) is shown beside it.
Every line that it prints is compared with the number of tensors and bytes that were made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import figures
from figures import MIB, Figure, harness

FORMATS = (
    "npy", "safetensors", "npz", "tf-bundle", "savedmodel", "hdf5", "keras", "pytorch", "gguf", "onnx", "tensorferry",
)  # fmt: skip
GOAL_S = 0.3
GOAL_MIB = 64


def main() -> int:
    parser = figures.arguments(__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--bytes", type=harness.parse_size, default=20_000_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--python", type=Path, default=figures.LARGE_PYTHON, help="has the large libraries")
    parser.add_argument("--made", type=Path, help="keep what is made in this folder, and take what is there")
    args = parser.parse_args()
    if not args.python.exists():
        harness.not_run(f"{args.python} (scripts/test.sh makes it)")
    if args.quick:
        args.count, args.bytes, args.rounds = 100, 200 * MIB, 1
    with figures.figure(f"opening {args.count} tensors", args) as figure:
        measure(figure)
        return figure.end()


def measure(figure: Figure) -> None:
    """Makes the files, then opens each in turn."""
    args = figure.args
    folder = (args.made or figure.folder).resolve()
    folder.mkdir(exist_ok=True)
    sources: dict[str, Path] = {}
    for kind in args.formats:
        known = folder / f"{kind}.source"
        if not known.exists():
            begun = time.monotonic()
            sizes = ["--count", str(args.count), "--bytes", str(args.bytes)]
            # The libraries themselves show that small ones are what they seem to be.
            sizes += ["--check"] if args.quick else []
            known.write_text(str(figures.make_format(args.python, kind, folder / kind, [*sizes, "--holes"])))
            print(f"made {kind} in {time.monotonic() - begun:.0f} s", flush=True)
        sources[kind] = Path(known.read_text())
    time.sleep(figures.SETTLE_S)
    seconds: dict[str, list[float]] = {kind: [] for kind in sources}
    anon, resident = dict.fromkeys(sources, 0.0), dict.fromkeys(sources, 0.0)
    tensor_bytes = args.count * max(args.bytes // args.count // 64 * 64, 64)
    for number in range(args.rounds + 1):
        for kind, source in sources.items():
            found = opened(args.binary, source, args.count, tensor_bytes)
            # The first round fills the page cache.
            if number:
                seconds[kind].append(found)
    for kind, source in sources.items():
        for _ in range(args.rounds):
            one, all_ = memory(args.binary, source)
            anon[kind], resident[kind] = max(anon[kind], one), max(resident[kind], all_)
    for kind, times in seconds.items():
        shown = f"{min(times) * 1000:.0f} to {max(times) * 1000:.0f} ms"
        print(f"{kind}: {shown}, RssAnon {anon[kind]:.1f} MiB, resident {resident[kind]:.1f} MiB")
        figure.judge(f"open {kind}, median", figures.median(times) * 1000, "<=", GOAL_S * 1000, " ms", digits=0)
        figure.judge(f"memory {kind}", anon[kind], "<=", GOAL_MIB, " MiB", digits=1)


def opened(binary: Path, source: Path, count: int, tensor_bytes: int) -> float:
    """Lists a source; how long that takes."""
    run = figures.timed([binary, "inspect", source, "--format", "json"])
    events = [json.loads(line) for line in run.out.splitlines()]
    tensors = [event for event in events if event["event"] == "tensor"]
    total = next(event for event in events if event["event"] == "total")
    if len(tensors) != count or sum(t["bytes"] for t in tensors) != tensor_bytes or total["tensors"] != count:
        raise harness.Failed(f"{source}: {len(tensors)} of {count} tensors are listed")
    return run.seconds


def memory(binary: Path, source: Path) -> tuple[float, float]:
    """Peaks in MiB: anonymous memory as sampled, the whole resident set as the kernel keeps it."""
    with tempfile.TemporaryFile() as out:
        command = [str(binary), "inspect", str(source), "--format", "json"]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        anon = resident = 0
        fd = os.open(f"/proc/{process.pid}/status", os.O_RDONLY)
        try:
            while text := os.pread(fd, 4096, 0).decode():
                # Gone once the process has ended: a zombie has no memory.
                fields = dict(line.split(":", 1) for line in text.splitlines())
                if "RssAnon" not in fields:
                    break
                anon = max(anon, int(fields["RssAnon"].split()[0]))
                resident = max(resident, int(fields["VmHWM"].split()[0]))
        except ProcessLookupError:
            pass
        finally:
            os.close(fd)
        if process.wait() != 0:
            raise harness.Failed(f"inspect {source} ended with {process.returncode}")
    return anon / 1024, resident / 1024


if __name__ == "__main__":
    sys.exit(main())
