"""Every rule of scripts/check_sync_order.py against a made-up sequence that breaks only that rule."""

from __future__ import annotations

import struct
import sys
import unittest
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))
from check_sync_order import Call, Entry, SyncOrder, Unreadable, parse_trace  # noqa: E402

ROOT = "/r"
TARGET = "/r/team/model"
TRANSFERS = "/r/.tensorferry/transfers"
TRANSFER = f"{TRANSFERS}/0123456789abcdef"
DATA, JOURNAL = f"{TRANSFER}/data", f"{TRANSFER}/journal"
FILE = f"{DATA}/w.npy"
CELL = 1000
ENTRIES = [Entry("w", "w.npy", 128, 1500)]


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def record(kind: int, body: bytes) -> bytes:
    return struct.pack("<IB3x", len(body), kind) + body + b"sum!"


def frame(body: bytes) -> bytes:
    """One gRPC message in one DATA frame of stream 1."""
    body = b"\0" + struct.pack(">I", len(body)) + body
    return struct.pack(">I", len(body))[1:] + b"\0\0" + struct.pack(">I", 1) + body


HEADER = b"TFERRYJ\0" + struct.pack("<II", 1, 2) + field(2, 1) + b"sum!"
ENTRY_RECORD = record(3, field(1, 7) + field(2, b"w"))
CELLS_RECORD = record(4, field(1, field(1, 7) + field(3, b"12345678")))
KEPT_RECORD = record(5, field(1, field(1, 7) + field(3, b"12345678")))
PUBLISH_RECORD = record(7, field(1, b"x" * 32))
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
ACCEPT = frame(field(3, field(2, CELL) + field(4, 1)))
DURABLE = frame(field(11, field(1, 0) + field(2, field(2, 2))))
DONE = frame(field(4, field(2, 1)))


def say(data: bytes) -> Call:
    return Call("write", 0, 0, len(data), "socket:[1]", data=data)


def good_steps() -> dict[str, Call]:
    """A correct push, one named call after the other."""

    def write(path: str, offset: int, data: bytes) -> Call:
        return Call("write", 0, 0, len(data), path, offset=offset, data=data)

    def sync(path: str) -> Call:
        return Call("sync", 0, 0, 0, path)

    at_entry = len(HEADER)
    at_cells = at_entry + len(ENTRY_RECORD)
    at_publish = at_cells + len(CELLS_RECORD)
    return {
        "make .tensorferry": Call("mkdir", 0, 0, 0, "/r/.tensorferry"),
        "sync root": sync(ROOT),
        "make transfers": Call("mkdir", 0, 0, 0, TRANSFERS),
        "sync .tensorferry": sync("/r/.tensorferry"),
        "make transfer": Call("mkdir", 0, 0, 0, TRANSFER),
        "sync transfers": sync(TRANSFERS),
        "make data": Call("mkdir", 0, 0, 0, DATA),
        "make journal": Call("create", 0, 0, 5, JOURNAL),
        "write journal header": write(JOURNAL, 0, HEADER),
        "sync transfer": sync(TRANSFER),
        "accept": say(SETTINGS + ACCEPT),
        "make file": Call("create", 0, 0, 6, FILE),
        "write header": write(FILE, 0, b"h" * 128),
        "sync header": sync(FILE),
        "sync data folder": sync(DATA),
        "write entry": write(JOURNAL, at_entry, ENTRY_RECORD),
        "write cell 0": write(FILE, 128, b"x" * CELL),
        "write cell 1": write(FILE, 128 + CELL, b"x" * 500),
        "sync file": sync(FILE),
        "write cells": write(JOURNAL, at_cells, CELLS_RECORD),
        "sync journal": sync(JOURNAL),
        "ack": say(DURABLE),
        "make manifest": Call("create", 0, 0, 7, f"{DATA}/manifest.tmp"),
        "write manifest": write(f"{DATA}/manifest.tmp", 0, b"{}"),
        "sync manifest": sync(f"{DATA}/manifest.tmp"),
        "name manifest": Call("rename", 0, 0, 0, f"{DATA}/manifest.tmp", f"{DATA}/manifest.json"),
        "sync manifest name": sync(DATA),
        "write publish": write(JOURNAL, at_publish, PUBLISH_RECORD),
        "sync publish": sync(JOURNAL),
        "make team": Call("mkdir", 0, 0, 0, "/r/team"),
        "sync root again": sync(ROOT),
        "rename": Call("rename", 0, 0, 0, DATA, TARGET),
        "sync old parent": sync(TRANSFER),
        "sync new parent": sync("/r/team"),
        "done": say(DONE),
    }


def in_order(steps: dict[str, Call], *, overlap: tuple[str, str] | None = None) -> list[Call]:
    """Numbers the calls one after the other; `overlap`: the first ends only after the second began."""
    calls = {name: replace(call, begin=10 * i, end=10 * i + 1) for i, (name, call) in enumerate(steps.items(), 1)}
    if overlap:
        slow, next_one = overlap
        calls[slow] = replace(calls[slow], end=calls[next_one].begin + 5)
    return sorted(calls.values(), key=lambda call: call.begin)


