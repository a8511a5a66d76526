#!/usr/bin/env python3
"""Measures a push against `rsync -W --inplace` through its own daemon, in the same run.

Both move the same files from and to the same file system (tmpfs unless --workdir says otherwise)
over loopback, servers up, into a fresh folder each round; checksums are on. The clock runs from the
start of the client to its end. Rounds alternate, and the first of a pair changes from round to
round. The goal is on the median of the rounds' ratios.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import figures
from figures import GIB, MIB, Figure, harness

GOAL = 1.5
TENSORS = 8


class RsyncDaemon:
    """`rsync --daemon` on loopback with one writable module."""

    def __init__(self, folder: Path, target: Path):
        self.port = harness.free_port()
        self.log = folder / "rsyncd.log"
        config = folder / "rsyncd.conf"
        config.write_text(
            f"port = {self.port}\naddress = 127.0.0.1\nuse chroot = no\nmax verbosity = 0\n"
            f"log file = {self.log}\npid file = {folder / 'rsyncd.pid'}\n"
            f"[target]\npath = {target}\nread only = no\nuid = {_owner(target)}\ngid = *\n"
        )
        command = ["rsync", "--daemon", "--no-detach", f"--config={config}"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def __enter__(self) -> RsyncDaemon:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.05)
        self.__exit__()
        raise harness.Failed(f"rsync does not listen: {harness.tail(self.log)}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)


def _owner(path: Path) -> str:
    return str(path.stat().st_uid)


def child_cpu(pid: int) -> float:
    """Processor time once the daemon has reaped the process that served the connection."""
    time.sleep(0.2)
    return figures.cpu_seconds(pid)


def main() -> int:
    parser = figures.arguments(__doc__, workdir=figures.TMPFS)
    parser.add_argument("--bytes", type=harness.parse_size, default=2 * GIB)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lanes", type=int, default=None)
    parser.add_argument("--codec", default=None)
    parser.add_argument("--write", default=None)
    parser.add_argument("--durability", default=None, help="of the push; its own default if absent")
    args = parser.parse_args()
    if shutil.which("rsync") is None:
        harness.not_run("rsync")
    if args.quick:
        args.bytes, args.rounds = 64 * MIB, 1
    with figures.figure("a push against rsync", args) as figure:
        measure(figure)
        return figure.end()


def measure(figure: Figure) -> None:
    """All rounds."""
    args = figure.args
    source, root, other = (figure.folder / part for part in ("source", "root", "rsync"))
    for folder in (source, root, other):
        folder.mkdir()
    lengths = [args.bytes // TENSORS // 4 * 4] * TENSORS
    figures.write_model(source / "model.safetensors", lengths, args.seed, distinct=args.bytes)
    version = subprocess.run(["rsync", "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    print(f"{args.bytes / GIB:.2f} GiB of random f32 in {TENSORS} tensors; {version}")
    serve = figures.flags(args.binary, "serve", {"write": args.write})
    push = figures.flags(
        args.binary, "push", {"lanes": args.lanes, "codec": args.codec, "durability": args.durability}
    )
    time.sleep(figures.SETTLE_S)
    ratios: list[float] = []
    with harness.Server(args.binary, root, harness.free_port(), extra=serve) as server, RsyncDaemon(
        figure.folder, other
    ) as daemon:

        def by_rsync(number: int) -> tuple[float, float, float]:
            before = child_cpu(daemon.process.pid)
            target = f"rsync://127.0.0.1:{daemon.port}/target/{number}/"
            run = figures.timed(["rsync", "-a", "-W", "--inplace", f"{source}/", target])
            spent = child_cpu(daemon.process.pid) - before
            landed = other / str(number) / "model.safetensors"
            if landed.stat().st_size != (source / "model.safetensors").stat().st_size:
                raise harness.Failed("rsync did not move the file")
            shutil.rmtree(other / str(number))
            return run.seconds, run.cpu, spent

        def by_push(number: int) -> tuple[float, float, float]:
            before = figures.cpu_seconds(server.process.pid)
            run = figures.timed(figures.push_command(args.binary, source, server.port, f"run{number}", push))
            spent = figures.cpu_seconds(server.process.pid) - before
            shutil.rmtree(root / f"run{number}")
            return run.seconds, run.cpu, spent

        for number in range(args.rounds + 1):
            pair = {"rsync": by_rsync, "push": by_push}
            order = list(pair) if number % 2 else list(pair)[::-1]
            found = {name: pair[name](number) for name in order}
            ratio = found["rsync"][0] / found["push"][0]
            words = ", ".join(
                f"{name} {s:.3f} s {args.bytes / GIB / s:.2f} GiB/s cpu {client:.2f}+{far:.2f} s"
                for name, (s, client, far) in sorted(found.items())
            )
            # The first pair warms both up and does not count.
            counts = number > 0 or args.rounds == 0
            print(f"round {number}: {words}, ratio {ratio:.2f}{'' if counts else ' (warm-up)'}", flush=True)
            if counts:
                ratios.append(ratio)
    figure.judge("rsync's time / a push's time, median", figures.median(ratios), ">=", GOAL)


if __name__ == "__main__":
    sys.exit(main())
