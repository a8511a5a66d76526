"""What a server of today refuses, and forms of a frame that it does not."""

from __future__ import annotations

import grpc
import numpy as np
from peer import (
    CELL,
    Push,
    ServerTest,
    Tensor,
    announcement,
    chunk,
    finish_frame,
    head,
    open_frame,
    pb,
    promise,
    random_tensor,
)

OK = ("OK", None)
BAD_FRAME = ("INVALID_ARGUMENT", "BAD_FRAME")
BAD_NAME = ("INVALID_ARGUMENT", "BAD_NAME")
BAD_SHAPE = ("INVALID_ARGUMENT", "BAD_SHAPE")
BAD_COMPRESSION = ("INVALID_ARGUMENT", "BAD_COMPRESSION")
BAD_RANGE = ("OUT_OF_RANGE", "BAD_RANGE")
MISMATCH = ("FAILED_PRECONDITION", "MANIFEST_MISMATCH")
TOO_LARGE = ("RESOURCE_EXHAUSTED", "TOO_LARGE")
TOO_MANY = ("RESOURCE_EXHAUSTED", "TOO_MANY")
UNSUPPORTED = ("UNIMPLEMENTED", "UNSUPPORTED")
ODD_FIELDS = (6, 7, 11, 12, 13, 14, 16, 100, 536_870_911)
"""Field numbers that SenderFrame does not have."""


def varint(n: int) -> bytes:
    out = b""
    while n > 0x7F:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def unknown(field: int) -> bytes:
    """The field in each of the four wire types that proto3 has."""
    tags = [varint(field << 3 | wire_type) for wire_type in (0, 1, 2, 5)]
    values = [varint(1 << 63), b"8 bytes.", varint(6) + b"\x7f\x00\x08\x01\xff\xff", b"four"]
    return b"".join(tag + value for tag, value in zip(tags, values, strict=True))


UNKNOWN = b"".join(unknown(field) for field in ODD_FIELDS)


class Frames(ServerTest):
    """Order and content of the fields of a frame."""

    tensors = [random_tensor("w", CELL + 10, 1)]

    def head_and_payload(self, cell: int) -> tuple[bytes, bytes]:
        """The two halves of a chunk's frame, each a message by itself."""
        frame = chunk(0, cell, self.tensors[0].cell(cell))
        payload = pb.SenderFrame(payload=frame.payload).SerializeToString()
        frame.ClearField("payload")
        return frame.SerializeToString(), payload

    def ready(self, name: str) -> Push:
        return self.push().opened(name, self.tensors)

    def test_a_head_after_its_payload_is_understood(self) -> None:
        push = self.ready("late-head")
        for cell in (0, 1):
            before, payload = self.head_and_payload(cell)
            push.send(payload + before, chunk_count=1)
        push.settled().finished(self.tensors)
        self.assertEqual(push.rejects, [])
        self.assert_landed("late-head", self.tensors)

    def test_a_head_on_both_sides_of_the_payload_is_a_bad_frame(self) -> None:
        first, payload = self.head_and_payload(0)
        second, _ = self.head_and_payload(1)
        push = self.ready("both-sides")
        push.send(first + payload + second, chunk_count=2)
        self.assertEqual(push.ending(), BAD_FRAME)

    def test_a_second_payload_is_a_bad_frame(self) -> None:
        before, payload = self.head_and_payload(1)
        push = self.ready("two-payloads")
        push.send(before + payload + payload, chunk_count=1)
        self.assertEqual(push.ending(), BAD_FRAME)

    def test_unknown_fields_are_skipped_wherever_they_stand(self) -> None:
        push = self.push()
        push.send(UNKNOWN + open_frame("unknown", tensors=self.tensors).SerializeToString() + UNKNOWN)
        push.send(UNKNOWN + announcement(self.tensors).SerializeToString() + UNKNOWN)
        push.until(lambda s: s.answered)
        before, payload = self.head_and_payload(0)
        push.send(UNKNOWN + before + UNKNOWN + payload + UNKNOWN, chunk_count=1)
        before, payload = self.head_and_payload(1)
        push.send(UNKNOWN + payload + UNKNOWN + before + UNKNOWN, chunk_count=1)
        push.send(UNKNOWN, chunk_count=0)  # a frame of the future
        push.settled()
        push.send(UNKNOWN + finish_frame(self.tensors).SerializeToString())
        self.assertEqual(push.ending(), OK)
        self.assert_landed("unknown", self.tensors)

    def test_unknown_fields_inside_messages_are_skipped(self) -> None:
        def widened(message, wire_field: int) -> bytes:
            inner = message.SerializeToString() + unknown(500)
            return varint(wire_field << 3 | 2) + varint(len(inner)) + inner

        tensor = self.tensors[0]
        push = self.push()
        push.send(widened(open_frame("inside", tensors=self.tensors).open, 1))
        push.send(widened(tensor.entry(0), 9))
        push.until(lambda s: s.answered)
        for cell in (0, 1):
            raw = tensor.cell(cell)
            payload = pb.SenderFrame(payload=raw).SerializeToString()
            push.send(widened(head(0, cell, raw), 10) + payload, chunk_count=1)
        push.settled()
        push.send(widened(pb.Finish(**promise(self.tensors)), 4))
        self.assertEqual(push.ending(), OK)

    def test_an_empty_frame_is_no_error(self) -> None:
        push = self.ready("empty-frame")
        push.send(b"")
        push.sent_wanted(self.tensors).finished(self.tensors)

    def test_a_payload_that_does_not_fit_its_heads_is_a_bad_frame(self) -> None:
        for number, payload in enumerate((b"", self.tensors[0].cell(1)[:-1], self.tensors[0].cell(1) + b"x")):
            push = self.ready(f"misfit-{number}")
            frame = chunk(0, 1, self.tensors[0].cell(1))
            frame.payload = payload
            push.send(frame)
            self.assertEqual(push.ending(), BAD_FRAME, len(payload))

    def test_what_is_no_protobuf_is_a_bad_frame(self) -> None:
        for number, junk in enumerate((b"\xff" * 20, b"\x0b\x0c", b"\x52\x7f", b"\x78\x01", b"\x4a\x02\x0a\x05")):
            push = self.ready(f"junk-{number}")
            push.send(junk)
            self.assertEqual(push.ending(), BAD_FRAME, junk)


