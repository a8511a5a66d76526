#!/usr/bin/env python3
"""Measures what 10,000 tensors of 4 KiB cost, against what they must cost.

Each round, interleaved: a push of the small tensors; a push of the same bytes as one tensor; and a
bare loop that makes as many files of 4 KiB + 128 bytes in one folder of the same file system
(openat with O_CREAT|O_EXCL, write, close; in C, no fsync, no fallocate). The goal: the first takes
at most 1.5 times the second and third together. Measured on the file system of --workdir and, unless
that is one, on tmpfs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import figures
from figures import Figure, harness

GOAL = 1.5
LENGTH = 4096
HEADER = 128
MOST_CPU_A_FILE_S = 100e-6


def main() -> int:
    parser = figures.arguments(__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lanes", type=int, default=None)
    parser.add_argument("--codec", default=None)
    parser.add_argument("--write", default=None)
    parser.add_argument("--durability", default=None, help="of the pushes; their own default if absent")
    args = parser.parse_args()
    if shutil.which("cc") is None:
        harness.not_run("cc")
    if args.quick:
        args.count, args.rounds = 1000, 1
    folders = [args.workdir]
    if figures.file_system(args.workdir) != "tmpfs" and figures.TMPFS.is_dir():
        folders.append(figures.TMPFS)
    status = 0
    for folder in folders:
        args.workdir = folder
        with figures.figure(f"{args.count} small tensors", args) as figure:
            measure(figure)
            status |= figure.end()
    return status


def measure(figure: Figure) -> None:
    """All rounds on one file system."""
    args, folder = figure.args, figure.folder
    small, large, root = (folder / part for part in ("small.safetensors", "large.safetensors", "root"))
    root.mkdir()
    figures.write_model(small, [LENGTH] * args.count, args.seed)
    figures.write_model(large, [LENGTH * args.count], args.seed)
    make_files = folder / "make_files"
    subprocess.run(["cc", "-O2", "-Wall", "-o", make_files, figures.SCRIPTS / "make_files.c"], check=True)
    serve = figures.flags(args.binary, "serve", {"write": args.write})
    push = figures.flags(
        args.binary, "push", {"lanes": args.lanes, "codec": args.codec, "durability": args.durability}
    )
    kind = figures.file_system(folder)
    time.sleep(figures.SETTLE_S)
    ratios: list[float] = []
    with harness.Server(args.binary, root, harness.free_port(), extra=serve) as server:

        # Nothing is deleted before the end: ext4 looks at every inode that was freed in the last
        # minutes before it takes another, which can cost ten times what is measured here.
        def by_push(source: Path, number: int) -> tuple[float, float, float]:
            name = f"{source.stem}{number}"
            before = figures.cpu_seconds(server.process.pid)
            run = figures.timed(figures.push_command(args.binary, source, server.port, name, push))
            spent = figures.cpu_seconds(server.process.pid) - before
            count = sum(1 for _ in (root / name).iterdir()) - 1
            if count != (args.count if source == small else 1):
                raise harness.Failed(f"{count} files landed")
            return run.seconds, run.cpu, spent

        def by_loop(number: int) -> tuple[float, float, float]:
            loop = folder / f"loop{number}"
            loop.mkdir()
            run = figures.timed([make_files, loop, str(args.count), str(LENGTH + HEADER)])
            return run.seconds, run.cpu, 0.0

        steps = {"small": lambda n: by_push(small, n), "one": lambda n: by_push(large, n), "files": by_loop}
        for number in range(args.rounds + 1):
            first = number % len(steps)
            order = list(steps)[first:] + list(steps)[:first]
            found = {}
            for name in order:
                found[name] = steps[name](number)
                if name == "files":
                    # What the loop leaves for the disk must not be a push's burden.
                    subprocess.run(["sync", "-f", folder], check=True)
            ratio = found["small"][0] / (found["one"][0] + found["files"][0])
            words = ", ".join(
                f"{name} {found[name][0]:.3f} s cpu {found[name][1]:.2f}+{found[name][2]:.2f}" for name in steps
            )
            # The first round warms up and does not count.
            print(f"round {number}: {words}, ratio {ratio:.2f}{'' if number else ' (warm-up)'}", flush=True)
            if number:
                ratios.append(ratio)
            if found["files"][1] > args.count * MOST_CPU_A_FILE_S and not args.quick:
                figure.invalid("bare files are far too dear: thousands were deleted lately? Wait 5 minutes")
                return
    what = f"{args.count} tensors / (one tensor + bare files), {kind}, median"
    figure.judge(what, figures.median(ratios), "<=", GOAL)


if __name__ == "__main__":
    sys.exit(main())
