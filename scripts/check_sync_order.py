#!/usr/bin/env python3
"""Proves from a system call trace that every durable ack of a server was true when it was sent.

A crash test only finds a missing sync when the crash comes at the right moment; the order of the
system calls shows it every time. The check knows the wire and journal formats but shares no code
with the program. strace prints a call's begin after the thread stopped to make it, and its end
before the thread goes on, so "A's end is printed before B's begin" means that A was over before B.

Rules for every acked cell:
  ack       a journal record of the cell was written and then synced before the ack was sent
  data      the cell was synced after the last write into it and before its record was written
  cover     writes that ended before that sync cover the whole cell
  header    the file's header was written and synced before the entry's record was written
  dir       so was the directory entry of the file, and of every folder made above it
  journal   before the first ack: the directory entries of the journal and of all folders above it
Rules for publishing:
  complete  every byte of every entry is synced before the PUBLISH record is written
  manifest  so are manifest.json and its directory entry
  publish   the PUBLISH record is synced before data/ is renamed
  rename    both parents are synced after the rename, and new folders above the name, before Done

Stores into a memory map leave no trace: run the server so that it writes with pwrite.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from os.path import dirname, join, normpath
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "tools"))
import harness  # noqa: E402

NEVER = 1 << 62
"""End of a call that was still running when the trace stopped."""

STRING_LIMIT = 16_384
"""Bytes of each buffer that strace prints: journal records and acks fit, payload is cut."""

TRACED = (
    "open,openat,openat2,creat,mkdir,mkdirat,write,writev,pwrite64,pwritev,pwritev2,sendto,sendmsg,lseek,"
    "fsync,fdatasync,syncfs,rename,renameat,renameat2"
)


class Unreadable(Exception):
    """The trace cannot be judged: a buffer was cut, or bytes do not follow the format."""


# ---------------------------------------------------------------- reading the trace


@dataclass(frozen=True)
class Call:
    """One system call. `begin` and `end` are line numbers of the trace, so they order all calls."""

    kind: str  # create, open, mkdir, write, seek, sync, syncfs or rename
    begin: int
    end: int
    result: int
    path: str
    to: str = ""  # target of a rename
    exchange: bool = False  # rename that swaps two names
    offset: int | None = None  # of a positional write, or where a seek went
    data: bytes = b""  # what was written, as far as strace printed it


KINDS = {
    **dict.fromkeys(("open", "openat", "openat2", "creat"), "open"),
    **dict.fromkeys(("mkdir", "mkdirat"), "mkdir"),
    **dict.fromkeys(("write", "writev", "pwrite64", "pwritev", "pwritev2", "sendto", "sendmsg"), "write"),
    **dict.fromkeys(("fsync", "fdatasync"), "sync"),
    **dict.fromkeys(("rename", "renameat", "renameat2"), "rename"),
    "syncfs": "syncfs",
    "lseek": "seek",
}
LINE = re.compile(r"^(\d+)\s+(?:[\d:.]+\s+)?(.*)$")
RESUMED = re.compile(r"^<\.\.\. (\w+) resumed>(.*)$")
CALL = re.compile(r"^(\w+)\((.*)\)\s+= (-?\d+|\?)(?:<([^>]*)>)?")
HEX = r"(?:\\x[0-9a-f]{2})*"
STRING = re.compile(rf'"({HEX})"(\.\.\.)?')
DESCRIPTOR = re.compile(rf"(?:\b\d+|AT_FDCWD)<({HEX})[^>]*>")


def unhex(text: str) -> bytes:
    """What `strace -xx` printed as \\x41\\x42."""
    return bytes.fromhex(text.replace("\\x", ""))


def parse_trace(lines: Iterable[str], cwd: str) -> list[Call]:
    """Calls of a trace made with `strace -f -y -xx`, in the order in which they began."""
    pending: dict[str, tuple[int, str]] = {}
    calls: list[Call] = []
    for number, line in enumerate(lines, 1):
        if not (match := LINE.match(line)):
            continue
        pid, text = match.groups()
        begin = number
        if text.endswith("<unfinished ...>"):
            pending[pid] = (number, text.removesuffix("<unfinished ...>").rstrip())
            continue
        if resumed := RESUMED.match(text):
            if pid not in pending:
                continue
            begin, head = pending.pop(pid)
            text = head + resumed[2]
        if call := parse_call(text, begin, number, cwd):
            calls.append(call)
    for begin, text in pending.values():
        # A write that never returned may still have reached the disk: keep it, without an end.
        if call := parse_call(f"{text}) = ?", begin, NEVER, cwd):
            calls.append(call)
    return sorted(calls, key=lambda call: call.begin)


def parse_call(text: str, begin: int, end: int, cwd: str) -> Call | None:
    """One call whose text is whole; None for what the rules do not look at."""
    match = CALL.match(text)
    if not match or match[1] not in KINDS:
        return None
    name, args, returned, opened = match.groups()
    kind = KINDS[name]
    result = -1 if returned == "?" else int(returned)
    folders = [unhex(found).decode(errors="replace") for found in DESCRIPTOR.findall(args)]
    strings = [(unhex(found), bool(cut)) for found, cut in STRING.findall(args)]

    def below(index: int) -> str:
        """The path argument number `index`, as seen from its directory descriptor."""
        folder = folders[index] if index < len(folders) else cwd
        return normpath(join(folder, strings[index][0].decode(errors="replace")))

    if kind in ("open", "mkdir"):
        path = unhex(opened).decode(errors="replace") if opened else below(0)
        creates = kind == "open" and ("O_CREAT" in args or name == "creat")
        return Call("create" if creates else kind, begin, end, result, path)
    if kind == "rename":
        return Call(kind, begin, end, result, below(0), below(1), "RENAME_EXCHANGE" in args)
    path = folders[0] if folders else ""
    if kind == "seek":
        return Call(kind, begin, end, result, path, offset=result)
    if kind != "write":
        return Call(kind, begin, end, result, path)
    offset = None
    if name.startswith("pwrite"):
        numbers = STRING.sub("", args).rsplit(", ", 2)
        offset = int(numbers[-2] if name == "pwritev2" else numbers[-1])
        offset = None if offset < 0 else offset
    data = b""
    for piece, cut in strings:
        data += piece
        if cut:  # what follows a cut buffer would stand in the wrong place
            break
    return Call(kind, begin, end, result, path, offset=offset, data=data)


# ---------------------------------------------------------------- reading protobuf


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A base-128 number and the position after it."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise Unreadable("a varint does not end")
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if data[at - 1] < 0x80:
            return value, at


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protobuf message."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        if tag & 7 == 0:
            value, at = varint(data, at)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            length, at = varint(data, at)
        elif tag & 7 in (1, 5):
            length = 8 if tag & 7 == 1 else 4
        else:
            raise Unreadable(f"wire type {tag & 7}")
        if at + length > len(data):
            raise Unreadable("a protobuf field is longer than its message")
        yield tag >> 3, data[at : at + length]
        at += length


def message(data: bytes | int) -> dict[int, list[int | bytes]]:
    """All values of a message by field number."""
    if isinstance(data, int):
        raise Unreadable("a number stands where a message must")
    found: dict[int, list[int | bytes]] = defaultdict(list)
    for number, value in fields(data):
        found[number].append(value)
    return found


def number(of: dict[int, list[int | bytes]], index: int) -> int:
    """The last value of a numeric field, 0 when it is absent."""
    value = of[index][-1] if index in of else 0
    if not isinstance(value, int):
        raise Unreadable(f"field {index} is not a number")
    return value


# ---------------------------------------------------------------- reading wire and journal


@dataclass
class Stream:
    """Bytes put together from writes, each of which can still be found by position."""

    data: bytearray = field(default_factory=bytearray)
    starts: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def append(self, call: Call, data: bytes) -> None:
        """Adds what one write sent."""
        self.starts.append(len(self.data))
        self.calls.append(call)
        self.data += data

    def call_at(self, position: int) -> Call:
        """The write that carried this byte."""
        return self.calls[bisect_right(self.starts, position) - 1]


@dataclass(frozen=True)
class Ack:
    """One (entry, run of cells) of a durable message; `sent` is where its write began."""

    sent: int
    entry: int
    first: int
    count: int


@dataclass
class Said:
    """What the server said on all connections."""

    acks: list[Ack] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    chunk_len: int = 0
    durability: int = 0

    def hear(self, stream: Stream) -> None:
        """Reads the server's side of one HTTP/2 connection."""
        bodies: dict[int, Stream] = defaultdict(Stream)
        data, at = stream.data, 0
        while at + 9 <= len(data):
            length, kind, flags = int.from_bytes(data[at : at + 3], "big"), data[at + 3], data[at + 4]
            if at == 0 and kind != 4:
                return  # not HTTP/2: a server begins with SETTINGS
            start, stop = at + 9, at + 9 + length
            if kind == 0 and stop <= len(data):
                if flags & 8:
                    start, stop = start + 1, stop - data[start]
                body = bodies[int.from_bytes(data[at + 5 : at + 9], "big")]
                # A frame may span several writes; each part keeps the write that it came from.
                while start < stop:
                    index = bisect_right(stream.starts, start)
                    part = min(stop, stream.starts[index] if index < len(stream.starts) else stop)
                    body.append(stream.call_at(start), bytes(data[start:part]))
                    start = part
            at += 9 + length
        for body in bodies.values():
            self._hear_body(body)

    def _hear_body(self, body: Stream) -> None:
        at, first = 0, True
        while at + 5 <= len(body.data):
            stop = at + 5 + int.from_bytes(body.data[at + 1 : at + 5], "big")
            if stop > len(body.data):
                return  # never sent to its end, so nobody could read it
            if body.data[at]:
                raise Unreadable("a compressed gRPC message")
            frame = message(bytes(body.data[at + 5 : stop]))
            if first and 3 not in frame:
                return  # Accept comes first on every lane of a push: this is another call
            first = False
            self._hear_frame(frame, body.call_at(stop - 1).begin)
            at = stop

    def _hear_frame(self, frame: dict[int, list[int | bytes]], sent: int) -> None:
        for value in frame[3]:
            accept = message(value)
            self.chunk_len, self.durability = number(accept, 2), number(accept, 4)
        for value in frame[11]:
            durable = message(value)
            for run in durable[2]:
                cells = message(run)
                self.acks.append(Ack(sent, number(durable, 1), number(cells, 1), number(cells, 2)))
        self.done += [sent] * len(frame[4])


