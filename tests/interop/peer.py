"""A sender written against grpcio, and the server it talks to. Nothing is imported from tensorferry."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import unittest
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import google_crc32c
import grpc
import numpy as np
from blake3 import blake3
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tensorferry.v1 import ferry_pb2 as pb
from tensorferry.v1 import ferry_pb2_grpc as services

CELL = 256 << 10
"""Cell length that the tests ask for, the smallest there is."""
HANG_S = 30
"""Deadline of every call that does not test deadlines: a hang becomes a failure."""
SERVICE = "tensorferry.v1.Ferry"
PUSH = f"/{SERVICE}/Push"


# ---------------------------------------------------------------- what is sent


@dataclass
class Tensor:
    """One entry with its bytes."""

    name: str
    raw: bytes
    dtype: str = "uint8"
    shape: tuple[int, ...] = ()
    order: int = pb.ORDER_C
    sources: tuple[int, ...] = ()

    @staticmethod
    def of(name: str, array: np.ndarray, dtype: str | None = None, fortran: bool = False) -> Tensor:
        order = pb.ORDER_FORTRAN if fortran else pb.ORDER_C
        raw = array.tobytes(order="F" if fortran else "C")
        return Tensor(name, raw, dtype or array.dtype.name, array.shape, order)

    def entry(self, index: int) -> pb.Entry:
        return pb.Entry(
            index=index,
            name=self.name,
            kind=pb.ENTRY_KIND_TENSOR,
            dtype=self.dtype,
            shape=self.shape,
            order=self.order,
            byte_len=len(self.raw),
            sources=self.sources,
        )

    def canonical(self) -> bytes:
        """The header as it goes into entries_digest."""
        name, dtype = self.name.encode(), self.dtype.encode()
        tail = u64(len(self.shape), *self.shape, len(self.raw))
        return u64(len(name)) + name + u64(len(dtype)) + dtype + bytes([1, self.order, 0]) + tail

    def cell(self, cell: int) -> bytes:
        return self.raw[cell * CELL : (cell + 1) * CELL]


def u64(*numbers: int) -> bytes:
    return b"".join(n.to_bytes(8, "little") for n in numbers)


def random_tensor(name: str, length: int, seed: int, sources: tuple[int, ...] = ()) -> Tensor:
    """Bytes that nothing shrinks."""
    return Tensor(name, np.random.default_rng(seed).bytes(length), "uint8", (length,), sources=sources)


def promise(tensors: Iterable[Tensor]) -> dict:
    """What Open and Finish say about a manifest."""
    tensors = list(tensors)
    headers = b"".join(t.canonical() for t in sorted(tensors, key=lambda t: t.name.encode()))
    return {
        "entry_count": len(tensors),
        "total_bytes": sum(len(t.raw) for t in tensors),
        "entries_digest": blake3(headers, derive_key_context="tensorferry v1 entries").digest()[:16],
    }


def open_frame(checkpoint: str, transfer: int = 1, tensors: Iterable[Tensor] | None = None, **more) -> pb.SenderFrame:
    """Open; with `tensors` the manifest is complete, without it is open."""
    fields = {"protocol_version": 1, "checkpoint": checkpoint, "transfer_id": bytes([transfer] * 16)}
    fields |= {"codecs": 1, "chunk_len": CELL}
    if tensors is not None:
        fields |= {"manifest_complete": True, **promise(tensors)}
    return pb.SenderFrame(open=pb.SenderOpen(**fields | more))


def announcement(tensors: Iterable[Tensor], start: int = 0) -> pb.SenderFrame:
    return pb.SenderFrame(entries=[t.entry(i) for i, t in enumerate(tensors, start)])


def head(entry: int, cell: int, raw: bytes, encoded_len: int | None = None, codec: int = 0) -> pb.ChunkHead:
    return pb.ChunkHead(
        entry=entry,
        offset=cell * CELL,
        raw_len=len(raw),
        encoded_len=len(raw) if encoded_len is None else encoded_len,
        codec=codec,
        crc32c=google_crc32c.value(raw),
    )


def chunk(entry: int, cell: int, raw: bytes, encoded: bytes | None = None, codec: int = 0) -> pb.SenderFrame:
    payload = raw if encoded is None else encoded
    return pb.SenderFrame(chunks=[head(entry, cell, raw, len(payload), codec)], payload=payload)


def finish_frame(tensors: Iterable[Tensor]) -> pb.SenderFrame:
    return pb.SenderFrame(finish=pb.Finish(**promise(tensors)))


# ---------------------------------------------------------------- one call


def reason_of(call: grpc.Call) -> str | None:
    """The reason in the status of an ended call, None when it has none of this project."""
    status = rpc_status.from_call(call)
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == "tensorferry":
            return info.reason
    return None


def cells(ranges: Iterable[pb.CellRange]) -> set[int]:
    return {cell for r in ranges for cell in range(r.first, r.first + r.count)}


@dataclass
class Push:
    """A push call: frames go out, and what was heard so far is kept. A frame may also be given as bytes."""

    channel: grpc.Channel
    timeout: float | None = HANG_S
    compression: grpc.Compression | None = None
    accept: pb.Accept | None = None
    done: pb.Done | None = None
    acked: int = 0
    sent: int = 0
    answered: set[int] = field(default_factory=set)
    wanted: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    held: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    durable: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    kept: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    rejects: list[pb.Reject] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._out: SimpleQueue = SimpleQueue()
        method = self.channel.stream_stream(
            PUSH,
            request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            response_deserializer=pb.ReceiverFrame.FromString,
        )
        self.call = method(iter(self._out.get, None), timeout=self.timeout, compression=self.compression)

    def send(self, frame: pb.SenderFrame | bytes, chunk_count: int | None = None) -> None:
        """Queues a frame. For bytes the caller says how many chunks are inside."""
        self.sent += len(frame.chunks) if chunk_count is None and not isinstance(frame, bytes) else chunk_count or 0
        self._out.put(frame)

    def close(self) -> None:
        """Ends our side of the stream."""
        self._out.put(None)

    def until(self, condition: Callable[[Push], object]) -> Push:
        """Reads until the condition holds; the end of the call before that raises."""
        while not condition(self):
            try:
                self._take(next(self.call))
            except StopIteration:
                raise AssertionError("the call ended well before what was waited for") from None
        return self

    def _take(self, frame: pb.ReceiverFrame) -> None:
        if frame.HasField("accept"):
            self.accept = frame.accept
        if frame.HasField("done"):
            self.done = frame.done
        for w in frame.wanted:
            self.wanted[w.entry] |= cells(w.wanted)
            self.held[w.entry] |= cells(w.held)
            if w.last:
                self.answered.add(w.entry)
        self.rejects += frame.rejects
        if frame.HasField("ack"):
            assert self.acked <= frame.ack.settled_count <= self.sent, (self.acked, frame.ack, self.sent)
            self.acked = frame.ack.settled_count
        for d in frame.durable:
            self.durable[d.entry] |= cells(d.ranges)
        for k in frame.keeps:
            self.kept[k.entry] |= cells(k.ranges)

    def ending(self) -> tuple[str, str | None]:
        """Reads to the end: the code of the status and its reason."""
        try:
            for frame in self.call:
                self._take(frame)
        except grpc.RpcError:
            pass
        self.close()  # frees the thread that waits for more to send
        return self.call.code().name, reason_of(self.call)

    def announced(self, tensors: list[Tensor], start: int = 0) -> Push:
        """Announces and waits for every answer."""
        self.send(announcement(tensors, start))
        return self.until(lambda s: s.accept and all(i in s.answered for i in range(start, start + len(tensors))))

    def opened(self, checkpoint: str, tensors: list[Tensor], transfer: int = 1, **more) -> Push:
        """Opens with a complete manifest, announces, and waits for every answer."""
        self.send(open_frame(checkpoint, transfer, tensors, **more))
        return self.announced(tensors)

    def sent_wanted(self, tensors: list[Tensor]) -> Push:
        """Sends every wanted cell, one a frame, and waits until all are acked."""
        for entry, wanted in self.wanted.items():
            for cell in sorted(wanted):
                self.send(chunk(entry, cell, tensors[entry].cell(cell)))
        return self.settled()

    def settled(self) -> Push:
        return self.until(lambda s: s.acked == s.sent)

    def finished(self, tensors: list[Tensor]) -> pb.Done:
        """Finish, Done, and OK."""
        self.send(finish_frame(tensors))
        self.until(lambda s: s.done)
        assert self.ending() == ("OK", None), self.call.details()
        assert self.done is not None
        return self.done


# ---------------------------------------------------------------- the server


class Server:
    """A `tensorferry serve` on a port of its own choice."""

    def __init__(self, root: Path):
        self.root = root
        command = [os.environ["TENSORFERRY_BINARY"], "serve", str(root), "--listen", "127.0.0.1:0", "--format", "json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], HANG_S)
        line = self.process.stdout.readline() if ready else b""
        self.address = json.loads(line)["address"] if line else ""
        if not self.address:
            self.stop()
            raise AssertionError("the server did not say that it listens")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def manifest(self, checkpoint: str) -> dict:
        return json.loads((self.root / checkpoint / "manifest.json").read_bytes())

    def landed(self, checkpoint: str) -> dict[str, tuple[np.ndarray, dict]]:
        """Every tensor of a published checkpoint, mapped by plain numpy, with its row of the manifest."""
        rows = self.manifest(checkpoint)["tensors"]
        folder = self.root / checkpoint
        return {row["name"]: (np.load(folder / row["file"], mmap_mode="r"), row) for row in rows}


class ServerTest(unittest.TestCase):
    """Tests that share a server; every test uses checkpoint names of its own."""

    server: Server

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.server = Server(Path(folder.name))
        cls.addClassCleanup(cls.server.stop)

    def setUp(self) -> None:
        self.channel = self.connect()
        self.ferry = services.FerryStub(self.channel)

    def connect(self) -> grpc.Channel:
        """A connection of its own: grpcio would share one between channels with equal options."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.insecure_channel(self.server.address, options=options)
        self.addCleanup(channel.close)
        return channel

    def push(self, channel: grpc.Channel | None = None, **options) -> Push:
        push = Push(channel or self.channel, **options)
        self.addCleanup(push.close)
        return push

    def status(self, checkpoint: str) -> pb.StatusResponse:
        return self.ferry.Status(pb.StatusRequest(checkpoint=checkpoint), timeout=HANG_S)

    def assert_refused(self, expected: tuple[str, str | None], ask: Callable[[], object]) -> None:
        """A unary call ends with this code and reason."""
        with self.assertRaises(grpc.RpcError) as caught:
            ask()
        self.assertEqual((caught.exception.code().name, reason_of(caught.exception)), expected)

    def assert_landed(self, checkpoint: str, tensors: list[Tensor]) -> None:
        """What numpy maps has the very bytes, and the manifest the true types."""
        landed = self.server.landed(checkpoint)
        self.assertEqual(sorted(landed), sorted(t.name for t in tensors))
        for tensor in tensors:
            array, row = landed[tensor.name]
            fortran = tensor.order == pb.ORDER_FORTRAN
            self.assertEqual(array.tobytes(order="F" if fortran else "C"), tensor.raw, tensor.name)
            self.assertEqual((row["dtype"], tuple(row["shape"])), (tensor.dtype, tensor.shape), tensor.name)
            self.assertEqual(array.shape, tensor.shape, tensor.name)
            self.assertEqual(row["fortran_order"], fortran, tensor.name)
            self.assertEqual(row["crc32c"], f"{google_crc32c.value(tensor.raw):08x}", tensor.name)