def rules(calls: list[Call]) -> set[str]:
    """Names of the rules that are broken."""
    return {text.split()[0] for text in SyncOrder(ROOT, TARGET, ENTRIES).check(calls).violations}


def move(steps: dict[str, Call], name: str, after: str) -> dict[str, Call]:
    """The same steps with one of them later or earlier."""
    order = [step for step in steps if step != name]
    order.insert(order.index(after) + 1, name)
    return {step: steps[step] for step in order}


class Rules(unittest.TestCase):
    """Good sequences pass; each bad one is named by its rule."""

    def assert_without(self, name: str, *expected: str) -> None:
        steps = good_steps()
        del steps[name]
        self.assertEqual(rules(in_order(steps)), set(expected), f"without {name}")

    def assert_moved(self, name: str, after: str, *expected: str) -> None:
        self.assertEqual(rules(in_order(move(good_steps(), name, after))), set(expected), f"{name} after {after}")

    def test_good(self) -> None:
        report = SyncOrder(ROOT, TARGET, ENTRIES).check(in_order(good_steps()))
        self.assertEqual((report.acks, report.cells, report.violations), (1, 2, []))

    def test_good_with_syncfs(self) -> None:
        steps = good_steps()
        for name in ("sync header", "sync data folder", "sync file"):
            steps[name] = replace(steps[name], kind="syncfs", path=ROOT)
        del steps["sync data folder"]  # the one before it and this are the same barrier
        self.assertEqual(rules(in_order(steps)), set())

    def test_ack_before_record_is_synced(self) -> None:
        self.assert_without("sync journal", "ack")
        self.assert_moved("ack", "write cells", "ack")
        self.assertEqual(rules(in_order(good_steps(), overlap=("sync journal", "ack"))), {"ack"})
        self.assertEqual(rules(in_order(good_steps(), overlap=("write cells", "sync journal"))), {"ack"})

    def test_ack_without_record(self) -> None:
        self.assert_moved("ack", "write entry", "ack")

    def test_ack_of_no_such_cell(self) -> None:
        steps = good_steps()
        steps["ack"] = say(frame(field(11, field(1, 0) + field(2, field(1, 2) + field(2, 1)))))
        self.assertEqual(rules(in_order(steps)), {"ack"})

    def test_ack_in_two_pieces(self) -> None:
        steps = good_steps()
        order = list(steps)
        order.insert(order.index("write cells"), "ack, begun")
        steps |= {"ack, begun": say(DURABLE[:12]), "ack": say(DURABLE[12:])}
        self.assertEqual(rules(in_order({step: steps[step] for step in order})), set())

    def test_failed_journal_sync(self) -> None:
        steps = good_steps()
        steps["sync journal"] = replace(steps["sync journal"], result=-1)
        self.assertEqual(rules(in_order(steps)), {"ack", "publish"})

    def test_record_before_data(self) -> None:
        self.assert_moved("write cells", "write cell 1", "data")
        self.assertEqual(rules(in_order(good_steps(), overlap=("sync file", "write cells"))), {"data"})
        self.assertEqual(rules(in_order(good_steps(), overlap=("write cell 1", "sync file"))), {"data", "complete"})

    def test_write_after_sync(self) -> None:
        self.assert_moved("write cell 1", "sync file", "data", "complete")
        self.assert_moved("sync file", "write cell 0", "data", "complete")
        self.assert_moved("write cell 0", "write cells", "data", "complete")

    def test_sync_after_failed_sync(self) -> None:
        steps = good_steps()
        order = list(steps)
        order.insert(order.index("sync file"), "failed sync")
        steps["failed sync"] = Call("sync", 0, 0, -1, FILE)
        self.assertEqual(rules(in_order({step: steps[step] for step in order})), {"data", "complete"})

    def test_cell_not_covered(self) -> None:
        self.assert_without("write cell 1", "cover", "complete")
        steps = good_steps()
        steps["write cell 0"] = replace(steps["write cell 0"], result=999)
        self.assertEqual(rules(in_order(steps)), {"cover", "complete"})

    def test_kept_needs_no_writes(self) -> None:
        steps = good_steps()
        steps["write cells"] = replace(steps["write cells"], data=KEPT_RECORD)
        del steps["write cell 1"]
        self.assertEqual(rules(in_order(steps)), {"complete"})

    def test_header(self) -> None:
        self.assert_without("sync header", "header")
        self.assert_without("write header", "header", "complete")

    def test_directory_entries(self) -> None:
        self.assert_without("sync data folder", "dir")
        self.assert_moved("sync data folder", "write header")
        self.assert_moved("make file", "sync data folder", "dir")
        self.assert_without("sync transfers", "dir", "journal", "complete", "manifest")
        self.assert_without("sync transfer", "dir", "journal", "complete", "manifest")

    def test_journal_name(self) -> None:
        self.assert_moved("make journal", "sync transfer", "journal")

    def test_complete(self) -> None:
        steps = good_steps()
        order = list(steps)
        order.insert(order.index("write publish"), "late write")
        steps["late write"] = Call("write", 0, 0, 1, FILE, offset=0, data=b"H")
        self.assertEqual(rules(in_order({step: steps[step] for step in order})), {"complete"})

    def test_manifest(self) -> None:
        self.assert_without("sync manifest", "manifest")
        self.assert_without("write manifest", "manifest")
        self.assert_without("sync manifest name", "manifest")
        self.assert_moved("sync manifest", "write publish", "manifest")

    def test_publish(self) -> None:
        self.assert_without("sync publish", "publish")
        self.assert_moved("sync publish", "rename", "publish")
        self.assert_without("rename", "publish")
        self.assert_without("write publish", "publish")

    def test_rename(self) -> None:
        self.assert_without("sync old parent", "rename")
        self.assert_without("sync new parent", "rename")
        self.assert_without("sync root again", "rename")
        self.assert_moved("sync new parent", "make team", "rename")
        self.assert_moved("sync new parent", "done", "rename")

    def test_exchange(self) -> None:
        steps = good_steps()
        steps["rename"] = replace(steps["rename"], exchange=True)
        self.assertEqual(rules(in_order(steps)), set())