@dataclass(frozen=True)
class Record:
    """One journal record and the span of calls that wrote it."""

    kind: int
    body: dict[int, list[int | bytes]]
    begin: int
    end: int


ENTRY, CELLS, KEPT, PUBLISH = 3, 4, 5, 7


def journal_records(image: bytes, owners: list[Call]) -> list[Record]:
    """Records of a journal; `owners` holds the write that each byte came from."""
    if not image.startswith(b"TFERRYJ\0\x01\0\0\0"):
        raise Unreadable("the journal does not begin with its magic and version 1")
    at = 16 + int.from_bytes(image[12:16], "little") + 4
    records = []
    while at + 12 <= len(image):
        length, kind = int.from_bytes(image[at : at + 4], "little"), image[at + 4]
        if length == 0 and kind == 0:
            break  # preallocated and not written yet
        stop = at + 8 + length + 4
        if not 1 <= kind <= 7 or any(image[at + 5 : at + 8]) or stop > len(image):
            raise Unreadable(f"no journal record at byte {at}")
        calls = owners[at:stop]
        records.append(
            Record(
                kind,
                message(image[at + 8 : stop - 4]),
                min(call.begin for call in calls),
                max(call.end for call in calls),
            )
        )
        at = stop
    return records


# ---------------------------------------------------------------- the rules