class Limits(ServerTest):
    def test_a_message_over_the_limit_is_too_large(self) -> None:
        tensors = [random_tensor("w", 4 * CELL, 1)]
        push = self.push().opened("oversize", tensors)
        push.send(pb.SenderFrame(chunks=[head(0, 0, tensors[0].cell(0))], payload=bytes(CELL + (64 << 10))))
        self.assertEqual(push.ending(), TOO_LARGE)

    def test_a_huge_message_is_refused_while_it_still_comes(self) -> None:
        push = self.push().opened("huge", [random_tensor("w", 1, 1)])
        push.send(bytes(100 << 20))
        self.assertEqual(push.ending(), TOO_LARGE)

    def test_a_first_message_over_its_limit_is_too_large(self) -> None:
        push = self.push()
        frame = open_frame("first").SerializeToString()
        push.send(frame + varint(100 << 3 | 2) + varint(1 << 21) + bytes(1 << 21))
        self.assertEqual(push.ending(), TOO_LARGE)

    def test_too_many_fields_are_too_large(self) -> None:
        push = self.push().opened("fields", [random_tensor("w", 1, 1)])
        push.send(b"\x4a\x00" * 16_385)
        self.assertEqual(push.ending(), TOO_LARGE)

    def test_metadata_over_its_limit_is_too_large(self) -> None:
        push = self.push()
        push.send(open_frame("metadata", metadata={"a": "x" * (1 << 20)}))
        self.assertEqual(push.ending(), TOO_LARGE)

    def test_a_reason_arrives_whole_however_long_the_name_that_it_is_about(self) -> None:
        for number, letter in enumerate(("ä", "\U0001f600", "\n", '"', "%")):
            name = letter * (4096 // len(letter.encode()))
            push = self.push()
            push.send(open_frame(f"long-{number}"))
            twice = [random_tensor(name, 1, 1)] * 2
            push.send(announcement(twice))
            self.assertEqual(push.ending(), ("INVALID_ARGUMENT", "DUPLICATE_TENSOR"), letter)
            self.assertIn(letter if letter not in '\n"' else "\\", push.call.details())


class Compression(ServerTest):
    def test_gzip_is_unsupported_and_the_channel_stays_usable(self) -> None:
        push = self.push(compression=grpc.Compression.Gzip)
        push.send(open_frame("gzip", metadata={"much": "a" * 10_000}))
        self.assertEqual(push.ending(), UNSUPPORTED)
        plain = self.push()
        plain.send(open_frame("gzip", tensors=[]))
        plain.until(lambda s: s.accept).finished([])


class Opening(ServerTest):
    def refused(self, *frames: pb.SenderFrame | bytes) -> tuple[str, str | None]:
        push = self.push()
        for frame in frames:
            push.send(frame)
        return push.ending()

    def test_a_stream_without_a_frame_is_a_bad_frame(self) -> None:
        push = self.push()
        push.close()
        self.assertEqual(push.ending(), BAD_FRAME)

    def test_the_first_frame_is_open(self) -> None:
        tensors = [random_tensor("w", 10, 1)]
        both = open_frame("first", tensors=tensors)
        both.entries.append(tensors[0].entry(0))
        compare = pb.SenderFrame(compare=pb.Compare(blake3=bytes(32)))
        abort = pb.SenderFrame(abort=pb.Abort(reason="INTERRUPTED"))
        firsts = [b"", announcement(tensors), chunk(0, 0, b"abc"), compare, finish_frame(tensors), abort, both]
        for first in firsts:
            self.assertEqual(self.refused(first), BAD_FRAME, first)

    def test_open_comes_once(self) -> None:
        self.assertEqual(self.refused(open_frame("twice"), open_frame("twice")), BAD_FRAME)

    def test_bad_fields_of_open_have_their_reasons(self) -> None:
        cases = [
            ({"protocol_version": 0}, ("FAILED_PRECONDITION", "VERSION")),
            ({"protocol_version": 2}, ("FAILED_PRECONDITION", "VERSION")),
            ({"checkpoint": ""}, BAD_NAME),
            ({"checkpoint": "../up"}, BAD_NAME),
            ({"checkpoint": ".hidden"}, BAD_NAME),
            ({"checkpoint": "a/" * 16 + "a"}, BAD_NAME),
            ({"transfer_id": b"short"}, BAD_FRAME),
            ({"transfer_id": bytes(17)}, BAD_FRAME),
            ({"fingerprint": b"1"}, BAD_FRAME),
            ({"manifest_complete": True, "entries_digest": b""}, BAD_FRAME),
            ({"codecs": 0}, BAD_COMPRESSION),
            ({"codecs": 2}, BAD_COMPRESSION),
            ({"chunk_len": 1000}, BAD_RANGE),
            ({"chunk_len": 1 << 17}, BAD_RANGE),
            ({"chunk_len": 1 << 24}, BAD_RANGE),
            ({"out_format": pb.OUT_FORMAT_SAFETENSORS}, UNSUPPORTED),
            ({"out_format": 99}, UNSUPPORTED),
            ({"layout": 99}, UNSUPPORTED),
            ({"commit_mode": 99}, UNSUPPORTED),
        ]
        for fields, expected in cases:
            with self.subTest(**fields):
                self.assertEqual(self.refused(open_frame(**{"checkpoint": "bad-open"} | fields)), expected)
        with self.assertRaises(grpc.RpcError) as caught:
            self.status("bad-open")
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND, "nothing is left on the disk")

    def test_a_published_name_exists_unless_it_is_overwritten(self) -> None:
        old, new = [random_tensor("old", 5, 1)], [random_tensor("new", 6, 2)]
        self.push().opened("exists", old).sent_wanted(old).finished(old)
        exists = ("ALREADY_EXISTS", "EXISTS")
        self.assertEqual(self.refused(open_frame("exists", 2, new)), exists)
        self.assertEqual(self.refused(open_frame("exists/inside", 2, new)), exists)
        self.push().opened("exists", new, transfer=2, overwrite=True).sent_wanted(new).finished(new)
        self.assert_landed("exists", new)


