#!/usr/bin/env python3
"""Counts the copies that a payload byte makes in user space on the sender, for every format that lies as it is sent.

As count_copies.py does for safetensors: valgrind's dhat in copy mode, a run with as many tensors of next to no
bytes taken off, the rest divided by the payload. The source is read as a push reads it unless --read says
otherwise. Controls, which must show copies: a PyTorch file whose elements lie in another order, and an .npz
that is deflated.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import count_copies
import figures
from count_copies import SENDER_GOAL, TENSORS, Bench
from figures import MIB, Figure, harness

FORMATS = ("tf-bundle", "tf-names", "savedmodel", "safetensors", "npy", "npz", "hdf5", "keras", "pytorch", "gguf",
           "onnx", "tensorferry")  # fmt: skip
CONTROLS = {"pytorch-gathered": 0.9, "npz-deflated": 0.1}
"""What must be seen at least. Inflating itself stores bytes without calling memcpy."""
CONTROL_BYTES = 16 * MIB
TINY_BYTES = 256 * TENSORS


def main() -> int:
    parser = figures.arguments(__doc__, workdir=figures.TMPFS)
    parser.add_argument("--bytes", type=harness.parse_size, default=256 * MIB)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--read", default=None, help="how the source is read; the program's default if absent")
    parser.add_argument("--python", type=Path, default=figures.LARGE_PYTHON, help="has the large libraries")
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        harness.not_run("valgrind")
    if not args.python.exists():
        harness.not_run(f"{args.python} (scripts/test.sh makes it)")
    if args.quick:
        args.bytes = 8 * MIB
    with figures.figure("copies in user space on the sender, by format", args) as figure:
        measure(figure, Bench(figure, Path()))
        return figure.end()


def measure(figure: Figure, bench: Bench) -> None:
    """All sources are made first, so that none is too young when it is sent."""
    args = figure.args
    print(f"{args.bytes / MIB:.0f} MiB in {TENSORS} tensors")
    wanted = {kind: args.bytes for kind in args.formats} | dict.fromkeys(CONTROLS, min(args.bytes, CONTROL_BYTES))
    sources: dict[str, list[Path]] = {}
    for kind, total in wanted.items():
        sources[kind] = []
        for size in (total, TINY_BYTES):
            extra = ["--count", str(TENSORS), "--bytes", str(size), "--seed", str(args.seed)]
            path = figure.folder / f"{kind}-{size}"
            sources[kind].append(figures.make_format(args.python, kind, path, extra))
    time.sleep(figures.SETTLE_S)
    push = figures.flags(args.binary, "push", {"codec": "none", "read": args.read})
    for kind, (large, small) in sources.items():
        full, base = (count_copies.read_dhat(bench.run(s, "sender", "dhat", [], push)) for s in (large, small))
        ratio = (full.bytes - base.bytes) / wanted[kind]
        print(f"{kind}: {full.bytes:,} bytes copied, {base.bytes:,} without payload: {ratio:.4f} a byte")
        for stack, found in (full.by_stack - base.by_stack).most_common(2):
            print(f"    {found / wanted[kind]:.4f}  {stack}")
        sys.stdout.flush()
        if kind not in CONTROLS:
            figure.judge(f"copies a payload byte, {kind}", ratio, "<=", SENDER_GOAL, digits=4)
        elif ratio < CONTROLS[kind]:
            figure.invalid(f"{kind} cannot be sent without copies, but only {ratio:.2f} was seen")


if __name__ == "__main__":
    sys.exit(main())
