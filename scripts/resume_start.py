#!/usr/bin/env python3
"""Measures how soon a resumed push moves bytes again, and what it reads for that.

A checkpoint is pushed through the judging relay, and the client killed once 90 % of the bytes are
through; what the server's list then calls durable is where the rounds start.

- Start: from exec of the push to the first chunk at the relay; then the client is killed again, so
  that the next round finds (nearly) the same. The median counts. That no chunk was one that the
  receiver had called durable is what the relay judges.
- Reads: a last run to the end under strace, which counts what was read from the source: what was
  not durable, and 1 MiB for headers.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import figures
from figures import GIB, MIB, Figure, harness
from relay import Relay

GOAL_MS = 300.0
DURABLE = 0.9
TENSORS = 16
HEADERS_BYTES = MIB
NAME = "model"
READS = ("read", "readv", "pread64", "preadv", "preadv2", "sendfile", "copy_file_range", "mmap")


def durable_bytes(binary: Path, port: int) -> int:
    """What the server calls durable, once no session is active."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        run = figures.timed([binary, "list", f"ferry://127.0.0.1:{port}", "--format", "json"])
        rows = [json.loads(line) for line in run.out.splitlines()]
        rows = [row for row in rows if row.get("name") == NAME]
        if rows and not rows[0]["active"]:
            return int(rows[0]["durable_bytes"])
        time.sleep(0.05)
    raise harness.Failed("the session of a killed client did not end within 60 s")


class Resume:
    """One server, one relay, one source."""

    def __init__(self, figure: Figure, source: Path, server: harness.Server, relay: Relay, push: list[str]):
        self.binary, self.server, self.relay = figure.args.binary, server, relay
        self.command = figures.push_command(self.binary, source, relay.port, NAME, push)

    def until(self, bytes_up: int = 0, chunks: int = 0) -> float:
        """Pushes until so many bytes or chunks went by, then kills the client; seconds until then."""
        relay = self.relay
        bytes_up += relay.bytes_up
        chunks += relay.chunks
        begun = time.monotonic()
        client = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while relay.bytes_up < bytes_up or relay.chunks < chunks:
                if client.poll() is not None:
                    raise harness.Failed(f"the push ended with {client.returncode} before it could be stopped")
                if time.monotonic() > begun + harness.TIMEOUT_S:
                    raise harness.Failed("the push does not move")
                time.sleep(0.0005)
            return time.monotonic() - begun
        finally:
            client.kill()
            client.wait()

    def durable(self) -> int:
        """See `durable_bytes`."""
        return durable_bytes(self.binary, self.server.port)


def main() -> int:
    parser = figures.arguments(__doc__, workdir=figures.TMPFS)
    parser.add_argument("--bytes", type=harness.parse_size, default=4 * GIB)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lanes", type=int, default=None)
    args = parser.parse_args()
    if shutil.which("strace") is None:
        harness.not_run("strace")
    if args.quick:
        args.bytes, args.rounds = 512 * MIB, 2
    with figures.figure("start of a resumed push", args) as figure:
        measure(figure)
        return figure.end()


def measure(figure: Figure) -> None:
    """The interrupted pushes, then the one that is counted."""
    args = figure.args
    source, root = figure.folder / "model.safetensors", figure.folder / "root"
    root.mkdir()
    lengths = [args.bytes // TENSORS // 4 * 4] * TENSORS
    total = sum(lengths)
    figures.write_model(source, lengths, args.seed)
    figures.warm(source)
    time.sleep(figures.SETTLE_S)
    print(f"{total / GIB:.2f} GiB in {TENSORS} tensors")
    push = figures.flags(args.binary, "push", {"lanes": args.lanes, "codec": "none"})
    with harness.Server(args.binary, root, harness.free_port()) as server, Relay(
        ("127.0.0.1", server.port)
    ) as relay:
        resume = Resume(figure, source, server, relay, push)
        durable = 0
        while durable < DURABLE * total:
            resume.until(bytes_up=int(DURABLE * total) - durable + MIB)
            durable = resume.durable()
        times: list[float] = []
        for number in range(1, args.rounds + 1):
            time.sleep(0.5)
            times.append(resume.until(chunks=1) * 1000)
            print(f"round {number}: {durable / total:.1%} durable, first chunk after {times[-1]:.0f} ms", flush=True)
            durable = resume.durable()
        middle = figures.median(times)
        figure.judge("exec of a resumed push to its first chunk, median", middle, "<=", GOAL_MS, " ms", 0)
        if relay.violations:
            figure.invalid(f"the relay saw {relay.violations} broken promises: {relay.report()}")
    with harness.Server(args.binary, root, harness.free_port()) as server:
        durable = durable_bytes(args.binary, server.port)
        # What comes out of a map cannot be counted.
        push += figures.flags(args.binary, "push", {"read": "pread"})
        read, mapped = source_reads(figure, source, server.port, push)
    missing = total - durable
    print(f"{missing:,} bytes were not durable; {read:,} bytes read from the source; {mapped} maps of it")
    if mapped or read < missing:
        figure.invalid("the source was not read by calls that can be counted")
    more = (read - missing) / MIB
    figure.judge("read from the source beyond what was missing", more, "<=", HEADERS_BYTES / MIB, " MiB", 3)
    most = 1 - DURABLE + HEADERS_BYTES / total
    figure.judge("read from the source, of all its bytes", read / total, "<=", most, digits=4)


def source_reads(figure: Figure, source: Path, port: int, push: list[str]) -> tuple[int, int]:
    """Bytes that calls read from the source, and how often it was mapped."""
    trace = figure.folder / "reads.strace"
    command = figures.push_command(figure.args.binary, source, port, NAME, push)
    strace = ["strace", "-f", "-qq", "-o", trace, "-P", source, "-e", f"trace={','.join(READS)}", "-e", "abbrev=all"]
    figures.timed([*strace, "-s", "0", *command])
    read = mapped = 0
    for line in trace.read_text().splitlines():
        call = re.search(r"(\w+)(?:\(| resumed)", line)
        result = re.search(r" = (-?\w+)[^=]*$", line)
        if not call or not result or call[1] not in READS:
            continue
        if call[1] == "mmap":
            mapped += 1
        else:
            read += max(0, int(result[1]))
    return read, mapped


if __name__ == "__main__":
    sys.exit(main())