class Announcing(ServerTest):
    def ending(self, *entries: pb.Entry) -> tuple[str, str | None]:
        push = self.push()
        push.send(open_frame("announcing", restart=True))
        push.send(pb.SenderFrame(entries=entries))
        return push.ending()

    def test_a_bad_entry_has_its_reason(self) -> None:
        good = Tensor.of("w", np.zeros((2, 3), "<f4")).entry(0)
        tensor = {"dtype": "float32", "shape": [2, 3], "byte_len": 24}
        cases = [
            ({"byte_len": 23}, BAD_SHAPE),
            ({"shape": [2, 4]}, BAD_SHAPE),
            ({"shape": [1 << 40, 1 << 40]}, BAD_SHAPE),
            ({"shape": [1] * 33}, BAD_SHAPE),
            ({"dtype": ""}, BAD_SHAPE),
            ({"dtype": "float31"}, BAD_SHAPE),
            ({"dtype": "bfloat16", "byte_len": 12, "big_endian": True}, BAD_SHAPE),
            ({"name": ""}, BAD_NAME),
            ({"name": "a\0b"}, BAD_NAME),
            ({"name": "x" * 4097}, BAD_NAME),
            ({"aliases": ["a"] * 65}, TOO_MANY),
            ({"kind": 0}, BAD_FRAME),
            ({"kind": 99}, BAD_FRAME),
            ({"order": 99}, UNSUPPORTED),
            ({"index": 1}, BAD_FRAME),
            ({"sources": [0]}, BAD_FRAME),
            ({"kind": pb.ENTRY_KIND_BLOB}, BAD_SHAPE),
            ({"kind": pb.ENTRY_KIND_BLOB, "name": "../x", "dtype": "", "shape": []}, BAD_NAME),
        ]
        for fields, expected in cases:
            with self.subTest(**fields):
                entry = pb.Entry(**{"name": good.name, "kind": good.kind, **tensor} | fields)
                self.assertEqual(self.ending(entry), expected)

    def test_the_same_name_twice_is_a_duplicate(self) -> None:
        entries = [Tensor.of("w", np.zeros(2)).entry(i) for i in (0, 1)]
        self.assertEqual(self.ending(*entries), ("INVALID_ARGUMENT", "DUPLICATE_TENSOR"))

    def test_a_lane_of_no_session_is_not_found(self) -> None:
        push = self.push()
        push.send(pb.SenderFrame(join=pb.Join(session_token=bytes(16), lane=1)))
        self.assertEqual(push.ending(), ("NOT_FOUND", "NOT_FOUND"))


