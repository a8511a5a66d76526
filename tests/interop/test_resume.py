"""Transfers that are cut, and carry on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import grpc
from blake3 import blake3
from peer import (
    CELL,
    Push,
    ServerTest,
    Tensor,
    announcement,
    chunk,
    open_frame,
    pb,
    random_tensor,
)

FREE_S = 5
"""A cancelled session gives its name back within this time."""
INTERRUPTED = ("CANCELLED", "INTERRUPTED")


def source(state: int) -> pb.SenderFrame:
    """The file that all entries come from, in one of its states."""
    return pb.SenderFrame(sources=[pb.Source(index=0, key=b"k" * 16, fingerprint=bytes([state] * 32), settled=True)])


class Cuts(ServerTest):
    def tensors(self) -> list[Tensor]:
        return [random_tensor("big", 7 * CELL + 1, 1), random_tensor("small", 100, 2)]

    def half_sent(self, name: str, push: Push | None = None, **more) -> Push:
        """A session with cells 1, 3 and 5 of the first entry acked."""
        tensors = self.tensors()
        push = (push or self.push()).opened(name, tensors, **more)
        for cell in (1, 3, 5):
            push.send(chunk(0, cell, tensors[0].cell(cell)))
        return push.settled()

    def resumed(self, name: str) -> Push:
        """The next session of the same transfer, on a connection of its own."""
        return self.push(self.connect()).opened(name, self.tensors())

    def carries_on(self, name: str) -> None:
        """What was acked is not wanted again, and the rest makes the checkpoint."""
        push = self.resumed(name)
        self.assertEqual(dict(push.wanted), {0: {0, 2, 4, 6, 7}, 1: {0}})
        self.assertFalse(any(push.held.values()))
        self.assertEqual((push.accept.epoch, push.accept.durable_bytes), (2, 3 * CELL))
        push.sent_wanted(self.tensors()).finished(self.tensors())
        self.assert_landed(name, self.tensors())

    def within(self, condition: Callable[[], bool]) -> None:
        """Asks until the condition holds, for as long as a name may take to become free."""
        end = time.monotonic() + FREE_S
        while not condition():
            self.assertLess(time.monotonic(), end, "not in time")

    def test_a_cancelled_call_resumes_where_it_was(self) -> None:
        push = self.half_sent("cancelled")
        push.call.cancel()
        self.assertEqual(push.ending()[0], "CANCELLED")
        self.carries_on("cancelled")

    def test_a_closed_channel_resumes_where_it_was(self) -> None:
        channel = self.connect()
        self.half_sent("closed", self.push(channel))
        channel.close()
        self.carries_on("closed")

    def test_an_early_end_of_the_stream_commits_and_says_so(self) -> None:
        push = self.half_sent("half-closed")
        push.close()
        self.assertEqual(push.ending(), INTERRUPTED)
        self.assertEqual(push.durable, {0: {1, 3, 5}})
        self.carries_on("half-closed")

    def test_an_abort_commits_and_ends_with_its_reason(self) -> None:
        reasons = {
            "INTERRUPTED": "CANCELLED",
            "SOURCE_CHANGED": "ABORTED",
            "SOURCE_IO_ERROR": "INTERNAL",
            "SOMETHING_NEW": "CANCELLED",
        }
        for number, (reason, code) in enumerate(reasons.items()):
            with self.subTest(reason):
                push = self.half_sent(f"aborted-{number}")
                push.send(pb.SenderFrame(abort=pb.Abort(reason=reason, message="because")))
                known = reason if reason != "SOMETHING_NEW" else "INTERRUPTED"
                self.assertEqual(push.ending(), (code, known))
                self.assertEqual(push.durable, {0: {1, 3, 5}})
        self.carries_on("aborted-0")

    def test_an_expired_deadline_loses_nothing_that_was_acked(self) -> None:
        push = self.push(timeout=2)
        with contextlib.suppress(grpc.RpcError):  # on a slow machine it expires earlier
            self.half_sent("deadline", push)
        self.assertEqual(push.ending()[0], "DEADLINE_EXCEEDED")
        again = self.resumed("deadline")
        self.assertFalse(again.wanted[0].intersection((1, 3, 5)[: push.acked]))
        again.sent_wanted(self.tensors()).finished(self.tensors())
        self.assert_landed("deadline", self.tensors())

    def test_a_deadline_in_the_past_leaves_nothing_behind(self) -> None:
        push = self.push(timeout=-1)
        push.send(open_frame("expired", tensors=[]))
        self.assertEqual(push.ending()[0], "DEADLINE_EXCEEDED")
        with self.assertRaises(grpc.RpcError) as caught:
            self.status("expired")
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_a_newer_session_takes_over_from_a_running_one(self) -> None:
        old = self.half_sent("taken-over")
        self.carries_on("taken-over")
        self.assertEqual(old.ending(), ("ABORTED", "SUPERSEDED"))

    def test_a_running_session_locks_another_transfer_out(self) -> None:
        self.half_sent("locked")
        other = self.push()
        other.send(open_frame("locked", 2, self.tensors(), restart=True))
        self.assertEqual(other.ending(), ("FAILED_PRECONDITION", "LOCKED"))

    def test_a_cancelled_session_frees_its_name_and_keeps_its_staging(self) -> None:
        self.half_sent("freed").call.cancel()
        self.within(lambda: not self.status("freed").transfer.active)
        self.assertEqual(self.status("freed").transfer.durable_bytes, 3 * CELL)
        foreign = self.push()
        foreign.send(open_frame("freed", 2, [random_tensor("other", 1, 3)]))
        self.assertEqual(foreign.ending(), ("FAILED_PRECONDITION", "LOCKED"), "unfinished work of another owner")
        self.assertEqual(self.status("freed").transfer.durable_bytes, 3 * CELL)
        other = [random_tensor("other", CELL, 3)]
        push = self.push().opened("freed", other, transfer=2, restart=True).sent_wanted(other)
        push.finished(other)
        self.assert_landed("freed", other)

    def test_a_cut_inside_the_stream_of_chunks_loses_nothing_that_was_acked(self) -> None:
        tensors = [random_tensor("big", 60 * CELL, 1)]
        push = self.push(self.connect()).opened("mid-stream", tensors)
        for cell in range(60):
            push.send(chunk(0, cell, tensors[0].cell(cell)))
        push.until(lambda s: s.acked > 8)
        acked = push.acked
        push.call.cancel()
        again = self.push(self.connect()).opened("mid-stream", tensors)
        self.assertFalse(again.wanted[0] & set(range(acked)), "acked in order, so the first cells are there")
        again.sent_wanted(tensors).finished(tensors)
        self.assert_landed("mid-stream", tensors)

    def usable_after(self, name: str, break_off: Callable[[Push], None], *before: pb.SenderFrame) -> None:
        """Breaks calls that together sent more than the window of the connection, 32 MiB; then one goes well."""
        tensors = [random_tensor("w", 8 * CELL, 1)]
        for _ in range(24):
            push = self.push().opened(name, tensors)
            for frame in (*before, *(chunk(0, cell, tensors[0].cell(cell)) for cell in range(8))):
                push.send(frame)
            break_off(push)
        self.push().opened(name, tensors).sent_wanted(tensors).finished(tensors)
        self.assert_landed(name, tensors)

    def test_a_connection_stays_usable_after_many_refused_calls(self) -> None:
        def break_off(push: Push) -> None:
            self.assertEqual(push.ending(), ("INVALID_ARGUMENT", "BAD_FRAME"))

        # An entry with a gap in the numbers: what follows it is never read.
        self.usable_after("refused", break_off, announcement([random_tensor("x", 1, 1)], start=7))

    def test_a_connection_stays_usable_after_many_cancelled_calls(self) -> None:
        def break_off(push: Push) -> None:
            push.call.cancel()
            self.assertEqual(push.ending()[0], "CANCELLED")

        self.usable_after("cancelled-often", break_off)

    def test_what_one_open_manifest_left_the_next_session_carries_on(self) -> None:
        tensors = self.tensors()
        push = self.push()
        push.send(open_frame("open-cut"))
        push.announced(tensors[:1])
        push.send(chunk(0, 2, tensors[0].cell(2)))
        push.settled().call.cancel()
        again = self.push(self.connect())
        again.send(open_frame("open-cut"))
        swapped = [tensors[1], tensors[0]]  # numbers live for one session, names for the transfer
        again.announced(swapped)
        self.assertEqual(again.wanted[1], {0, 1, 3, 4, 5, 6, 7})
        again.sent_wanted(swapped).finished(swapped)
        self.assert_landed("open-cut", tensors)


class Compares(ServerTest):
    def tensors(self, changed_cell: int | None = None) -> list[Tensor]:
        raw = bytearray(random_tensor("w", 4 * CELL, 5).raw)
        if changed_cell is not None:
            raw[changed_cell * CELL] ^= 0xFF
        return [Tensor("w", bytes(raw), "uint8", (len(raw),), sources=(0,))]

    def session(self, name: str, tensors: list[Tensor], state: int, transfer: int = 1) -> Push:
        push = self.push()
        push.send(open_frame(name, transfer, tensors))
        push.send(source(state))
        push.send(announcement(tensors))
        return push.until(lambda s: s.answered)

    def interrupted(self, name: str) -> None:
        """Leaves cells 0 to 2 of the source's first state."""
        tensors = self.tensors()
        push = self.session(name, tensors, 1)
        for cell in range(3):
            push.send(chunk(0, cell, tensors[0].cell(cell)))
        push.settled().close()
        self.assertEqual(push.ending(), INTERRUPTED)

    def compare(self, push: Push, tensors: list[Tensor], first: int, count: int) -> None:
        digests = b"".join(blake3(tensors[0].cell(first + i)).digest() for i in range(count))
        push.send(pb.SenderFrame(compare=pb.Compare(entry=0, first_cell=first, blake3=digests)))

    def test_an_unchanged_source_is_trusted(self) -> None:
        self.interrupted("same")
        push = self.session("same", self.tensors(), 1)
        self.assertEqual((push.wanted[0], push.held[0]), ({3}, set()))

    def test_a_changed_source_keeps_what_is_equal_and_sends_the_rest(self) -> None:
        self.interrupted("changed")
        tensors = self.tensors(changed_cell=1)
        push = self.session("changed", tensors, 2)
        self.assertEqual((push.wanted[0], push.held[0]), ({3}, {0, 1, 2}))
        self.compare(push, tensors, 0, 3)
        push.until(lambda s: s.kept[0] == {0, 2} and s.wanted[0] == {1, 3})
        push.sent_wanted(tensors).finished(tensors)
        self.assertEqual(push.durable[0], {0, 1, 2, 3})
        self.assert_landed("changed", tensors)

    def test_held_cells_may_be_sent_instead_of_compared(self) -> None:
        self.interrupted("sent")
        tensors = self.tensors(changed_cell=0)
        push = self.session("sent", tensors, 2)
        for cell in sorted(push.held[0] | push.wanted[0]):
            push.send(chunk(0, cell, tensors[0].cell(cell)))
        push.settled().finished(tensors)
        self.assert_landed("sent", tensors)

    def test_finish_with_cells_still_held_is_refused(self) -> None:
        self.interrupted("unanswered")
        tensors = self.tensors()
        push = self.session("unanswered", tensors, 2).sent_wanted(tensors)
        with self.assertRaises(grpc.RpcError):
            push.finished(tensors)
        self.assertEqual(push.ending(), ("FAILED_PRECONDITION", "MANIFEST_MISMATCH"))

    def test_another_transfer_of_the_same_entries_takes_over_in_compare_mode(self) -> None:
        self.interrupted("adopted")
        tensors = self.tensors()
        push = self.session("adopted", tensors, 1, transfer=2)
        self.assertEqual((push.wanted[0], push.held[0]), ({3}, {0, 1, 2}))
        self.compare(push, tensors, 0, 2)
        self.compare(push, tensors, 2, 1)
        push.until(lambda s: s.kept[0] == {0, 1, 2})
        push.sent_wanted(tensors).finished(tensors)
        self.assert_landed("adopted", tensors)