class Unjudged(unittest.TestCase):
    """What cannot be judged is an error, never a pass."""

    def assert_unreadable(self, **changes: Call) -> None:
        steps = good_steps()
        for name, call in changes.items():
            steps[name.replace("_", " ")] = call
        with self.assertRaises(Unreadable):
            rules(in_order(steps))

    def test_cut_buffers(self) -> None:
        steps = good_steps()
        self.assert_unreadable(ack=replace(steps["ack"], data=DURABLE[:-1]))
        self.assert_unreadable(write_cells=replace(steps["write cells"], data=CELLS_RECORD[:-1]))

    def test_bad_journal(self) -> None:
        steps = good_steps()
        bad = b"\xff" * len(CELLS_RECORD)
        self.assert_unreadable(write_cells=replace(steps["write cells"], data=bad))

    def test_no_accept_no_done(self) -> None:
        self.assert_unreadable(accept=say(SETTINGS))
        self.assert_unreadable(done=say(b""))


def hexed(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


class Parser(unittest.TestCase):
    """Lines as strace prints them."""

    def parse(self, *lines: str) -> list[Call]:
        return parse_trace(lines, "/cwd")

    def test_halves(self) -> None:
        path = hexed("/r/a b")
        calls = self.parse(
            f'7  12:00:00.000001 pwrite64(6<{path}>, "{hexed("xy")}"..., 20, 100 <unfinished ...>',
            f"8  12:00:00.000002 fdatasync(6<{path}>) = 0",
            "7  12:00:00.000003 <... pwrite64 resumed>) = 20",
        )
        self.assertEqual(calls[0], Call("write", 1, 3, 20, "/r/a b", offset=100, data=b"xy"))
        self.assertEqual(calls[1], Call("sync", 2, 2, 0, "/r/a b"))

    def test_never_returned(self) -> None:
        (call,) = self.parse(f"7  fsync(6<{hexed('/r')}> <unfinished ...>")
        self.assertEqual(call.result, -1)
        self.assertGreater(call.end, 1 << 60)

    def test_vectors(self) -> None:
        vector = f'[{{iov_base="{hexed("ab")}", iov_len=2}}, {{iov_base="{hexed("cd")}"..., iov_len=20}}]'
        first, second = self.parse(
            f"7  pwritev2(6<{hexed('/r/f')}>, {vector}, 2, 5000, 0) = 22",
            f"7  writev(3<{hexed('socket:[9]')}>, {vector}, 2) = 22",
        )
        self.assertEqual((first.offset, first.result, first.data), (5000, 22, b"abcd"))
        self.assertEqual((second.offset, second.path), (None, "socket:[9]"))

    def test_names(self) -> None:
        folder, here = hexed("/r/d"), hexed("/cwd")
        calls = self.parse(
            f'7  openat2(5<{folder}>, "{hexed("f")}", {{flags=O_RDWR|O_CREAT, mode=0600}}, 24) = 6<{hexed("/r/d/f")}>',
            f'7  mkdirat(5<{folder}>, "{hexed("x")}", 0700) = 0',
            f'7  renameat2(5<{folder}>, "{hexed("x")}", AT_FDCWD<{here}>, "{hexed("y")}", RENAME_EXCHANGE) = 0',
            f'7  rename("{hexed("p")}", "{hexed("/q")}") = -1 ENOENT (No such file or directory)',
        )
        self.assertEqual([call.kind for call in calls], ["create", "mkdir", "rename", "rename"])
        self.assertEqual([call.path for call in calls], ["/r/d/f", "/r/d/x", "/r/d/x", "/cwd/p"])
        self.assertEqual([call.to for call in calls], ["", "", "/cwd/y", "/q"])
        self.assertTrue(calls[2].exchange)
        self.assertEqual(calls[3].result, -1)


if __name__ == "__main__":
    unittest.main()
