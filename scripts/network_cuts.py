#!/usr/bin/env python3
"""Cuts the network under pushes, in a namespace of its own, until so many cuts are done.

The client lives behind a veth pair that a token bucket slows down. While it pushes, one after the
other at random moments: the packets of one direction are answered with a reset; a fifth of all packets
is lost for a while; the link goes down for a while. Between the last and the next cut packets may get
lost throughout (--loss). Every push must end well by itself, what lands must be the source, and no more
than the window may be sent twice for each connection-breaking cut. Needs root, ip, tc and iptables-legacy.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import figures
from figures import Figure, harness
from long_fat_link import NEAR, link

WINDOW = 64 << 20
"""Most bytes on their way: half of the server's memory."""
RATE = "800mbit"
TENSORS = 6


class Cutter:
    """Hurts the link at random moments, as long as a push runs."""

    def __init__(self, inside: list[str], rng: random.Random, most: int, loss: float):
        self._inside, self._rng, self._most = inside, rng, most
        self._ended = threading.Event()
        self.counts = {"reset": 0, "lossy": 0, "down": 0}
        if loss:
            for chain in ("INPUT", "OUTPUT"):
                self._run("iptables-legacy", "-A", chain, *self._lose(loss))

    @property
    def count(self) -> int:
        """Cuts so far."""
        return sum(self.counts.values())

    def run(self) -> None:
        """Until the push has ended."""
        while not self._ended.wait(self._rng.uniform(0.05, 0.6)) and self.count < self._most:
            kind = self._rng.choices(list(self.counts), [6, 2, 2])[0]
            self.counts[kind] += 1
            getattr(self, f"_{kind}")()

    @contextlib.contextmanager
    def cutting(self):
        """Cuts while the body runs."""
        self._ended.clear()
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _reset(self) -> None:
        rule = ["-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"]
        self._for_a_while(self._rng.choice(["INPUT", "OUTPUT"]), rule, self._rng.uniform(0.05, 0.4))

    def _lossy(self) -> None:
        self._for_a_while(self._rng.choice(["INPUT", "OUTPUT"]), self._lose(0.2), self._rng.uniform(0.2, 1))

    def _down(self) -> None:
        device = self._run("ip", "-o", "link", "show", "type", "veth").stdout.split(":")[1].split("@")[0].strip()
        self._run("ip", "link", "set", device, "down")
        self._ended.wait(self._rng.uniform(0.1, 1.5))
        self._run("ip", "link", "set", device, "up")

    def _for_a_while(self, chain: str, rule: list[str], seconds: float) -> None:
        self._run("iptables-legacy", "-I", chain, *rule)
        self._ended.wait(seconds)
        self._run("iptables-legacy", "-D", chain, *rule)

    @staticmethod
    def _lose(share: float) -> list[str]:
        return ["-p", "tcp", "-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP"]

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self._inside, *words], check=True, capture_output=True, text=True)


def main() -> int:
    parser = figures.arguments(__doc__)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--bytes", default="192M")
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets lost all the time, each way")
    args = parser.parse_args()
    if args.quick:
        args.cuts, args.bytes = min(args.cuts, 10), "64M"
    for tool in ("ip", "tc", "iptables-legacy"):
        if shutil.which(tool) is None:
            harness.not_run(tool)
    if os.geteuid() != 0:
        harness.not_run("network cuts (root)")
    with contextlib.ExitStack() as stack:
        try:
            inside = stack.enter_context(link(RATE, 4 << 20))
            cutter = Cutter(inside, random.Random(args.seed), args.cuts, args.loss)
        except subprocess.CalledProcessError as error:
            harness.not_run(f"network cuts (namespaces, tbf or iptables): {str(error.stderr).strip()}")
        with figures.figure("network cuts", args) as figure:
            pushes(figure, inside, cutter)
            return figure.end()


def pushes(figure: Figure, inside: list[str], cutter: Cutter) -> None:
    """Pushes until all cuts are done, and at least one."""
    args, folder = figure.args, figure.folder
    root = folder / "root"
    root.mkdir()
    each = (harness.parse_size(args.bytes) // TENSORS) & ~3
    tensors = harness.random_tensors({f"layer.{i}": each + 4 * i for i in range(TENSORS)}, args.seed)
    source = folder / "model.safetensors"
    harness.write_safetensors(source, tensors)
    time.sleep(figures.SETTLE_S)
    total = sum(map(len, tensors.values()))
    count, most_again, again, begun = 0, 0.0, 0, time.monotonic()
    listening = {"host": NEAR, "extra": ["--insecure"]}
    with harness.Server(args.binary, root, harness.free_port(), **listening) as server:
        while cutter.count < args.cuts or not count:
            name, resets = f"push{count}", cutter.counts["reset"]
            target = f"ferry://{NEAR}:{server.port}/{name}"
            command = [*inside, args.binary, "push", source, target, "--codec", "none", "--retries", "50"]
            with cutter.cutting():
                run = figures.timed([*command, "--format", "json"])
            done = json.loads(run.out.splitlines()[-1])
            resets = cutter.counts["reset"] - resets
            twice = int(done["wire_bytes"]) + int(done["resumed_bytes"]) - total
            again += twice
            most_again = max(most_again, twice / max(resets, 1))
            wrong = harness.first_difference(harness.landed(root / name), tensors)
            if wrong:
                figure.invalid(f"{name}, seed {args.seed}: {wrong}")
            shutil.rmtree(root / name)
            count += 1
    took = time.monotonic() - begun
    cuts = ", ".join(f"{number} {kind}" for kind, number in cutter.counts.items())
    print(f"{cutter.count} cuts ({cuts}) under {count} pushes of {total >> 20} MiB in {took:.0f} s; {again / 1e6:.1f} MB sent twice")
    figure.judge("sent twice for each cut that breaks connections, at most", most_again / 1e6, "<=", WINDOW / 1e6, " MB", 1)


if __name__ == "__main__":
    sys.exit(main())
