"""What the wire says about one transfer, and whether resume kept its word.

The promise under test: a cell that the receiver called durable never travels
again, whoever dies in between, and nothing is published that was not durable.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

from h2sniff import Buffer, fields

MAX_NOTES = 50  # Violations kept in words; all are counted.


class RangeSet:
    """Disjoint byte ranges [start, end)."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Adds a range; neighbours melt."""
        if start >= end:
            return
        lo, hi = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if lo < hi:
            start, end = min(start, self._starts[lo]), max(end, self._ends[hi - 1])
        self._starts[lo:hi], self._ends[lo:hi] = [start], [end]

    def remove(self, start: int, end: int) -> None:
        """Takes a range out."""
        kept = [
            part
            for a, b in self
            for part in ((a, min(b, start)), (max(a, end), b))
            if part[0] < part[1]
        ]
        self._starts, self._ends = [a for a, _ in kept], [b for _, b in kept]

    def overlap(self, start: int, end: int) -> int:
        """How many bytes of the range are in the set."""
        at, total = bisect_right(self._ends, start), 0
        while at < len(self._starts) and self._starts[at] < end:
            total += min(end, self._ends[at]) - max(start, self._starts[at])
            at += 1
        return total

    def total(self) -> int:
        """Bytes in the set."""
        return sum(self._ends) - sum(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))


@dataclass
class Chunk:
    """Head of a chunk that passed."""

    entry: str
    offset: int
    raw_len: int
    encoded_len: int
    codec: int
    time: float


@dataclass
class Session:
    """One Push call with its lanes."""

    number: int
    checkpoint: str
    transfer_id: str
    restart: bool
    started: float
    accept: dict[str, int] | None = None
    entries: dict[int, tuple[str, int]] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)
    durable: list[tuple[str, tuple[int, int], float]] = field(default_factory=list)
    durable_here: dict[str, RangeSet] = field(default_factory=dict)
    claimed: dict[str, RangeSet] = field(default_factory=dict)  # durable when it began
    kept: list[tuple[str, tuple[int, int]]] = field(default_factory=list)
    rejects: list[tuple[str, int]] = field(default_factory=list)
    lanes: int = 1
    finish: bool = False
    done: dict[str, int] | None = None
    aborted: str | None = None
    ended: float | None = None
    answered: set[int] = field(default_factory=set)  # entries with a whole first Wanted

    @property
    def chunk_len(self) -> int:
        """Length of a cell; the relay has always seen Accept before it matters."""
        return self.accept["chunk_len"] if self.accept else 1


