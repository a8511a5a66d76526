#!/usr/bin/env python3
"""Measures what share of a long fat link a push with default flags uses.

The client runs in a network namespace of its own. What it sends passes a token bucket (tc tbf) on a
veth pair, which is the rate of the link; a proxy behind it holds every byte for half a round trip, in
both directions, and takes in as much as the link brings in that time and more, so that the delay binds
whatever waits for an answer. TCP itself ends at the proxy and does not feel the delay. For comparison
a plain socket sends the same bytes the same way, and waits for one byte that says they are all there.
Needs root, ip and tc.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

import figures
from figures import Figure, harness

GOAL = 0.90
PIECE = 256 << 10
NEAR, FAR = "10.207.0.1", "10.207.0.2"
PLAIN_CLIENT = """
import socket, sys
file, host, port = sys.argv[1:]
with open(file, "rb") as source, socket.create_connection((host, int(port))) as out:
    out.sendfile(source)
    out.shutdown(socket.SHUT_WR)
    out.recv(1)
"""


class Delay:
    """One direction of one connection: bytes come out a while after they went in."""

    def __init__(self, source: socket.socket, target: socket.socket, seconds: float, most_bytes: int):
        self._source, self._target = source, target
        self._seconds, self._most_bytes = seconds, most_bytes
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._held_bytes = 0
        self.most_held_bytes = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._take, daemon=True).start()
        threading.Thread(target=self._give, daemon=True).start()

    def _put(self, data: bytes) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._held_bytes < self._most_bytes)
            self._held_bytes += len(data)
            self.most_held_bytes = max(self.most_held_bytes, self._held_bytes)
            self._waiting.append((time.monotonic() + self._seconds, data))
            self._changed.notify_all()

    def _take(self) -> None:
        data = b"-"
        while data:
            try:
                data = self._source.recv(PIECE)
            except OSError:
                data = b""
            self._put(data)

    def _give(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                due, data = self._waiting[0]
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                if data:
                    self._target.sendall(data)
                else:
                    self._target.shutdown(socket.SHUT_WR)
            except OSError:
                data = b""
            with self._changed:
                self._waiting.popleft()
                self._held_bytes -= len(data)
                self._changed.notify_all()
            if not data:
                return


class DelayProxy:
    """Delays every connection by half a round trip each way."""

    def __init__(self, server_port: int, round_trip: float, most_bytes: int):
        self.listener = socket.create_server((NEAR, 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.delays: list[Delay] = []
        self._arguments = (server_port, round_trip, most_bytes)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        server_port, round_trip, most_bytes = self._arguments
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", server_port))
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.delays.append(Delay(client, server, round_trip / 2, most_bytes))
            Delay(server, client, round_trip / 2, most_bytes)

    def close(self) -> None:
        self.listener.close()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def link(rate: str, queue_bytes: int) -> Iterator[list[str]]:
    """A namespace behind a link of this rate; the words that run a program in it."""
    name = f"ferry{os.getpid()}"
    outer, inner = f"{name}o"[:15], f"{name}i"[:15]
    inside = ["ip", "netns", "exec", name]
    try:
        ip("netns", "add", name)
        ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
        ip("addr", "add", f"{NEAR}/30", "dev", outer)
        ip("link", "set", outer, "up")
        subprocess.run([*inside, "ip", "addr", "add", f"{FAR}/30", "dev", inner], check=True, capture_output=True)
        for device in (inner, "lo"):
            subprocess.run([*inside, "ip", "link", "set", device, "up"], check=True, capture_output=True)
        shape = ["tbf", "rate", rate, "burst", "256kb", "limit", str(queue_bytes)]
        subprocess.run([*inside, "tc", "qdisc", "add", "dev", inner, "root", *shape], check=True, capture_output=True)
        yield inside
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        # Goes with its peer; unless nothing was made that far.
        subprocess.run(["ip", "link", "del", outer], capture_output=True)


def bits_per_second(text: str) -> float:
    """`1gbit` -> bits."""
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
    return float(text[:-4]) * units[text[-4:]]


def seconds(text: str) -> float:
    """`100ms` -> seconds."""
    return float(text.removesuffix("ms")) / 1000


def main() -> int:
    parser = figures.arguments(__doc__)
    parser.add_argument("--rate", default="1gbit", help="kbit, mbit or gbit; default: 1gbit")
    parser.add_argument("--rtt", default="100ms", help="round trip; default: 100ms")
    parser.add_argument("--bytes", default="2G")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lanes", default=None)
    args = parser.parse_args()
    if args.quick:
        args.rate, args.bytes, args.rounds = "400mbit", "64M", 1
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            harness.not_run(tool)
    if os.geteuid() != 0:
        harness.not_run("long fat link (root)")
    with contextlib.ExitStack() as stack:
        try:
            # As routers are built: what the line holds in a round trip waits in front of it.
            queue_bytes = int(bits_per_second(args.rate) / 8 * seconds(args.rtt))
            inside = stack.enter_context(link(args.rate, queue_bytes))
        except subprocess.CalledProcessError as error:
            harness.not_run(f"long fat link (network namespaces, veth or tbf): {error.stderr.decode().strip()}")
        with figures.figure(f"long fat link: {args.rate}, {args.rtt}", args) as figure:
            measure(figure, inside)
            return figure.end()


def measure(figure: Figure, inside: list[str]) -> None:
    args, folder = figure.args, figure.folder
    total, rate = harness.parse_size(args.bytes), bits_per_second(args.rate) / 8
    round_trip = seconds(args.rtt)
    root = folder / "root"
    root.mkdir()
    source = folder / "model.safetensors"
    figures.write_model(source, [total & ~3], args.seed)
    time.sleep(figures.SETTLE_S)
    # As a long line holds them, with room to spare.
    most_bytes = int(rate * round_trip * 4) + (4 << 20)
    extra = figures.flags(args.binary, "push", {"lanes": args.lanes})
    shares = []
    with harness.Server(args.binary, root, harness.free_port()) as server:
        for number in range(args.rounds):
            plain = plain_seconds(inside, source, round_trip, most_bytes)
            with contextlib.closing(DelayProxy(server.port, round_trip, most_bytes)) as proxy:
                target = f"ferry://{NEAR}:{proxy.port}/model{number}"
                command = [*inside, str(args.binary), "push", str(source), target, "--format", "json", *extra]
                run = figures.timed(command)
                held = max(delay.most_held_bytes for delay in proxy.delays)
                lanes = len(proxy.delays)
            share = total / run.seconds / rate
            shares.append(share)
            print(
                f"round {number}: push {run.seconds:.2f} s, {share:.3f} of the link ({lanes} connections, at most "
                f"{held >> 20} MiB of one on the way); plain socket {plain:.2f} s, {total / plain / rate:.3f}",
                flush=True,
            )
    figure.judge(f"{args.rate}, {args.rtt}: share of the link, median", figures.median(shares), ">=", GOAL)


def plain_seconds(inside: list[str], source: figures.Path, round_trip: float, most_bytes: int) -> float:
    """Seconds that a plain socket takes."""
    with socket.create_server(("127.0.0.1", 0)) as sink:

        def drain() -> None:
            peer, _ = sink.accept()
            with peer:
                while peer.recv(1 << 20):
                    pass
                peer.sendall(b"!")

        threading.Thread(target=drain, daemon=True).start()
        with contextlib.closing(DelayProxy(sink.getsockname()[1], round_trip, most_bytes)) as proxy:
            command = [*inside, sys.executable, "-c", PLAIN_CLIENT, source, NEAR, str(proxy.port)]
            return figures.timed(command).seconds


if __name__ == "__main__":
    sys.exit(main())
