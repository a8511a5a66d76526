#!/usr/bin/env python3
"""A TCP relay between client and server that judges resume and makes faults.

Bytes pass unchanged and are looked at on the way (h2sniff, judge). On request
the relay cuts connections with a reset, flips single bits of payload, or slows
down. The first line on stdout is {"event":"listening",…}; on SIGINT or SIGTERM
the last line is the report, and the exit status is 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from h2sniff import FrameReader, MessageReader, WireError, fields  # noqa: E402
from judge import Judge, Session, open_session  # noqa: E402

READ = 1 << 20


class _Call:
    """One HTTP/2 stream; ignored as soon as it is known to be no Push."""

    def __init__(self, conn: _Connection) -> None:
        self.conn = conn
        self.session: Session | None = None
        self.judge: Judge | None = None
        self.lane = 0
        self.seen = self.ignored = False
        self._flips: list[tuple[int, int]] = []  # position in the payload, mask
        relay = conn.relay
        flip = self._payload if relay.flips else None
        self.up = MessageReader(self._from_client, flip)
        self.down = MessageReader(self._from_server)

    def _from_client(self, head: bytearray) -> None:
        frame = fields(head)
        relay = self.conn.relay
        if not self.seen:
            self.seen = True
            self.session, self.judge, self.lane = relay.identify(frame)
            self.ignored = self.session is None
        if self.session and self.judge:
            relay.chunks += len(frame.get(10, ()))
            self.judge.sender_frame(self.session, frame)

    def _from_server(self, head: bytearray) -> None:
        if not self.session or not self.judge:
            return
        frame = fields(head)
        if self.lane:
            frame.pop(3, None)  # The Accept of a further lane says nothing new.
        elif 3 in frame:
            token = fields(frame[3][0]).get(6, [b""])[-1]
            self.conn.relay.tokens[token] = (self.session, self.judge)
        self.judge.receiver_frame(self.session, frame)

    def _payload(self, head: bytearray, offset: int, view: memoryview) -> None:
        """Flips the bits that were ordered for the chunks of this message."""
        relay = self.conn.relay
        if offset == 0:
            self._flips, at = [], 0
            for ordinal, raw in enumerate(fields(head).get(10, ()), relay.chunks):
                length = fields(raw).get(4, [0])[-1]
                for byte in relay.flips.pop(ordinal, ()) if length else ():
                    self._flips.append((at + byte % length, 1))
                at += length
        for position, mask in self._flips:
            if offset <= position < offset + len(view):
                view[position - offset] ^= mask
                relay.flipped += 1


class _Connection:
    """One connection: two sockets, a frame reader for each direction."""

    def __init__(self, relay: Relay, client: socket.socket, server: socket.socket) -> None:
        self.relay, self.client, self.server = relay, client, server
        self.calls: dict[int, _Call] = {}
        self.up = FrameReader(True, self._up_data, self._end)
        self.down = FrameReader(False, self._down_data, self._end)
        self.blind = False

    def _up_data(self, stream: int, view: memoryview) -> None:
        call = self.calls.get(stream) or self.calls.setdefault(stream, _Call(self))
        if not call.ignored:
            call.up.feed(view)

    def _down_data(self, stream: int, view: memoryview) -> None:
        call = self.calls.get(stream)
        if call and not call.ignored:
            call.down.feed(view)

    def _end(self, stream: int, reset: bool) -> None:
        call = self.calls.get(stream)
        if reset and call:
            self._close(call)
            call.ignored = True  # Late frames of a reset stream mean nothing.

    def _close(self, call: _Call) -> None:
        if call.session and call.lane == 0 and call.session.ended is None:
            call.session.ended = time.monotonic()

    def closed(self) -> None:
        """No more bytes will come."""
        for call in self.calls.values():
            self._close(call)

    def look(self, upstream: bool, view: memoryview) -> None:
        """Reads along; what it cannot read is reported once and then passed blindly."""
        if self.blind:
            return
        try:
            (self.up if upstream else self.down).feed(view)
        except (WireError, IndexError, KeyError, AttributeError) as error:
            self.blind = True
            side = "client" if upstream else "server"
            self.relay.unreadable.append(f"from the {side}: {error!r}")


class Relay:
    """The relay; `with Relay(("127.0.0.1", port)) as relay:` runs it in a thread.

    `cuts` are positions in the bytes that clients send, counted over all
    connections: when one is reached, what is before it is passed on, and the
    connection (all connections with `cut_all`) is reset on both sides.
    `flips` maps the number of a chunk, counted over all sessions, to bytes of
    its encoded payload whose lowest bit is flipped, once.
    `rate` limits each direction of each connection, in bytes per second.
    """

    def __init__(
        self,
        to: tuple[str, int],
        listen: tuple[str, int] = ("127.0.0.1", 0),
        *,
        cuts: Iterable[int] = (),
        cut_all: bool = False,
        flips: dict[int, list[int]] | None = None,
        rate: float | None = None,
        demotions_expected: Container[str] = (),
        crossing_s: float = 0.0,
    ) -> None:
        self.to, self.listen = to, listen
        self.cuts, self.cut_all = sorted(cuts), cut_all
        self.flips = {chunk: list(at) for chunk, at in (flips or {}).items()}
        self.rate = rate
        self._new_judge: Callable[[], Judge] = lambda: Judge(demotions_expected, crossing_s)
        self.judges: dict[tuple[str, str], Judge] = {}
        self.tokens: dict[bytes, tuple[Session, Judge]] = {}
        self.sessions: list[Session] = []
        self.unreadable: list[str] = []
        self.chunks = self.flipped = self.connections = self.refused = self.resets = 0
        self.bytes_up = self.bytes_down = 0
        self.port = 0
        self._open: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._failed: BaseException | None = None

    # ------------------------------------------------------------ what it saw

    def identify(self, frame: dict[int, list]) -> tuple[Session | None, Judge | None, int]:
        """Session, judge and lane of a call, by the client's first message."""
        if isinstance(frame.get(1, [None])[-1], bytes):
            session = open_session(frame[1][-1], len(self.sessions) + 1)
            if session:
                key = (session.checkpoint, session.transfer_id)
                judge = self.judges.setdefault(key, self._new_judge())
                judge.opened(session)
                self.sessions.append(session)
                return session, judge, 0
        elif isinstance(frame.get(2, [None])[-1], bytes):
            try:
                join = fields(frame[2][-1])
            except (IndexError, WireError):
                return None, None, 0
            if known := self.tokens.get(join.get(1, [b""])[-1]):
                known[0].lanes += 1
                return *known, join.get(2, [0])[-1]
        return None, None, 0

    @property
    def violations(self) -> int:
        """Broken promises in all transfers, and streams that could not be read."""
        return len(self.unreadable) + sum(
            sum(judge.violations.values()) for judge in self.judges.values()
        )

    def report(self) -> dict[str, Any]:
        """Everything counted, for JSON."""
        return {
            "event": "report",
            "connections": self.connections,
            "refused": self.refused,
            "resets": self.resets,
            "flipped": self.flipped,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "violations": self.violations,
            "unreadable": self.unreadable,
            "transfers": [
                {"checkpoint": name, "transfer_id": identity, **judge.report()}
                for (name, identity), judge in self.judges.items()
            ],
        }

    # ---------------------------------------------------------------- running

    async def run(self) -> None:
        """Accepts connections until it is cancelled."""
        loop = asyncio.get_running_loop()
        listener = socket.create_server(self.listen, backlog=64)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._ready.set()
        try:
            while True:
                client, _ = await loop.sock_accept(listener)
                task = asyncio.create_task(self._connection(client))
                self._open.add(task)
                task.add_done_callback(self._open.discard)
        finally:
            listener.close()
            for task in list(self._open):
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    async def _connection(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        server = socket.socket()
        conn = _Connection(self, client, server)
        pumps: list[asyncio.Task[None]] = []
        try:
            for sock in (client, server):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await loop.sock_connect(server, self.to)
            except OSError:
                self.refused += 1
                _linger_zero(client)
                return
            self.connections += 1
            pumps = [asyncio.create_task(self._pump(conn, up)) for up in (True, False)]
            await asyncio.gather(*pumps)
        except (OSError, asyncio.CancelledError):
            self.resets += 1
            _linger_zero(client, server)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            client.close()
            server.close()
            conn.closed()

    async def _pump(self, conn: _Connection, up: bool) -> None:
        loop = asyncio.get_running_loop()
        source, sink = (conn.client, conn.server) if up else (conn.server, conn.client)
        size = READ if self.rate is None else max(1024, min(READ, int(self.rate / 20)))
        view = memoryview(bytearray(size))
        due = time.monotonic()
        while n := await loop.sock_recv_into(source, view):
            part, cut = view[:n], False
            if up:
                cut = bool(self.cuts) and self.bytes_up + n >= self.cuts[0]
                if cut:
                    part = part[: self.cuts.pop(0) - self.bytes_up]
                self.bytes_up += len(part)
            else:
                self.bytes_down += n
            conn.look(up, part)
            await loop.sock_sendall(sink, part)
            if cut:
                self._cut()
            if self.rate:
                due = max(due, time.monotonic() - 0.1) + n / self.rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
        sink.shutdown(socket.SHUT_WR)

    def _cut(self) -> None:
        if self.cut_all:
            for task in list(self._open):
                task.cancel()
        raise ConnectionAbortedError("cut as ordered")

    # -------------------------------------------------------------- in a thread

    def __enter__(self) -> Relay:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="relay", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failed:
            raise self._failed
        return self

    def _serve(self) -> None:
        self._task = self._loop.create_task(self.run())
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # Told to the thread that waits in __enter__.
            self._failed = error
            self._ready.set()
        finally:
            self._loop.close()

    def __exit__(self, *_: object) -> None:
        try:
            self._loop.call_soon_threadsafe(self._task.cancel)
        except RuntimeError:  # The loop has ended already.
            pass
        self._thread.join()


def _linger_zero(*socks: socket.socket) -> None:
    """Makes close() send a reset instead of an orderly end."""
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def _flips(text: str) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for item in text.split(","):
        chunk, _, byte = item.partition(":")
        found.setdefault(int(chunk), []).append(int(byte))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--to", type=_address, required=True, metavar="HOST:PORT", help="the server")
    add("--listen", type=_address, default=("127.0.0.1", 0), metavar="HOST:PORT")
    add("--cut-after", metavar="N,…", default="", help="reset when clients sent N bytes in all")
    add("--cut-random", type=int, default=0, metavar="COUNT", help="resets at random places")
    add("--total", type=int, default=0, help="bytes over which the random places are spread")
    add("--seed", type=int, default=None, help="of the random places; drawn and told if absent")
    add("--cut-all", action="store_true", help="a reset hits every open connection")
    add("--flip", type=_flips, metavar="CHUNK:BYTE,…", help="flip a bit of that payload byte")
    add("--rate", type=float, metavar="BYTES/S", help="limit of each direction")
    add("--demoted", action="append", default=[], metavar="ENTRY",
        help="this entry's durable cells may be asked for again")
    add("--crossing", type=float, default=0.0, metavar="S",
        help="forgive a second copy this soon after its Durable in the same session")
    args = parser.parse_args()
    if args.cut_random and not args.total:
        parser.error("--cut-random needs --total")
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    cuts = [int(n) for n in args.cut_after.split(",") if n]
    cuts += [rng.randrange(1, args.total + 1) for _ in range(args.cut_random)]
    relay = Relay(args.to, args.listen, cuts=cuts, cut_all=args.cut_all, flips=args.flip,
                  rate=args.rate, demotions_expected=args.demoted, crossing_s=args.crossing)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with relay:
        listening = {"event": "listening", "address": f"{args.listen[0]}:{relay.port}",
                     "port": relay.port, "seed": seed, "cuts": sorted(cuts)}
        print(json.dumps(listening), flush=True)
        while not stop.wait(0.5):
            pass
    print(json.dumps(relay.report()), flush=True)
    return 1 if relay.violations else 0


if __name__ == "__main__":
    sys.exit(main())
