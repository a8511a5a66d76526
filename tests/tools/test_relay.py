#!/usr/bin/env python3
"""Tests of the relay and its judge with frames made by hand; needs nothing but Python.

    python3 -m unittest tests/tools/test_relay.py
"""

from __future__ import annotations

import random
import socket
import sys
import threading
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from h2sniff import DATA, PADDED, PREFACE, RST_STREAM  # noqa: E402
from judge import Judge, RangeSet  # noqa: E402
from relay import Relay, _Connection  # noqa: E402

CELL = 1 << 18


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def num(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def sub(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def opening(restart: bool = False) -> bytes:
    body = num(1, 1) + sub(2, b"run/x") + sub(3, b"t" * 16) + num(15, restart) + sub(18, b"npy")
    return sub(1, body)


def entry(index: int, name: str, length: int) -> bytes:
    return sub(9, num(1, index) + sub(2, name.encode()) + num(8, length))


def chunk(index: int, cell: int, payload: bytes) -> bytes:
    head = num(1, index) + num(2, cell * CELL) + num(3, len(payload)) + num(4, len(payload))
    return sub(10, head + varint(6 << 3 | 5) + b"\1\2\3\4") + sub(15, payload)


def accept(token: bytes = b"s" * 16) -> bytes:
    return sub(3, num(1, 1) + num(2, CELL) + sub(6, token) + num(7, 1))


def cells(*pairs: tuple[int, int], field: int = 2) -> bytes:
    return b"".join(sub(field, num(1, first) + num(2, count)) for first, count in pairs)


def wanted(index: int, *pairs: tuple[int, int], held: tuple[tuple[int, int], ...] = ()) -> bytes:
    return sub(8, num(1, index) + cells(*pairs) + cells(*held, field=3) + num(4, 1))


def durable(index: int, *pairs: tuple[int, int]) -> bytes:
    return sub(11, num(1, index) + cells(*pairs))


def message(body: bytes) -> bytes:
    return b"\0" + len(body).to_bytes(4, "big") + body


def frames(body: bytes, stream: int = 1, rng: random.Random | None = None) -> bytes:
    """DATA frames, with `rng` cut anywhere and some of them padded."""
    out, at = b"", 0
    while at < len(body):
        part = body[at : at + (rng.randrange(1, 40_000) if rng else 1 << 14)]
        at += len(part)
        flags = 0
        if rng and rng.random() < 0.3:
            pad = rng.randrange(256)
            part, flags = bytes([pad]) + part + bytes(pad), PADDED
        out += len(part).to_bytes(3, "big") + bytes([DATA, flags]) + stream.to_bytes(4, "big")
        out += part
    return out


class Wire:
    """A relay's view of connections, without sockets."""

    def __init__(self, **options: object) -> None:
        self.relay = Relay(("", 0), **options)  # type: ignore[arg-type]
        self.reconnect()

    def reconnect(self) -> None:
        self.conn = _Connection(self.relay, None, None)  # type: ignore[arg-type]
        self._look(True, PREFACE)

    def up(self, *bodies: bytes, stream: int = 1) -> None:
        for body in bodies:
            self._look(True, frames(message(body), stream))

    def down(self, *bodies: bytes, stream: int = 1) -> None:
        for body in bodies:
            self._look(False, frames(message(body), stream))

    def _look(self, up: bool, data: bytes) -> None:
        self.conn.look(up, memoryview(bytearray(data)))

    @property
    def judge(self) -> Judge:
        (judge,) = self.relay.judges.values()
        return judge

    def begin(self, *pairs: tuple[int, int], length: int = 3 * CELL + 5) -> None:
        """A session up to the first answer."""
        self.reconnect()
        self.up(opening())
        self.down(accept())
        self.up(entry(0, "w", length))
        self.down(wanted(0, *pairs))


class Ranges(unittest.TestCase):
    def test_against_a_set(self) -> None:
        rng = random.Random(1)
        for _ in range(200):
            ranges, model = RangeSet(), set[int]()
            for _ in range(20):
                a, b = sorted(rng.sample(range(60), 2))
                if rng.random() < 0.7:
                    ranges.add(a, b)
                    model |= set(range(a, b))
                else:
                    ranges.remove(a, b)
                    model -= set(range(a, b))
                self.assertEqual(ranges.overlap(a, b), len(model & set(range(a, b))))
                self.assertEqual(ranges.total(), len(model))


class Judging(unittest.TestCase):
    def test_a_good_transfer_of_two_sessions(self) -> None:
        wire = Wire()
        wire.begin((0, 4))
        wire.up(chunk(0, 0, bytes(CELL)), chunk(0, 1, bytes(CELL)))
        wire.down(durable(0, (0, 1)))
        wire.begin((1, 3))
        wire.up(chunk(0, 1, bytes(CELL)), chunk(0, 2, bytes(CELL)), chunk(0, 3, bytes(5)))
        wire.down(durable(0, (1, 3)), sub(4, num(2, 1)))
        report = wire.judge.report()
        self.assertEqual(report["violations"], {})
        self.assertEqual((report["sessions"], report["chunks"]), (2, 5))
        self.assertEqual(report["bytes_resent"], CELL)
        self.assertEqual((report["durable_bytes"], report["durable_cells"]), (3 * CELL + 5, 4))
        self.assertTrue(report["done"])
        self.assertEqual(list(wire.relay.sessions[1].claimed["w"]), [(0, CELL)])

    def test_a_durable_cell_wanted_and_sent_again(self) -> None:
        wire = Wire()
        wire.begin((0, 4))
        wire.up(chunk(0, 0, bytes(CELL)))
        wire.down(durable(0, (0, 1)))
        wire.begin((0, 4))
        wire.up(chunk(0, 0, bytes(CELL)))
        self.assertEqual(
            wire.judge.violations, {"durable-wanted-again": 1, "durable-sent-again": 1}
        )

    def test_a_durable_cell_sent_twice_in_a_session(self) -> None:
        for crossing, broken in ((0.0, {"durable-sent-again-same-session": 1}), (60.0, {})):
            wire = Wire(crossing_s=crossing)
            wire.begin((0, 4))
            wire.up(chunk(0, 0, bytes(CELL)))
            wire.down(durable(0, (0, 1)))
            wire.up(chunk(0, 0, bytes(CELL)))
            self.assertEqual(wire.judge.violations, broken)

    def test_a_changed_source_may_be_asked_for_again(self) -> None:
        wire = Wire(demotions_expected=["w"])
        wire.begin((0, 4))
        wire.up(chunk(0, 0, bytes(CELL)), chunk(0, 1, bytes(CELL)))
        wire.down(durable(0, (0, 2)))
        wire.reconnect()
        wire.up(opening())
        wire.down(accept())
        wire.up(entry(0, "w", 3 * CELL + 5))
        wire.down(wanted(0, (2, 2), held=((0, 2),)), sub(12, num(1, 0) + cells((0, 1))))
        wire.down(wanted(0, (1, 1)))
        wire.up(chunk(0, 1, bytes(CELL)))
        self.assertEqual(wire.judge.violations, {})
        self.assertEqual(wire.judge.durable_bytes(), CELL)

    def test_done_needs_durable(self) -> None:
        wire = Wire()
        wire.begin((0, 4))
        wire.down(durable(0, (0, 3)), sub(4, num(2, 1)))
        self.assertEqual(wire.judge.violations, {"done-without-durable": 1})

    def test_restart_forgets(self) -> None:
        wire = Wire()
        wire.begin((0, 4))
        wire.down(durable(0, (0, 4)))
        wire.reconnect()
        wire.up(opening(restart=True))
        wire.down(accept())
        wire.up(entry(0, "w", 3 * CELL + 5))
        wire.down(wanted(0, (0, 4)))
        self.assertEqual(wire.judge.violations, {})

    def test_lanes_belong_to_their_session(self) -> None:
        wire = Wire()
        wire.begin((0, 4))
        wire.reconnect()
        wire.up(sub(2, sub(1, b"s" * 16) + num(2, 1)), chunk(0, 2, bytes(CELL)))
        wire.down(accept(b"x" * 16), sub(10, num(1, 1)))
        report = wire.judge.report()
        self.assertEqual((report["sessions"], report["lanes"], report["chunks"]), (1, 2, 1))
        self.assertEqual(report["violations"], {})

    def test_other_calls_are_left_alone(self) -> None:
        wire = Wire()
        pull = sub(1, num(1, 1) + sub(2, b"run/x") + sub(3, b"t" * 16) + num(4, 1) + sub(5, b"*"))
        for stream, body in enumerate((pull, sub(1, b"run"), b"", num(2, 5), sub(2, b"\xff"))):
            wire.up(body, stream=2 * stream + 1)
            wire.down(sub(1, bytes(2_000_000)), stream=2 * stream + 1)
        self.assertEqual(wire.relay.sessions, [])
        self.assertEqual(wire.relay.unreadable, [])


class Sniffing(unittest.TestCase):
    def test_any_cut_reads_the_same(self) -> None:
        for seed in range(60):
            rng = random.Random(seed)
            wire = Wire()
            payload = rng.randbytes(CELL)
            noise = b"\0\0\7\4\0\0\0\0\0settngs" + b"\0\0\4" + bytes([RST_STREAM, 0]) + bytes(3)
            up = message(opening()) + message(entry(0, "näme", 2 * CELL))
            up += message(chunk(0, 0, payload)) + message(b"") + message(chunk(0, 1, payload))
            up += message(sub(4, num(1, 1)))
            down = message(accept()) + message(wanted(0, (0, 2)))
            data = noise + b"\x09" + b"code" + frames(up, 1, rng)
            conn = wire.conn
            # The answers must come in the right place: they go first here, once the call is known.
            first = frames(message(opening()) + message(entry(0, "näme", 2 * CELL)), 7, rng)
            for way, stream in ((True, first), (False, frames(down, 7, rng))):
                self._feed(conn, way, stream, rng)
            tail = message(chunk(0, 0, payload)) + message(b"") + message(chunk(0, 1, payload))
            self._feed(conn, True, frames(tail + message(sub(4, num(1, 1))), 7, rng), rng)
            self._feed(conn, True, data, rng)
            self.assertEqual(wire.relay.unreadable, [], seed)
            session = wire.relay.sessions[0]
            self.assertEqual([c.offset for c in session.chunks], [0, CELL])
            self.assertTrue(session.finish)
            self.assertEqual(len(wire.relay.sessions), 2)

    def _feed(self, conn: _Connection, up: bool, data: bytes, rng: random.Random) -> None:
        at = 0
        while at < len(data):
            n = rng.choice((1, 5, 1000, 70_000))
            conn.look(up, memoryview(bytearray(data[at : at + n])))
            at += n

    def test_rubbish_is_told_once_and_passed(self) -> None:
        wire = Wire()
        wire.up(b"\x0f\x0f\x0f")
        wire.up(b"\x0f\x0f\x0f")
        self.assertEqual(len(wire.relay.unreadable), 1)


class Sockets(unittest.TestCase):
    """A relay in its thread between a sender and a sink of this process."""

    def send(self, data: bytes, **options: object) -> tuple[bytes, Relay, bool]:
        """What arrives, the relay, and whether the sender saw a reset."""
        got, reset = bytearray(), False
        listener = socket.create_server(("127.0.0.1", 0))

        def sink() -> None:
            conn, _ = listener.accept()
            try:
                while part := conn.recv(1 << 16):
                    got.extend(part)
            except ConnectionResetError:
                pass
            conn.close()

        thread = threading.Thread(target=sink)
        thread.start()
        with Relay(listener.getsockname(), **options) as relay:  # type: ignore[arg-type]
            with socket.create_connection(("127.0.0.1", relay.port)) as sender:
                try:
                    sender.sendall(data)
                    sender.shutdown(socket.SHUT_WR)
                    sender.recv(1)
                except (ConnectionResetError, BrokenPipeError):
                    reset = True
            thread.join(10)
        listener.close()
        return bytes(got), relay, reset

    def test_bytes_pass_unchanged(self) -> None:
        head = frames(message(opening()) + message(entry(0, "w", 9 * CELL)))
        data = PREFACE + head + b"".join(
            frames(message(chunk(0, i, random.Random(i).randbytes(CELL)))) for i in range(9)
        )
        got, relay, reset = self.send(data)
        self.assertEqual(got, data)
        self.assertFalse(reset)
        self.assertEqual(relay.chunks, 9)

    def test_one_bit_is_flipped(self) -> None:
        data = PREFACE + frames(message(opening()) + message(entry(0, "w", 9 * CELL)))
        at = []
        for i in range(3):
            payload = bytes([i]) * CELL
            data += (body := frames(message(chunk(0, i, payload))))
            at.append(len(data) - len(body))
        got, relay, _ = self.send(data, flips={1: [100_000], 2: [0, CELL - 1]})
        changed = [i for i in range(len(data)) if got[i] != data[i]]
        self.assertEqual([got[i] ^ data[i] for i in changed], [1, 1, 1])
        self.assertEqual(relay.flipped, 3)
        self.assertEqual([data[i] for i in changed], [1, 2, 2])
        self.assertTrue(at[1] < changed[0] < at[2] < changed[1] < changed[2] == len(data) - 1)

    def test_a_cut_is_a_reset_at_its_place(self) -> None:
        got, relay, reset = self.send(PREFACE + bytes(5_000_000), cuts=[1_000_001])
        self.assertTrue(reset)
        self.assertLessEqual(len(got), 1_000_001)
        self.assertEqual((relay.bytes_up, relay.resets, relay.cuts), (1_000_001, 1, []))

    def test_a_dead_server_is_a_reset(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            address = gone.getsockname()
        with Relay(address) as relay, socket.create_connection(("127.0.0.1", relay.port)) as client:
            with self.assertRaises(ConnectionResetError):
                client.recv(1)
        self.assertEqual(relay.refused, 1)


if __name__ == "__main__":
    unittest.main()