class Judge:
    """Follows all sessions of one transfer.

    `demotions_expected` holds names of entries whose durable cells may be asked
    for again (the test changed their source). A Durable frame counts once the
    relay has read it, also when the connection dies before it is passed on: the
    receiver has given its word either way. Inside one session a second copy
    of a cell may cross its Durable on the way (a lane died); a test that kills
    single lanes sets `crossing_s` to the time for which that is forgiven.
    """

    def __init__(self, demotions_expected: Container[str] = (), crossing_s: float = 0.0) -> None:
        self.demotions_expected = demotions_expected
        self.crossing_s = crossing_s
        self.sessions: list[Session] = []
        self.durable: dict[str, RangeSet] = {}
        self.sent: dict[str, RangeSet] = {}
        self.violations: dict[str, int] = {}
        self.notes: list[str] = []
        self.bytes_sent = self.bytes_encoded = self.bytes_resent = 0
        self.bytes_claimed_unsent = 0

    def violation(self, kind: str, note: str) -> None:
        """Counts a broken promise."""
        self.violations[kind] = self.violations.get(kind, 0) + 1
        if len(self.notes) < MAX_NOTES:
            self.notes.append(f"{kind}: {note}")

    # ------------------------------------------------------------- the sender

    def opened(self, session: Session) -> None:
        """A new session; after a publication or --restart a new round begins."""
        last = next((s.done for s in reversed(self.sessions) if s.done), None)
        published = bool(self.sessions and self.sessions[-1].done)
        if session.restart or (published and last and not last["unchanged"]):
            self.durable, self.sent = {}, {}
        self.sessions.append(session)

    def sender_frame(self, session: Session, frame: dict[int, list]) -> None:
        """Announcements, chunks and the end of the sender's part."""
        for raw in frame.get(9, ()):
            entry = fields(raw)
            name = entry[2][0].decode("utf-8", "replace")
            session.entries[_one(entry, 1)] = (name, _one(entry, 8))
        for raw in frame.get(10, ()):
            self._chunk(session, fields(raw))
        if 4 in frame:
            session.finish = True
        if 5 in frame:
            session.aborted = _text(fields(frame[5][0]), 1)

    def _chunk(self, session: Session, head: dict[int, list]) -> None:
        index, offset, length = _one(head, 1), _one(head, 2), _one(head, 3)
        if index not in session.entries:
            self.violation("unknown-entry", f"session {session.number}: chunk of entry {index}")
            return
        name, now = session.entries[index][0], time.monotonic()
        session.chunks.append(Chunk(name, offset, length, _one(head, 4), _one(head, 5), now))
        where = f"session {session.number}: {name!r} at {offset}, {length} bytes"
        if index not in session.answered:
            self.violation("chunk-before-wanted", where)
        if offset % session.chunk_len:
            self.violation("chunk-off-grid", where)
        end = offset + length
        here = session.durable_here.get(name, RangeSet())
        if self.durable.get(name, RangeSet()).overlap(offset, end):
            if not here.overlap(offset, end):
                self.violation("durable-sent-again", where)
            elif not self._crossing(session, name, offset, now):
                self.violation("durable-sent-again-same-session", where)
        sent = self.sent.setdefault(name, RangeSet())
        self.bytes_resent += sent.overlap(offset, end)
        self.bytes_sent += length
        self.bytes_encoded += _one(head, 4)
        sent.add(offset, end)

    def _crossing(self, session: Session, name: str, offset: int, now: float) -> bool:
        return any(
            n == name and a <= offset < b and now - t <= self.crossing_s
            for n, (a, b), t in reversed(session.durable)
        ) if self.crossing_s else False

    # ----------------------------------------------------------- the receiver

    def receiver_frame(self, session: Session, frame: dict[int, list]) -> None:
        """Accept, Wanted, Reject, Durable, Keep, and at last Done."""
        if 3 in frame and session.accept is None:
            accept = fields(frame[3][0])
            session.accept = {
                "chunk_len": _one(accept, 2) or 1,
                "epoch": _one(accept, 7),
                "durable_bytes": _one(accept, 9),
                "durability": _one(accept, 4),
            }
        for raw in frame.get(8, ()):
            self._wanted(session, fields(raw))
        for raw in frame.get(9, ()):
            reject = fields(raw)
            session.rejects.append((self._entry(session, reject)[0], _one(reject, 2)))
        for raw in frame.get(11, ()):
            for name, start, end in self._ranges(session, fields(raw), 2):
                self.durable.setdefault(name, RangeSet()).add(start, end)
                session.durable_here.setdefault(name, RangeSet()).add(start, end)
                session.durable.append((name, (start, end), time.monotonic()))
        for raw in frame.get(12, ()):
            for name, start, end in self._ranges(session, fields(raw), 2):
                self.durable.setdefault(name, RangeSet()).add(start, end)
                session.kept.append((name, (start, end)))
        if 4 in frame:
            self._done(session, fields(frame[4][0]))

    def _wanted(self, session: Session, wanted: dict[int, list]) -> None:
        name, length = self._entry(session, wanted)
        index, durable = _one(wanted, 1), self.durable.setdefault(name, RangeSet())
        first = index not in session.answered
        claimed = session.claimed.get(name)
        if first and claimed is None:
            claimed = session.claimed[name] = RangeSet()
            claimed.add(0, length)
        for number in (2, 3):
            for _, start, end in self._ranges(session, wanted, number):
                if first and claimed:
                    claimed.remove(start, end)
                again = durable.overlap(start, end)
                if again and name in self.demotions_expected:
                    durable.remove(start, end)
                elif again and number == 2:
                    note = f"session {session.number}: {name!r} {start}..{end}, {again} bytes"
                    self.violation("durable-wanted-again", note)
        if first and _one(wanted, 4):
            session.answered.add(index)
            sent = self.sent.get(name, RangeSet())
            for start, end in claimed or ():
                self.bytes_claimed_unsent += end - start - sent.overlap(start, end)
                durable.add(start, end)

    def _done(self, session: Session, done: dict[int, list]) -> None:
        session.done = {
            "unchanged": _one(done, 1),
            "entry_count": _one(done, 2),
            "total_bytes": _one(done, 3),
        }
        if session.done["unchanged"]:
            return
        for name, length in session.entries.values():
            missing = length - self.durable.get(name, RangeSet()).overlap(0, length)
            if missing:
                note = f"session {session.number}: {missing} of {length} bytes of {name!r}"
                self.violation("done-without-durable", note)

    def _entry(self, session: Session, message: dict[int, list]) -> tuple[str, int]:
        index = _one(message, 1)
        if index not in session.entries:
            self.violation("unknown-entry", f"session {session.number}: answer about {index}")
        return session.entries.get(index, (f"?{index}", 0))

    def _ranges(
        self, session: Session, message: dict[int, list], number: int
    ) -> Iterator[tuple[str, int, int]]:
        """Cell ranges of a field as byte ranges of their entry."""
        name, length = self._entry(session, message)
        for raw in message.get(number, ()):
            cells = fields(raw)
            first, count = _one(cells, 1), _one(cells, 2)
            start = first * session.chunk_len
            yield name, start, min(start + count * session.chunk_len, length)

    # -------------------------------------------------------------- the verdict

    def durable_bytes(self) -> int:
        """Bytes that the receiver has called durable."""
        return sum(ranges.total() for ranges in self.durable.values())

    def report(self) -> dict[str, Any]:
        """Counts for people and for JSON."""
        cell = max((s.chunk_len for s in self.sessions), default=1)
        spans = [span for ranges in self.durable.values() for span in ranges]
        return {
            "sessions": len(self.sessions),
            "lanes": sum(s.lanes for s in self.sessions),
            "chunks": sum(len(s.chunks) for s in self.sessions),
            "bytes_sent": self.bytes_sent,
            "bytes_encoded": self.bytes_encoded,
            "bytes_resent": self.bytes_resent,
            "bytes_claimed_unsent": self.bytes_claimed_unsent,
            "durable_bytes": self.durable_bytes(),
            "durable_cells": sum(-(-b // cell) - a // cell for a, b in spans),
            "kept_ranges": sum(len(s.kept) for s in self.sessions),
            "rejects": sum(len(s.rejects) for s in self.sessions),
            "done": any(s.done for s in self.sessions),
            "violations": dict(self.violations),
            "notes": list(self.notes),
        }


def _one(message: dict[int, list], number: int) -> int:
    """Last value of a number field; 0 when it is absent, as proto3 has it."""
    return message[number][-1] if number in message else 0


def _text(message: dict[int, list], number: int) -> str:
    return message[number][-1].decode("utf-8", "replace") if number in message else ""


def open_session(raw: Buffer, number: int) -> Session | None:
    """The session that a SenderOpen begins; None for the first field of another call.

    PullOpen and the unary requests use the same field number. Only SenderOpen
    has a 16-byte id in field 3 and some field above 6.
    """
    try:
        found = fields(raw)
    except (IndexError, ValueError):
        return None
    identity = found.get(3, [b""])[-1]
    if not isinstance(identity, bytes) or len(identity) != 16 or max(found) <= 6:
        return None
    restart = bool(_one(found, 15))
    return Session(number, _text(found, 2), identity.hex(), restart, time.monotonic())
