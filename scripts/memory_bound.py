#!/usr/bin/env python3
"""Measures the anonymous memory of both sides while a checkpoint moves that is far larger.

RssAnon of client and server is read every 10 ms, for raw chunks and for lz4, each three times:
undisturbed; with the server's disk slowed to 100 MiB/s (slow_disk.c is preloaded: its writes wait,
as they do when the page cache is full); with the server stopped for five seconds in mid-transfer.
A condition that did not take hold (the slow disk was not slow, the stopped server was done
already) is a failure. Half of the source's values are zeros in blocks, so that lz4 has work to do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import figures
from figures import GIB, MIB, Figure, harness

GOAL_MIB = 256
INTERVAL_S = 0.01
TENSORS = 16
STOP_S = 5.0


def rss_anon(pid: int) -> int | None:
    """Bytes of anonymous memory, None when the process has ended."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class Sampler:
    """Watches processes from a thread of its own."""

    def __init__(self, pids: dict[str, int]):
        self.pids, self.most = pids, dict.fromkeys(pids, 0)
        self.samples = 0
        self.widest_gap = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(INTERVAL_S):
            for who, pid in self.pids.items():
                self.most[who] = max(self.most[who], rss_anon(pid) or 0)
            now = time.monotonic()
            self.widest_gap = max(self.widest_gap, now - last)
            last = now
            self.samples += 1

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@dataclass
class Conditions:
    """One source, pushed under several conditions."""

    figure: Figure
    source: Path
    total: int

    def run(self, codec: str, condition: str) -> dict[str, int]:
        """Most anonymous bytes of each side."""
        args, folder = self.figure.args, self.figure.folder
        root, slowed = folder / "root", folder / "slowed"
        root.mkdir()
        wrapper: list[str] = []
        if condition == "slow disk":
            library = figures.library("slow_disk.c", folder)
            wrapper = ["env", f"SLOW_DISK_RATE={args.rate}", f"SLOW_DISK_COUNT={slowed}", f"LD_PRELOAD={library}"]
        serve = figures.flags(args.binary, "serve", {"write": "pwrite"})
        push = figures.flags(args.binary, "push", {"codec": codec, "lanes": args.lanes})
        port = harness.free_port()
        try:
            with harness.Server(args.binary, root, port, wrapper=wrapper, extra=serve) as server:
                return self._push(server, condition, push, slowed)
        finally:
            shutil.rmtree(root)

    def _push(self, server: harness.Server, condition: str, push: list[str], slowed: Path) -> dict[str, int]:
        args = self.figure.args
        begun = time.monotonic()
        command = figures.push_command(args.binary, self.source, server.port, "model", push)
        with tempfile.TemporaryFile() as err, subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=err
        ) as client:
            with Sampler({"sender": client.pid, "receiver": server.process.pid}) as sampler:
                try:
                    if condition == "stopped receiver":
                        self._stop_for_a_while(server, client)
                    status = client.wait(harness.TIMEOUT_S)
                finally:
                    client.kill()
            err.seek(0)
            if status:
                raise harness.Failed(f"push ended with {status}: {err.read()[-1000:].decode(errors='replace')}")
        seconds = time.monotonic() - begun
        if condition == "slow disk":
            through = int.from_bytes(slowed.read_bytes(), sys.byteorder)
            if through < self.total or seconds < 0.95 * self.total / args.rate:
                self.figure.invalid(f"the disk was not slow: {through:,} bytes slowed, {seconds:.1f} s in all")
        words = ", ".join(f"{who} {most / MIB:.0f} MiB" for who, most in sampler.most.items())
        gap = f"{sampler.samples} samples, at most {sampler.widest_gap * 1000:.0f} ms apart"
        print(f"    {words}; {seconds:.1f} s, {gap}", flush=True)
        return sampler.most

    def _stop_for_a_while(self, server: harness.Server, client: subprocess.Popen[bytes]) -> None:
        """From a third of the bytes on, as far as the source's file position shows."""
        while written(server.process.pid) < self.total // 3:
            if client.poll() is not None:
                break
            time.sleep(0.005)
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            begun = time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(STOP_S)
            if time.monotonic() - begun < STOP_S - 0.1:
                self.figure.invalid("the push was done before the receiver was stopped")
        finally:
            os.kill(server.process.pid, signal.SIGCONT)


def written(pid: int) -> int:
    """Bytes that a process has handed to write calls."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    return 0


def main() -> int:
    parser = figures.arguments(__doc__, workdir=figures.TMPFS)
    parser.add_argument("--bytes", type=harness.parse_size, default=4 * GIB)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--rate", type=harness.parse_size, default=100 * MIB, help="of the slow disk; default: 100M")
    parser.add_argument("--codec", action="append", choices=["none", "lz4"], help="default: both")
    parser.add_argument("--condition", action="append", choices=["normal", "slow disk", "stopped receiver"])
    args = parser.parse_args()
    if shutil.which("cc") is None:
        harness.not_run("cc")
    if args.quick:
        args.bytes, args.rate = 256 * MIB, max(args.rate, 200 * MIB)
    with figures.figure("anonymous memory", args) as figure:
        measure(figure)
        return figure.end()


def measure(figure: Figure) -> None:
    """Every codec under every condition."""
    args = figure.args
    source = figure.folder / "model.safetensors"
    lengths = [args.bytes // TENSORS // 4 * 4] * TENSORS
    figures.write_model(source, lengths, args.seed, sparse=True)
    time.sleep(figures.SETTLE_S)
    print(f"{args.bytes / GIB:.2f} GiB in {TENSORS} tensors, half zeros")
    conditions = Conditions(figure, source, sum(lengths))
    known = figures.flags(args.binary, "push", {"codec": "lz4"})
    for codec in args.codec or (["none", "lz4"] if known else ["none"]):
        for condition in args.condition or ("normal", "slow disk", "stopped receiver"):
            print(f"codec {codec}, {condition}:", flush=True)
            for who, most in conditions.run(codec, condition).items():
                figure.judge(f"RssAnon of the {who}, {codec}, {condition}", most / MIB, "<=", GOAL_MIB, " MiB", 0)


if __name__ == "__main__":
    sys.exit(main())
