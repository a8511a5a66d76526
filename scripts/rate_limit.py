#!/usr/bin/env python3
"""Measures how exact `push --bwlimit` is, as a constant and as a file that changes, over several lanes.

The share is the payload bytes that the server got in a time, divided by what the rate allows in it: for
a constant the whole push; for a file the seconds between two changes, seen by a proxy. Goal: 5 %.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import figures
from figures import MIB, Figure, harness

GOAL = 0.05


def main() -> int:
    parser = figures.arguments(__doc__)
    parser.add_argument("--rates", nargs="+", default=["10M", "100M", "300M"])
    parser.add_argument("--seconds", type=float, default=8.0, help="that a push takes; default: 8")
    parser.add_argument("--lanes", default="4")
    args = parser.parse_args()
    if args.quick:
        args.rates, args.seconds = ["20M"], 2.0
    with figures.figure("limited rate", args) as figure:
        measure(figure)
        return figure.end()


def measure(figure: Figure) -> None:
    args, folder = figure.args, figure.folder
    root = folder / "root"
    root.mkdir()
    extra = figures.flags(args.binary, "push", {"codec": "none", "lanes": args.lanes, "durability": "none"})
    with harness.Server(args.binary, root, harness.free_port()) as server:
        for rate_text in args.rates:
            rate = harness.parse_size(rate_text)
            source = folder / f"model-{rate_text}.safetensors"
            figures.write_model(source, [int(rate * args.seconds) & ~3], args.seed)
            limited = [*extra, "--bwlimit", rate_text]
            with contextlib.closing(harness.Proxy(server.port)) as proxy:
                push = harness.Push(args.binary, [source], proxy.port, f"model-{rate_text}", *limited)
                # From when bytes move to when they stop: starting and publishing are not sending.
                passed, began = watch(proxy, push)
                push.expect(0)
            seconds = passed[-1][0] - began
            report(figure, f"--bwlimit {rate_text}", passed[-1][1], rate, seconds)
            source.unlink()
        by_file(figure, server, extra)


def by_file(figure: Figure, server: harness.Server, extra: list[str]) -> None:
    """20 MiB/s, then 60."""
    args, folder = figure.args, figure.folder
    slow, fast = 20 * MIB, 60 * MIB
    file: Path = folder / "rate"
    file.write_text("20M")
    source = folder / "model-file.safetensors"
    # Each rate for half of the time, after what the change takes to be noticed.
    figures.write_model(source, [int((slow + fast) * (args.seconds / 2 + 3)) & ~3], args.seed)
    with contextlib.closing(harness.Proxy(server.port)) as proxy:
        push = harness.Push(args.binary, [source], proxy.port, "model-file", *extra, "--bwlimit", f"@{file}")
        proxy.wait_passed(2 * MIB, push)
        for rate in (slow, fast):
            file.write_text(str(rate))
            time.sleep(1.5)
            begun, before = time.monotonic(), proxy.passed
            time.sleep(args.seconds / 2)
            seconds, passed = time.monotonic() - begun, proxy.passed - before
            report(figure, f"--bwlimit @FILE with {rate >> 20}M", passed, rate, seconds)
        push.kill()


def watch(proxy: harness.Proxy, push: harness.Push) -> tuple[list[tuple[float, int]], float]:
    """When how many bytes had passed, and when the first did."""
    seen: list[tuple[float, int]] = [(time.monotonic(), 0)]
    began = 0.0
    while push.process.poll() is None:
        now, passed = time.monotonic(), proxy.passed
        if passed > 64 << 10 and not began:
            began = now
        # The last bytes are those of Finish.
        if passed > seen[-1][1] + 1024:
            seen.append((now, passed))
        time.sleep(0.001)
    return seen, began


def report(figure: Figure, what: str, passed: int, rate: float, seconds: float) -> None:
    share = passed / (rate * seconds)
    print(f"{what}: {passed / MIB:.1f} MiB in {seconds:.3f} s, {share:.4f} of the rate", flush=True)
    figure.judge(f"{what}: off by", abs(share - 1), "<=", GOAL, digits=4)


if __name__ == "__main__":
    sys.exit(main())
