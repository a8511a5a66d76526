#!/usr/bin/env python3
"""Pushes a tensor and pulls it back with nothing but a stock gRPC library and ferry.proto.

    pip install grpcio grpcio-tools google-crc32c blake3 numpy
    python plain_grpc.py HOST:PORT CHECKPOINT [--proto DIR] [--mib 3]

The package tensorferry is not used, and hidden if it is installed. docs/wire.md explains every step:
section 16 is the push, section 17 the pull.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections import deque
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import google_crc32c
import grpc
import numpy as np
from blake3 import blake3

PROTO = Path(__file__).resolve().parent.parent.parent / "proto"
CHUNK_LEN = 1 << 20
"""Length of the cells of a pull in bytes: the receiver's choice."""


def compiled(proto: Path, folder: Path) -> tuple[Any, Any]:
    """Messages and stubs of ferry.proto, compiled into a folder."""
    from grpc_tools import protoc

    source = "tensorferry/v1/ferry.proto"
    arguments = [f"--proto_path={proto}", f"--python_out={folder}", f"--grpc_python_out={folder}", source]
    if protoc.main(["protoc", *arguments]) != 0:
        raise SystemExit(f"{proto / source} could not be compiled")
    # The generated modules lie in a package called tensorferry. With these files it is a package of its
    # own, found before one that is installed.
    for package in (folder / "tensorferry", folder / "tensorferry" / "v1"):
        (package / "__init__.py").touch()
    sys.path.insert(0, str(folder))
    return importlib.import_module("tensorferry.v1.ferry_pb2"), importlib.import_module("tensorferry.v1.ferry_pb2_grpc")


# ---------------------------------------------------------------- push