@dataclass(frozen=True)
class Entry:
    """What the harness knows of a tensor: announced in this order, landed at this place."""

    name: str
    file: str  # below data/
    data_offset: int
    byte_len: int


@dataclass
class Report:
    """What was checked and what was wrong."""

    acks: int = 0
    cells: int = 0
    violations: list[str] = field(default_factory=list)


class SyncOrder:
    """Judges one push of `entries` to `target` (both paths absolute) below `root`."""

    def __init__(self, root: str, target: str, entries: list[Entry]):
        self.root, self.target, self.entries = root, target, entries
        self.journal_path = re.compile(re.escape(root) + r"/\.tensorferry/transfers/[0-9a-f]{16}/journal")

    def check(self, calls: list[Call]) -> Report:
        """A pure function of the calls: Unreadable when they cannot be judged."""
        self.report = Report()
        self._gather(calls)
        transfers = {dirname(path) for path in self.writes if self.journal_path.fullmatch(path)}
        if len(transfers) != 1:
            raise Unreadable(f"{len(transfers)} journals were written, one was expected")
        self.transfer = transfers.pop()
        self.journal, self.data = f"{self.transfer}/journal", f"{self.transfer}/data"
        self.records = self._read_journal()
        self.said = Said()
        for stream in self.sockets.values():
            self.said.hear(stream)
        if not self.said.chunk_len:
            raise Unreadable("no Accept was found in what the server sent")
        self._check_acks()
        self._check_publish()
        return self.report

    # ---- facts

    def _gather(self, calls: list[Call]) -> None:
        """Sorts the calls by what they touch."""
        self.writes: dict[str, list[tuple[int, int, Call]]] = defaultdict(list)  # start, stop, call
        self.syncs: dict[str, list[Call]] = defaultdict(list)
        self.file_system_syncs: list[Call] = []
        self.made: dict[str, list[Call]] = defaultdict(list)
        self.renames: list[Call] = []
        self.sockets: dict[str, Stream] = defaultdict(Stream)
        position: dict[str, int] = defaultdict(int)
        for call in self._settle_names(calls):
            ok = call.result >= 0
            if call.kind == "write" and call.path.startswith("socket:"):
                if ok:
                    if len(call.data) < call.result:
                        raise Unreadable(f"line {call.begin}: strace cut {call.result} bytes sent")
                    self.sockets[call.path].append(call, call.data[: call.result])
                continue
            if not self._within(call.path, self.root) and not self._within(call.to, self.root):
                continue
            if call.kind == "write" and (ok or call.end == NEVER):
                start = position[call.path] if call.offset is None else call.offset
                stop = start + (call.result if ok else len(call.data))
                self.writes[call.path].append((start, stop, call))
                if call.offset is None:
                    position[call.path] = stop
            elif call.kind == "sync":
                self.syncs[call.path].append(call)
            elif call.kind == "syncfs":
                self.file_system_syncs.append(call)
            elif not ok:
                continue
            elif call.kind == "seek":
                position[call.path] = call.result
            elif call.kind in ("create", "open"):
                position[call.path] = 0
                if call.kind == "create" and not self.made[call.path]:
                    self.made[call.path].append(call)
            elif call.kind == "mkdir":
                self.made[call.path].append(call)
            elif call.kind == "rename":
                self.renames.append(call)
                self.made[call.to].append(call)

    def _settle_names(self, calls: list[Call]) -> list[Call]:
        """Lets everything done under a temporary name count for the name it was renamed to.

        The rename of data/ stays what it is: the rules speak of it by its own name.
        """
        renames = [c for c in calls if c.kind == "rename" and c.result == 0 and not self._publishes(c)]
        settled = []
        for call in calls:
            path = call.path
            for rename in renames:
                if call.begin < rename.begin and self._within(path, rename.path):
                    path = rename.to + path[len(rename.path) :]
            settled.append(replace(call, path=path) if path != call.path else call)
        return settled

    def _publishes(self, call: Call) -> bool:
        return self.target in (call.to, call.path)

    @staticmethod
    def _within(path: str, folder: str) -> bool:
        return path == folder or path.startswith(folder + "/")

    def _read_journal(self) -> list[Record]:
        size = max(stop for _, stop, _ in self.writes[self.journal])
        image = bytearray(size)
        owners: list[Call | None] = [None] * size
        for start, stop, call in self.writes[self.journal]:
            if len(call.data) < stop - start:
                raise Unreadable(f"line {call.begin}: strace cut {stop - start} bytes of the journal")
            image[start:stop] = call.data[: stop - start]
            owners[start:stop] = [call] * (stop - start)
        if None in owners:
            raise Unreadable("parts of the journal were written by a call that is not traced")
        return journal_records(bytes(image), [call for call in owners if call])

    # ---- questions

    def _synced(self, path: str, after: int, before: int) -> bool:
        """Whether a good sync of `path` began after and ended before.

        A sync that follows a failed one proves nothing: the kernel has dropped the dirty pages.
        """
        failed = min((c.end for c in self.syncs[path] if c.result != 0), default=NEVER)
        own = (c for c in self.syncs[path] if c.begin < failed)
        return any(c.result == 0 and c.begin > after and c.end < before for c in (*own, *self.file_system_syncs))

    def _unsynced_name(self, path: str, before: int) -> str | None:
        """The first name on the way down to `path` that was made in this run and may still be lost."""
        names = []
        while self._within(path, self.root) and path != self.root:
            names.append(path)
            path = dirname(path)
        for name in reversed(names):
            made = [call.end for call in self.made[name] if call.begin < before]
            if made and not self._synced(dirname(name), made[-1], before):
                return name
        return None

    def _lost_range(self, path: str, start: int, stop: int, before: int, upto: int) -> str | None:
        """Why bytes start to stop of `path` may be lost: the rule that is broken, or None.

        They must be covered by writes that ended before a sync that ended before `before`. Writes
        that began after `upto` are not looked at.
        """
        touching = [(a, b, c) for a, b, c in self.writes[path] if a < stop and b > start and c.begin < upto]
        last = max((c.end for _, _, c in touching), default=0)
        reached = start
        for a, b, c in sorted(touching, key=lambda item: item[:2]):
            if a <= reached and c.result >= 0:
                reached = max(reached, b)
        if reached < stop:
            return "cover"
        return None if start == stop or self._synced(path, last, before) else "data"

    # ---- rules

    def _fail(self, rule: str, text: str) -> None:
        self.report.violations.append(f"{rule:<8} {text}")

    def _path(self, entry: Entry) -> str:
        return f"{self.data}/{entry.file}"

    def _check_acks(self) -> None:
        numbers: dict[str, int] = {}  # name -> number of its newest ENTRY record
        recorded: dict[int, Record] = {}
        by_cell: dict[tuple[int, int], list[Record]] = defaultdict(list)
        for record in self.records:
            if record.kind == ENTRY:
                name = record.body[2][0]
                assert isinstance(name, bytes)
                numbers[name.decode()] = number(record.body, 1)
                recorded[number(record.body, 1)] = record
            elif record.kind in (CELLS, KEPT):
                for value in record.body[1]:
                    run = message(value)
                    sums = b"".join(part for part in run[3] if isinstance(part, bytes))
                    for cell in range(number(run, 2), number(run, 2) + len(sums) // 4):
                        by_cell[number(run, 1), cell].append(record)
        seen_entries: set[int] = set()
        for ack in self.said.acks:
            self.report.acks += 1
            if ack.entry >= len(self.entries):
                self._fail("ack", f"line {ack.sent}: entry {ack.entry} was never announced")
                continue
            entry = self.entries[ack.entry]
            journal_number = numbers.get(entry.name, -1)
            if ack.entry not in seen_entries and journal_number in recorded:
                seen_entries.add(ack.entry)
                self._check_entry(entry, recorded[journal_number])
            for cell in range(ack.first, ack.first + ack.count):
                self.report.cells += 1
                self._check_cell(entry, cell, ack.sent, by_cell[journal_number, cell])
        if self.said.acks:
            first = min(ack.sent for ack in self.said.acks)
            if lost := self._unsynced_name(self.journal, first):
                self._fail("journal", f"line {first}: the name {lost} was not synced before the first ack")

    def _check_entry(self, entry: Entry, record: Record) -> None:
        """Nothing may be recorded of a file whose header or name could still be lost."""
        path = self._path(entry)
        if self._lost_range(path, 0, entry.data_offset, record.begin, record.begin):
            self._fail("header", f"line {record.begin}: header of {entry.name} not synced before its record")
        if not self.made[path]:
            self._fail("dir", f"{path} was never seen to be made")
        elif name := self._unsynced_name(path, record.begin):
            self._fail("dir", f"line {record.begin}: {name} not synced as a name before the record of {entry.name}")

    def _check_cell(self, entry: Entry, cell: int, sent: int, records: list[Record]) -> None:
        """Any record of the cell may carry the ack; what is said is what the last one lacks."""
        start = cell * self.said.chunk_len
        stop = min(start + self.said.chunk_len, entry.byte_len)
        what = f"line {sent}: ack of cell {cell} of {entry.name}"
        if start >= entry.byte_len:
            self._fail("ack", f"{what}: there is no such cell")
            return
        problem = ("ack", "no journal record was written before it")
        for record in records:
            if record.end >= sent:
                continue
            path, offset = self._path(entry), entry.data_offset
            lost = self._lost_range(path, offset + start, offset + stop, record.begin, sent)
            if lost == "cover" and record.kind == KEPT:
                lost = None  # held from an earlier run, which this trace does not show
            if lost == "data":
                problem = (lost, f"not synced after its last write and before its record (line {record.begin})")
            elif lost == "cover":
                problem = (lost, "writes do not cover it")
            elif not self._synced(self.journal, record.end, sent):
                problem = ("ack", f"its record (line {record.begin}) was not synced before it")
            else:
                return
        self._fail(problem[0], f"{what}: {problem[1]}")

    def _check_publish(self) -> None:
        if not self.said.done:
            raise Unreadable("the server never said Done")
        done = min(self.said.done)
        renames = [c for c in self.renames if self._publishes(c) and self.data in (c.path, c.to) and c.end < done]
        records = [r for r in self.records if r.kind == PUBLISH]
        if not renames or not records:
            missing = "rename of data/" if records else "PUBLISH record"
            self._fail("publish", f"line {done}: Done without a {missing} before it")
            return
        record, rename = records[-1], renames[-1]
        for entry in self.entries:
            path, length = self._path(entry), entry.data_offset + entry.byte_len
            if self._lost_range(path, 0, length, record.begin, done) or self._unsynced_name(path, record.begin):
                self._fail("complete", f"line {record.begin}: {entry.name} not synced before PUBLISH")
        manifest = f"{self.data}/manifest.json"
        size = max((stop for _, stop, _ in self.writes[manifest]), default=0)
        if not size or self._lost_range(manifest, 0, size, record.begin, done):
            self._fail("manifest", f"line {record.begin}: manifest.json not synced before PUBLISH")
        if not self.made[manifest] or self._unsynced_name(manifest, record.begin):
            self._fail("manifest", f"line {record.begin}: name of manifest.json not synced before PUBLISH")
        if not self._synced(self.journal, record.end, rename.begin):
            self._fail("publish", f"line {rename.begin}: PUBLISH record not synced before the rename")
        for parent in (dirname(self.data), dirname(self.target)):
            if not self._synced(parent, rename.end, done):
                self._fail("rename", f"line {done}: {parent} not synced after the rename and before Done")
        if name := self._unsynced_name(dirname(self.target), done):
            self._fail("rename", f"line {done}: the name {name} not synced before Done")


# ---------------------------------------------------------------- the run


def entry_lengths(total: int, small: int) -> dict[str, int]:
    """Large tensors that end inside a cell, small ones, and an empty one, in the order announced."""
    large = 5
    lengths = {f"t{i:03}.large": total // large - 12_345 * i - 7 for i in range(large)}
    lengths |= {f"t{large + i:03}.small": 1 + 613 * i for i in range(small)}
    return lengths | {f"t{large + small:03}.empty": 0}


def trace_push(args: argparse.Namespace, folder: Path) -> Report:
    """Pushes one checkpoint to a traced server and judges the trace."""
    root, source, trace = folder / "root", folder / "model.safetensors", folder / "trace"
    root.mkdir()
    tensors = harness.random_tensors(entry_lengths(args.bytes, args.small), seed=1)
    harness.write_safetensors(source, tensors)
    wrapper = ["strace", "-f", "-y", "-tt", "-xx", "-I", "2", "-s", str(STRING_LIMIT), "-o", str(trace)]
    if "--seccomp-bpf" in subprocess.run(["strace", "--help"], capture_output=True, text=True).stdout:
        wrapper.append("--seccomp-bpf")  # only traced calls stop the server: some ten times faster
    wrapper += ["-e", f"trace={TRACED}"]
    port, name = harness.free_port(), "check/model"
    with harness.Server(args.binary, root, port, wrapper=wrapper, extra=args.serve_arg):
        harness.Push(args.binary, [source], port, name, "--durability", args.durability, *args.push_arg).expect(0)
    target = root / name
    if difference := harness.first_difference(harness.landed(target), tensors):
        raise harness.Failed(f"what landed is not the source: {difference}")
    manifest = {t["name"]: t for t in json.loads((target / "manifest.json").read_bytes())["tensors"]}
    order = [t["name"] for t in sorted(manifest.values(), key=lambda t: t["index"])]
    if order != list(tensors):
        raise Unreadable("entries were not announced in the order of their offsets in the source")
    entries = [Entry(n, manifest[n]["file"], manifest[n]["data_offset"], manifest[n]["nbytes"]) for n in tensors]
    with trace.open() as lines:
        calls = parse_trace(lines, str(root))
    order_check = SyncOrder(str(root), str(target), entries)
    report = order_check.check(calls)
    if order_check.said.durability != 1:
        harness.not_run(f"check_sync_order: {root} is on no disk (durability PROCESS); choose another --dir")
    if not report.acks and args.durability != "end":
        report.violations.append("no durable ack was sent, nothing was proven")
    return report


def main() -> int:
    """Exit status 0 when every ack was true."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--binary", type=lambda text: Path(text).resolve(), required=True, help="the tensorferry to test"
    )
    parser.add_argument(
        "--bytes", type=harness.parse_size, default="64M", help="size of the large tensors (default 64M)"
    )
    parser.add_argument(
        "--small", type=int, default=50, help="number of small tensors; more than 60 make a group use syncfs"
    )
    parser.add_argument(
        "--durability", choices=("strict", "group", "end"), default="strict", help="when the server commits"
    )
    parser.add_argument("--dir", type=Path, help="folder for the run, on a disk (default: the temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the run, with the trace in it")
    parser.add_argument(
        "--serve-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="further argument of serve, e.g. --serve-arg=--write=pwrite",
    )
    parser.add_argument("--push-arg", action="append", default=[], metavar="ARG", help="further argument of push")
    args = parser.parse_args()
    harness.require_strace()
    folder = Path(tempfile.mkdtemp(dir=args.dir, prefix="sync-order-")).resolve()
    try:
        report = trace_push(args, folder)
    except (harness.Failed, harness.Broken, Unreadable) as error:
        print(f"failed: {error}")
        return 1
    finally:
        if args.keep:
            print(f"kept in {folder}")
        else:
            shutil.rmtree(folder)
    for violation in report.violations[:50]:
        print(violation.replace(f"{folder}/", ""))
    print(f"acks {report.acks}, cells {report.cells}, violations {len(report.violations)}")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