class Chunks(ServerTest):
    tensors = [random_tensor("w", CELL + 10, 1)]

    def ending(self, frame: pb.SenderFrame, **more) -> tuple[str, str | None]:
        push = self.push().opened("chunks", self.tensors, restart=True, **more)
        push.send(frame)
        return push.ending()

    def test_a_chunk_off_the_grid_is_out_of_range(self) -> None:
        good = {"entry": 0, "offset": 0, "raw_len": CELL, "encoded_len": CELL}
        tail = {"offset": CELL, "raw_len": 10, "encoded_len": 10}
        for fields in ({"offset": 1}, {"offset": 2 * CELL}, tail | {"raw_len": 9, "encoded_len": 9}, {"offset": CELL}):
            chunk_head = pb.ChunkHead(**good | fields)
            frame = pb.SenderFrame(chunks=[chunk_head], payload=bytes(chunk_head.encoded_len))
            self.assertEqual(self.ending(frame), BAD_RANGE, fields)

    def test_a_chunk_before_its_wanted_is_a_bad_frame(self) -> None:
        push = self.push()
        push.send(open_frame("too-early", tensors=self.tensors))
        push.until(lambda s: s.accept)
        frame = chunk(0, 0, self.tensors[0].cell(0))
        frame.entries.append(self.tensors[0].entry(0))
        push.send(frame)
        self.assertEqual(push.ending(), BAD_FRAME)

    def test_a_codec_that_was_not_agreed_on_is_bad_compression(self) -> None:
        frame = pb.SenderFrame(chunks=[head(0, 1, bytes(10), 0, codec=1)])
        self.assertEqual(self.ending(frame, codecs=1), BAD_COMPRESSION)

    def test_codecs_that_lie_are_bad_compression(self) -> None:
        raw = self.tensors[0].cell(1)
        frames = [
            chunk(0, 1, raw, b"not lz4", codec=3),
            chunk(0, 1, raw, b"", codec=3),
            chunk(0, 1, raw, b"\0", codec=1),
            chunk(0, 1, raw, b"abc", codec=4),
            chunk(0, 1, raw, raw, codec=2),
            chunk(0, 1, raw, raw, codec=77),
        ]
        for frame in frames:
            self.assertEqual(self.ending(frame, codecs=0xFFFFFFFF), BAD_COMPRESSION, frame.chunks[0])

    def test_damage_again_and_again_is_data_loss(self) -> None:
        push = self.push().opened("damage", self.tensors)
        frame = chunk(0, 1, bytes(10))
        frame.chunks[0].crc32c ^= 1
        for _ in range(17):
            push.send(frame)
        self.assertEqual(push.ending(), ("DATA_LOSS", "CHECKSUM"))


class Finishing(ServerTest):
    tensors = [random_tensor("w", 10, 1)]

    def test_finish_must_repeat_what_was_announced(self) -> None:
        good = promise(self.tensors)
        for fields in ({"entry_count": 2}, {"total_bytes": 11}, {"entries_digest": bytes(16)}):
            push = self.push().opened("finish", self.tensors, restart=True).sent_wanted(self.tensors)
            push.send(pb.SenderFrame(finish=pb.Finish(**good | fields)))
            self.assertEqual(push.ending(), MISMATCH, fields)

    def test_finish_with_cells_missing_is_refused_and_publishes_nothing(self) -> None:
        push = self.push().opened("missing", self.tensors)
        push.send(finish_frame(self.tensors))
        self.assertEqual(push.ending(), MISMATCH)
        self.assertFalse(self.status("missing").published)

    def test_open_keeps_its_promise(self) -> None:
        push = self.push()
        push.send(open_frame("promise", tensors=[*self.tensors, random_tensor("more", 1, 2)]))
        push.announced(self.tensors).sent_wanted(self.tensors)
        push.send(finish_frame(self.tensors))
        self.assertEqual(push.ending(), MISMATCH)