def push(pb: Any, ferry: Any, checkpoint: str, name: str, array: np.ndarray) -> Any:
    """Sends one tensor: C order, little-endian. Gives Done."""
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
    raw = array.tobytes()
    entry = pb.Entry(
        index=0,
        name=name,
        kind=pb.ENTRY_KIND_TENSOR,
        dtype=array.dtype.name,
        shape=array.shape,
        order=pb.ORDER_C,
        byte_len=len(raw),
    )
    header = canonical(pb, entry)
    digest = blake3(header, derive_key_context="tensorferry v1 entries").digest()[:16]
    # The same bytes under the same name are the same transfer: a later run resumes it, or finds it published.
    identity = blake3(checkpoint.encode() + header + raw).digest()[:16]
    promise = {"entry_count": 1, "total_bytes": len(raw), "entries_digest": digest, "fingerprint": identity}

    frames: SimpleQueue[Any] = SimpleQueue()  # what is put here is sent; None closes our side
    call = ferry.Push(iter(frames.get, None))
    terms = {"protocol_version": 1, "checkpoint": checkpoint, "transfer_id": identity, "codecs": 1}
    frames.put(pb.SenderFrame(open=pb.SenderOpen(manifest_complete=True, **terms, **promise)))
    frames.put(pb.SenderFrame(entries=[entry]))

    chunk_len = window_bytes = settled = 0
    is_answered = False
    wanted: deque[int] = deque()  # cells to send
    flying: deque[int] = deque()  # lengths of the chunks that are sent and not acked, in order
    for frame in call:  # a grpc.RpcError is the server's refusal, or a broken connection
        if frame.HasField("accept"):
            chunk_len, window_bytes = frame.accept.chunk_len, frame.accept.window_bytes
        if frame.HasField("done"):
            frames.put(None)
            return frame.done
        for answer in frame.wanted:
            wanted.extend(cells([*answer.wanted, *answer.held]))
            is_answered |= answer.last
        wanted.extend(reject.offset // chunk_len for reject in frame.rejects)
        while settled < frame.ack.settled_count:
            flying.popleft()
            settled += 1
        while wanted and (not flying or sum(flying) + chunk_len <= window_bytes):
            offset = wanted.popleft() * chunk_len
            payload = raw[offset : offset + chunk_len]
            length = len(payload)
            crc = google_crc32c.value(payload)
            head = pb.ChunkHead(entry=0, offset=offset, raw_len=length, encoded_len=length, crc32c=crc)
            frames.put(pb.SenderFrame(chunks=[head], payload=payload))
            flying.append(length)
        if is_answered and not wanted and not flying:
            frames.put(pb.SenderFrame(finish=pb.Finish(**promise)))
            is_answered = False  # once
    raise RuntimeError("the server ended the call without Done")


def canonical(pb: Any, entry: Any) -> bytes:
    """The header of an entry as it goes into entries_digest."""
    name, dtype = entry.name.encode(), entry.dtype.encode()
    kind = bytes([entry.kind, max(entry.order, pb.ORDER_C), int(entry.big_endian)])
    numbers = u64(len(entry.shape), *entry.shape, entry.byte_len)
    return b"".join([u64(len(name)), name, u64(len(dtype)), dtype, kind, numbers])


def u64(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in numbers)


def cells(ranges: Any) -> list[int]:
    return [cell for run in ranges for cell in range(run.first, run.first + run.count)]


# ---------------------------------------------------------------- pull


def pull(pb: Any, ferry: Any, checkpoint: str, max_bytes: int = 1 << 30) -> dict[str, np.ndarray]:
    """Fetches all entries of a checkpoint into memory; a side file is an array of its bytes."""
    frames: SimpleQueue[Any] = SimpleQueue()
    call = ferry.Pull(iter(frames.get, None))
    ask = {"protocol_version": 1, "checkpoint": checkpoint, "transfer_id": os.urandom(16), "codecs": 1}
    frames.put(pb.ReceiverFrame(open=pb.PullOpen(max_lanes=1, lane_token=os.urandom(16), **ask)))

    entries: list[Any] = []
    buffers: list[bytearray] = []
    settled = 0
    for frame in call:
        if frame.HasField("open"):
            # A client owes a server no trust: it says how much it is ready to take.
            if frame.open.total_bytes > max_bytes:
                raise RuntimeError(f"{frame.open.total_bytes} bytes are more than {max_bytes}")
            terms = {"protocol_version": 1, "chunk_len": CHUNK_LEN, "codecs": 1, "window_bytes": 32 << 20}
            terms |= {"durability": pb.DURABILITY_PROCESS, "session_token": os.urandom(16), "epoch": 1, "max_lanes": 1}
            frames.put(pb.ReceiverFrame(accept=pb.Accept(**terms)))
        for entry in frame.entries:
            if sum(map(len, buffers)) + entry.byte_len > max_bytes:
                raise RuntimeError(f"{entry.name} is longer than what was promised")
            entries.append(entry)
            buffers.append(bytearray(entry.byte_len))
            count = -(-entry.byte_len // CHUNK_LEN)
            ranges = [pb.CellRange(first=0, count=count)] if count else []
            frames.put(pb.ReceiverFrame(wanted=[pb.Wanted(entry=entry.index, wanted=ranges, last=True)]))
        at = 0
        for head in frame.chunks:
            raw = frame.payload[at : at + head.encoded_len]
            at += head.encoded_len
            if google_crc32c.value(raw) != head.crc32c:
                frames.put(pb.ReceiverFrame(rejects=[pb.Reject(entry=head.entry, offset=head.offset)]))
            else:
                buffers[head.entry][head.offset : head.offset + head.raw_len] = raw
            settled += 1
        if frame.chunks:
            frames.put(pb.ReceiverFrame(ack=pb.Ack(settled_count=settled)))
        if frame.HasField("finish"):
            total_bytes = sum(map(len, buffers))
            if (frame.finish.entry_count, frame.finish.total_bytes) != (len(entries), total_bytes):
                raise RuntimeError("Finish does not fit what was announced")
            # Nothing is written here, so there is no manifest to give the digest of.
            counts = {"entry_count": len(entries), "total_bytes": total_bytes, "manifest_blake3": bytes(32)}
            frames.put(pb.ReceiverFrame(done=pb.Done(durability=pb.DURABILITY_PROCESS, **counts)))
            frames.put(None)
    return {entry.name: to_array(pb, entry, raw) for entry, raw in zip(entries, buffers)}


def to_array(pb: Any, entry: Any, raw: bytearray) -> np.ndarray:
    if entry.kind == pb.ENTRY_KIND_BLOB:
        return np.frombuffer(raw, np.uint8)
    dtype = np.dtype(entry.dtype).newbyteorder(">" if entry.big_endian else "<")
    order = "F" if entry.order == pb.ORDER_FORTRAN else "C"
    return np.frombuffer(raw, dtype).reshape(tuple(entry.shape), order=order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("checkpoint")
    parser.add_argument("--proto", type=Path, default=PROTO, help="folder that tensorferry/v1/ferry.proto is in")
    parser.add_argument("--mib", type=float, default=3.0, help="length of the tensor in MiB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    columns = 256
    rows = max(1, int(args.mib * (1 << 20)) // (4 * columns)) + 1  # the last cell is not a whole one
    sent = np.random.default_rng(args.seed).standard_normal((rows, columns)).astype("<f4")

    with tempfile.TemporaryDirectory() as folder, grpc.insecure_channel(args.address) as channel:
        pb, services = compiled(args.proto, Path(folder))
        ferry = services.FerryStub(channel)
        done = push(pb, ferry, args.checkpoint, "layer.weight", sent)
        print(f"pushed {done.entry_count} tensor, {done.total_bytes} bytes, unchanged: {done.unchanged}")
        found = pull(pb, ferry, args.checkpoint)
        assert list(found) == ["layer.weight"]
        assert found["layer.weight"].dtype == sent.dtype
        assert found["layer.weight"].tobytes() == sent.tobytes(), "other bytes came back"
        assert found["layer.weight"].shape == sent.shape
        print(f"pulled {found['layer.weight'].shape} of {found['layer.weight'].dtype}: the bytes are equal")


if __name__ == "__main__":
    main()
