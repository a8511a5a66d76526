#!/usr/bin/env python3
"""Compares a push of 10,000 tensors of 4 KiB with rsync of the same 10,000 `.npy` files.

Interleaved in one run like run.py, with the same contenders; tensorferry and rsync unless --only says
otherwise. Nothing is deleted before the end: ext4 looks at every inode that was freed in the last
minutes before it takes another, which can cost ten times what is measured here.
"""

from __future__ import annotations

import sys
import time

import run as peers
from run import figures, sources

from tally import NotMeasured, Tally, table

KEYS = [key for key in peers.KEYS if key != "ceiling"]
TENSOR_BYTES = 4096
GOAL = 0.33


def judge(figure: figures.Figure, tally: Tally, names: list[str]) -> None:
    """The goal, where both ran."""
    try:
        best = tally.fastest(name for name in names if name.startswith("tensorferry"))
        # The ratio of rsync's speed is that of a push's time.
        value = tally.ratio("rsync", best)
    except NotMeasured:
        return
    print(f"best: {best}")
    figure.judge(f"time of {figure.args.count} small tensors / rsync's, median of ratios", value, "<=", GOAL)


def main() -> int:
    parser = figures.arguments(__doc__, workdir=figures.TMPFS)
    parser.add_argument("--count", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5, and one to warm up")
    parser.add_argument("--only", default="tensorferry,rsync", help=f"some of {','.join(KEYS)}")
    peers.common(parser)
    args = parser.parse_args()
    if args.quick:
        args.count, args.rounds = min(args.count, 500), 1
    wanted = args.only.split(",")
    if strange := set(wanted) - set(KEYS):
        sys.exit(f"--only {','.join(sorted(strange))}: not among {','.join(KEYS)}")
    with figures.figure(f"{args.count} tensors of 4 KiB", args) as figure:
        taking_part = peers.field(args, wanted)
        folder = figure.folder / "source"
        folder.mkdir()
        source = sources.write(folder, args.count, args.count * TENSOR_BYTES, args.seed)
        time.sleep(figures.SETTLE_S)
        course = peers.Course(figure.folder, source, keep=True)
        tally, failed = peers.race(course, taking_part.contenders, args.rounds, warm_up=not args.quick)
        names = list(taking_part.contenders)
        print(f"\n{table(tally, names, 'rsync', 'rsync')}\n")
        judge(figure, tally, names)
        return peers.finish(figure, source, taking_part, tally, failed)


if __name__ == "__main__":
    sys.exit(main())
