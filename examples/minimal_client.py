#!/usr/bin/env python3
"""Pushes arrays to a tensorferry server with nothing but a stock gRPC library; docs/wire.md explains each step.

    pip install grpcio grpcio-tools google-crc32c blake3 numpy
    python examples/minimal_client.py HOST:PORT CHECKPOINT [ARRAYS.npz]
"""

import sys
from collections import deque
from pathlib import Path
from queue import SimpleQueue

import google_crc32c
import grpc
import numpy as np
from blake3 import blake3

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proto/tensorferry"))
pb, services = grpc.protos_and_services("v1/ferry.proto")  # compiled here and now


def canonical(e):  # an entry header as it goes into entries_digest: tensor, C order, little-endian
    name, dtype, kind_order_endian = e.name.encode(), e.dtype.encode(), bytes([1, 1, 0])
    numbers = (len(name), len(dtype), len(e.shape), *e.shape, e.byte_len)
    len_name, len_dtype, *rest = (n.to_bytes(8, "little") for n in numbers)
    return b"".join([len_name, name, len_dtype, dtype, kind_order_endian, *rest])


def push(address, checkpoint, arrays):
    arrays = {name: np.asarray(a, a.dtype.newbyteorder("<"), order="C") for name, a in arrays.items()}
    raw = [a.tobytes() for a in arrays.values()]
    entries = [
        pb.Entry(index=i, name=name, kind=pb.ENTRY_KIND_TENSOR, dtype=a.dtype.name, shape=a.shape, byte_len=a.nbytes)
        for i, (name, a) in enumerate(arrays.items())
    ]
    headers = b"".join(canonical(e) for e in sorted(entries, key=lambda e: e.name.encode()))
    digest = blake3(headers, derive_key_context="tensorferry v1 entries").digest()[:16]
    # The same bytes under the same name are the same transfer: a later run resumes it, or finds it published.
    identity = blake3(b"".join([checkpoint.encode(), headers, *raw])).digest()[:16]
    promise = dict(entry_count=len(raw), total_bytes=sum(map(len, raw)), entries_digest=digest, fingerprint=identity)

    frames = SimpleQueue()  # what is put here is sent; None closes our side
    call = services.FerryStub(grpc.insecure_channel(address)).Push(iter(frames.get, None))
    terms = dict(protocol_version=1, checkpoint=checkpoint, transfer_id=identity, manifest_complete=True, codecs=1)
    frames.put(pb.SenderFrame(open=pb.SenderOpen(**terms, **promise)))
    for entry in entries:  # numbered 0, 1, 2, …; no need to wait for Accept
        frames.put(pb.SenderFrame(entries=[entry]))

    chunk_len = window_bytes = settled = answered = 0
    wanted, flying = deque(), deque()  # (entry, cell) to be sent; lengths of chunks that are sent and not acked
    for frame in call:  # a grpc.RpcError is the server's refusal, or a broken connection
        if frame.HasField("accept"):
            chunk_len, window_bytes = frame.accept.chunk_len, frame.accept.window_bytes
        if frame.HasField("done"):
            frames.put(None)
            return frame.done
        for w in frame.wanted:  # held cells could be compared instead; to send them is simpler
            wanted.extend((w.entry, cell) for r in (*w.wanted, *w.held) for cell in range(r.first, r.first + r.count))
            answered += w.last
        wanted.extend((r.entry, r.offset // chunk_len) for r in frame.rejects)  # damaged on the way: again
        while settled < frame.ack.settled_count:
            flying.popleft()
            settled += 1
        while wanted and (not flying or sum(flying) + chunk_len <= window_bytes):
            entry, cell = wanted.popleft()
            payload = raw[entry][cell * chunk_len : (cell + 1) * chunk_len]
            n, crc = len(payload), google_crc32c.value(payload)
            head = pb.ChunkHead(entry=entry, offset=cell * chunk_len, raw_len=n, encoded_len=n, crc32c=crc)
            frames.put(pb.SenderFrame(chunks=[head], payload=payload))
            flying.append(n)
        if chunk_len and answered == len(raw) and not wanted and not flying:
            frames.put(pb.SenderFrame(finish=pb.Finish(**promise)))  # everything is acked: publish
            answered = -1  # once


if __name__ == "__main__":
    demo = {"weight": np.arange(1 << 20, dtype="f4").reshape(1024, 1024), "step": np.array(7, dtype="i8")}
    done = push(*sys.argv[1:3], dict(np.load(sys.argv[3])) if len(sys.argv) > 3 else demo)
    print(f"{done.entry_count} tensors, {done.total_bytes} bytes, unchanged: {done.unchanged}")
