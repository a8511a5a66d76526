"""Reads gRPC messages out of a raw HTTP/2 byte stream without keeping payloads.

A judge that sits inside either program can be fooled by the same bug as the
program. This one looks at the bytes on the wire. It needs no HPACK (it never
looks into headers) and no protobuf library (the few messages are walked by
hand), so a test that uses it installs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM = 0, 1, 3
END_STREAM, PADDED = 0x1, 0x8
PAYLOAD_FIELD = 15
MAX_HEAD = 1_200_000  # A frame without its payload is at most 1 MiB and some.

Buffer = bytes | bytearray | memoryview
Fields = dict[int, list]


class WireError(ValueError):
    """The bytes are not what HTTP/2, gRPC or protobuf would send."""


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def walk(data: Buffer) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value of each field: an int, or the bytes of a LEN field."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise WireError(f"wire type {wire} of field {field}")
        if at + length > len(data):
            raise WireError(f"field {field} ends behind its message")
        chunk = bytes(data[at : at + length])
        yield field, chunk if wire == 2 else int.from_bytes(chunk, "little")
        at += length


def fields(data: Buffer) -> Fields:
    """All values of each field number, in order."""
    found: Fields = {}
    for number, value in walk(data):
        found.setdefault(number, []).append(value)
    return found


class FrameReader:
    """Cuts one direction of a connection into HTTP/2 frames.

    `on_data(stream, view)` gets slices of the caller's own buffer, valid during
    the call only; `on_end(stream, reset)` follows END_STREAM and RST_STREAM.
    """

    def __init__(
        self,
        client: bool,
        on_data: Callable[[int, memoryview], None],
        on_end: Callable[[int, bool], None],
    ) -> None:
        self._on_data, self._on_end = on_data, on_end
        self._head = bytearray()
        self._need = len(PREFACE) if client else 9
        self._preface = client
        self._body = self._pad = 0  # bytes of the frame still to come
        self._kind = self._flags = self._stream = 0

    def feed(self, view: memoryview) -> None:
        """Takes the next bytes, cut anywhere."""
        at, end = 0, len(view)
        while at < end:
            if self._body:
                n = min(self._body, end - at)
                if self._kind == DATA:
                    self._on_data(self._stream, view[at : at + n])
                self._body -= n
            elif self._pad:
                n = min(self._pad, end - at)
                self._pad -= n
            else:
                n = min(self._need - len(self._head), end - at)
                self._head += view[at : at + n]
                if len(self._head) < self._need or not self._begin_frame():
                    at += n
                    continue
            at += n
            if not self._body and not self._pad:
                self._end_frame()

    def _begin_frame(self) -> bool:
        """The bytes gathered are complete; False: more of them are needed."""
        head = self._head
        if self._preface:
            if head != PREFACE:
                raise WireError("no HTTP/2 preface")
            self._preface, self._need = False, 9
            head.clear()
            return False
        length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        padding = 0
        if kind == DATA and flags & PADDED:
            if self._need == 9:
                self._need = 10  # The pad length is the first byte of the body.
                return False
            padding = head[9]
            length -= 1 + padding
            if length < 0:
                raise WireError("padding is longer than its frame")
        self._kind, self._flags = kind, flags
        self._stream = int.from_bytes(head[5:9], "big") & 0x7FFF_FFFF
        self._body, self._pad, self._need = length, padding, 9
        head.clear()
        return True

    def _end_frame(self) -> None:
        reset = self._kind == RST_STREAM
        if reset or (self._kind in (DATA, HEADERS) and self._flags & END_STREAM):
            self._on_end(self._stream, reset)


class MessageReader:
    """Cuts one direction of one stream into gRPC messages.

    `on_message(head)` gets each message without field 15. `on_payload(head,
    offset, view)`, if set, sees the bytes of field 15 as they pass (and may
    change them); `head` is then what stood before the payload.
    """

    def __init__(
        self,
        on_message: Callable[[bytearray], None],
        on_payload: Callable[[bytearray, int, memoryview], None] | None = None,
    ) -> None:
        self._on_message, self._on_payload = on_message, on_payload
        self._prefix = bytearray()
        self._left = 0  # bytes of the message still to come
        self._head = bytearray()
        self._copy = self._skip = self._skipped = 0
        self._raw = bytearray()  # key and length of the field under way
        self._key = -1
        self._number = self._shift = 0  # the varint under way

    def feed(self, view: memoryview) -> None:
        """Takes the next bytes, cut anywhere."""
        at, end = 0, len(view)
        while at < end:
            if len(self._prefix) < 5:
                n = min(5 - len(self._prefix), end - at)
                self._prefix += view[at : at + n]
                at += n
                if len(self._prefix) < 5:
                    return
                if self._prefix[0]:
                    raise WireError("compressed message")
                self._left = int.from_bytes(self._prefix[1:], "big")
                self._head = bytearray()
            else:
                n = self._field_bytes(view, at, min(end - at, self._left))
                at += n
                self._left -= n
            if not self._left:
                if self._copy or self._skip or self._raw:
                    raise WireError("a field ends behind its message")
                self._prefix.clear()
                self._on_message(self._head)

    def _field_bytes(self, view: memoryview, at: int, most: int) -> int:
        """Handles 1 to `most` bytes, all of one field; how many it was."""
        if self._skip:
            n = min(self._skip, most)
            if self._on_payload:
                self._on_payload(self._head, self._skipped, view[at : at + n])
            self._skip -= n
            self._skipped += n
            return n
        if self._copy:
            n = min(self._copy, most)
            self._head += view[at : at + n]
            self._copy -= n
            return n
        self._key_byte(view[at])
        return 1

    def _key_byte(self, byte: int) -> None:
        """One byte of a field's key, or of the varint after it."""
        self._raw.append(byte)
        self._number |= (byte & 0x7F) << self._shift
        self._shift += 7
        if byte >= 0x80:
            if self._shift >= 70:
                raise WireError("varint of more than 10 bytes")
            return
        number, self._number, self._shift = self._number, 0, 0
        if self._key < 0:
            self._key = number
            wire = number & 7
            if wire in (0, 2):
                return
            if wire not in (1, 5):
                raise WireError(f"wire type {wire}")
            self._copy = 8 if wire == 1 else 4
        elif self._key == PAYLOAD_FIELD << 3 | 2:
            self._skip, self._skipped = number, 0
            self._raw.clear()
        elif self._key & 7 == 2:
            self._copy = number
        if len(self._head) + len(self._raw) + self._copy > MAX_HEAD:
            raise WireError("the head of a frame is longer than 1.2 MB")
        self._head += self._raw
        self._raw.clear()
        self._key = -1
