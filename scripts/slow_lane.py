#!/usr/bin/env python3
"""Measures what one slow lane costs a push.

A proxy gives every connection a rate of its own, one of them a tenth of the others. The ideal time is
the bytes divided by the sum of the rates; the goal is at most 1.1 times that, whether the slow one is
lane 0, which also carries control frames, or another.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time

import figures
from figures import Figure, harness

GOAL = 1.1
SLOW = 0.1
PIECE = 64 << 10


class LaneProxy(harness.Proxy):
    """Gives each connection the rate of its number: `rates[i]`, the last for all further ones."""

    def __init__(self, server_port: int, rates: list[float]):
        self.rates = rates
        self.by_connection: list[int] = []
        super().__init__(server_port)

    def _up(self, client: socket.socket, server: socket.socket, tap: object) -> None:
        with self._lock:
            number = len(self.by_connection)
            self.by_connection.append(0)
        rate = self.rates[min(number, len(self.rates) - 1)]
        # What waits in sockets was not limited yet, and should be little.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
        due = time.monotonic()
        try:
            while data := client.recv(PIECE):
                # On a busy machine it wakes up late, and makes up for that.
                due = max(due, time.monotonic() - 0.2) + len(data) / rate
                time.sleep(max(0.0, due - time.monotonic()))
                server.sendall(data)
                self.by_connection[number] += len(data)
            server.shutdown(socket.SHUT_WR)
        except OSError:
            self._break(client, server)


def main() -> int:
    parser = figures.arguments(__doc__)
    parser.add_argument("--bytes", default="512M")
    parser.add_argument("--rate", default="25M", help="of a lane that is not slow, bytes a second; default: 25M")
    parser.add_argument("--lanes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--chunk", default=None)
    args = parser.parse_args()
    if args.quick:
        args.bytes, args.rate, args.lanes = "48M", "20M", [2]
    with figures.figure("one slow lane", args) as figure:
        measure(figure)
        return figure.end()


def measure(figure: Figure) -> None:
    args, folder = figure.args, figure.folder
    total, rate = harness.parse_size(args.bytes), float(harness.parse_size(args.rate))
    source, root = folder / "model.safetensors", folder / "root"
    root.mkdir()
    figures.write_model(source, [total], args.seed)
    time.sleep(figures.SETTLE_S)
    extra = figures.flags(args.binary, "push", {"codec": "none", "durability": "none", "chunk": args.chunk})
    with harness.Server(args.binary, root, harness.free_port()) as server:
        for lanes in args.lanes:
            for slow in [0, lanes - 1]:
                rates = [rate * SLOW if lane == slow else rate for lane in range(lanes)]
                with contextlib.closing(LaneProxy(server.port, rates)) as proxy:
                    name = f"model-{lanes}-{slow}"
                    command = figures.push_command(args.binary, source, proxy.port, name, [*extra, "--lanes", str(lanes)])
                    run = figures.timed(command)
                ideal = total / sum(rates)
                shares = " ".join(f"{passed / total:.3f}" for passed in proxy.by_connection)
                print(f"{lanes} lanes, lane {slow} slow: {run.seconds:.2f} s, ideal {ideal:.2f} s, shares {shares}", flush=True)
                figure.judge(f"{lanes} lanes, lane {slow} at a tenth: time / ideal", run.seconds / ideal, "<=", GOAL)


if __name__ == "__main__":
    sys.exit(main())
