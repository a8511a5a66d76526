#!/usr/bin/env python3
"""How fast `save_file` sends float32 arrays, against what one writes with grpcio for that.

    python save_file_vs_grpcio.py [--bytes 256M] [--rounds 3]

Peers, each with a receiver in a process of its own that leaves one .npy file for each array by np.save:

- `floats_unary`: one call an array, a message with `repeated float values` out of `flatten().tolist()`;
- `floats_stream`: the same messages on one stream;
- `chunks`: 1 MiB of raw bytes a message on one stream, put together in a buffer by the receiver.

The peers do not sync; tensorferry does unless --durability none is asked for or --workdir is in memory. A
clock runs from the first call to the answer that everything is in its files. Random bytes as floats: no
codec shrinks them. What landed is compared in every run, outside of the clock.

Figures: `speedup` is the peer's time over save_file's.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import GIB, MIB

PROTO = """
syntax = "proto3";
package usual;
service Sink {
  rpc Put(FloatTensor) returns (Kept);
  rpc PutFloats(stream FloatTensor) returns (Kept);
  rpc PutChunks(stream Chunk) returns (Kept);
}
message FloatTensor {
  string folder = 1;
  string name = 2;
  repeated uint64 shape = 3;
  repeated float values = 4;
}
message Chunk {
  string folder = 1;
  string name = 2;
  repeated uint64 shape = 3;
  uint64 offset = 4;
  bytes data = 5;
}
message Kept {
  uint64 count = 1;
}
"""
# Without these a message of more than 4 MiB is refused.
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
CHUNK_LEN = MIB


def compiled(folder: Path) -> tuple[Any, Any]:
    from grpc_tools import protoc

    (folder / "usual.proto").write_text(PROTO)
    arguments = [f"--proto_path={folder}", f"--python_out={folder}", f"--grpc_python_out={folder}", "usual.proto"]
    if protoc.main(["protoc", *arguments]) != 0:
        raise SystemExit("the peer's messages could not be compiled")
    sys.path.insert(0, str(folder))
    return importlib.import_module("usual_pb2"), importlib.import_module("usual_pb2_grpc")


# ---------------------------------------------------------------- the receiver's process


def receive() -> None:
    """Serves until standard input ends."""
    import grpc

    with tempfile.TemporaryDirectory() as folder:
        pb, services = compiled(Path(folder))

        class Sink(services.SinkServicer):
            def Put(self, message: Any, context: Any) -> Any:
                values = np.array(message.values, dtype=np.float32).reshape(tuple(message.shape))
                np.save(Path(message.folder) / f"{message.name}.npy", values)
                return pb.Kept(count=1)

            def PutFloats(self, messages: Iterator[Any], context: Any) -> Any:
                return pb.Kept(count=sum(self.Put(message, context).count for message in messages))

            def PutChunks(self, messages: Iterator[Any], context: Any) -> Any:
                count = filled = 0
                array = np.empty(0, np.float32)
                for message in messages:
                    if message.offset == 0:
                        array, filled = np.empty(tuple(message.shape), np.float32), 0
                        raw = memoryview(array).cast("B")
                    raw[message.offset : message.offset + len(message.data)] = message.data
                    filled += len(message.data)
                    if filled == array.nbytes:
                        np.save(Path(message.folder) / f"{message.name}.npy", array)
                        count += 1
                return pb.Kept(count=count)

        server = grpc.server(ThreadPoolExecutor(4), options=UNLIMITED)
        services.add_SinkServicer_to_server(Sink(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        print(json.dumps({"port": port}), flush=True)
        sys.stdin.read()


# ---------------------------------------------------------------- the sender


class Peer:
    """The sender of the usual way."""

    def __init__(self, pb: Any, sink: Any, arrays: dict[str, np.ndarray]) -> None:
        self.pb, self.sink, self.arrays = pb, sink, arrays

    def _floats(self, folder: Path, name: str) -> Any:
        array = self.arrays[name]
        return self.pb.FloatTensor(folder=str(folder), name=name, shape=array.shape, values=array.flatten().tolist())

    def _chunks(self, folder: Path) -> Iterator[Any]:
        for name, array in self.arrays.items():
            raw = memoryview(array).cast("B")
            for offset in range(0, len(raw), CHUNK_LEN):
                data = bytes(raw[offset : offset + CHUNK_LEN])
                yield self.pb.Chunk(folder=str(folder), name=name, shape=array.shape, offset=offset, data=data)

    def floats_unary(self, folder: Path) -> int:
        return sum(self.sink.Put(self._floats(folder, name)).count for name in self.arrays)

    def floats_stream(self, folder: Path) -> int:
        return self.sink.PutFloats(self._floats(folder, name) for name in self.arrays).count

    def chunks(self, folder: Path) -> int:
        return self.sink.PutChunks(self._chunks(folder)).count


PEERS = ("floats_unary", "floats_stream", "chunks")


def main() -> None:
    if sys.argv[1:] == ["receive"]:
        receive()
        return
    parser = harness.arguments(__doc__, size="256M", rounds=3)
    parser.add_argument("--count", type=int, default=8, help="arrays")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    args = harness.checked(parser.parse_args())
    rng = np.random.default_rng(args.seed)
    columns = 64
    rows = max(1, args.bytes // args.count // columns // 4)
    # Bits of a random float may be a signalling NaN, which a list of Python floats does not keep.
    arrays = {f"layer.{number:03}": rng.standard_normal((rows, columns), np.float32) for number in range(args.count)}
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    program += "sys.argv[1:] = ['receive']; import save_file_vs_grpcio; save_file_vs_grpcio.main()"
    with (
        harness.work_folder(args) as folder,
        harness.Server(folder / "root", args.binary) as server,
        harness.Child(program) as receiver,
    ):
        measure(args, folder, arrays, server, receiver.answer()["port"])


def measure(args, folder: Path, arrays: dict[str, np.ndarray], server: harness.Server, port: int) -> None:
    import grpc
    import tensorferry

    nbytes = sum(array.nbytes for array in arrays.values())
    (folder / "proto").mkdir()
    pb, services = compiled(folder / "proto")
    runs = iter(range(1 << 30))
    durability = []

    def save() -> float:
        name = f"save{next(runs)}"
        begun = time.perf_counter()
        report = tensorferry.save_file(arrays, server.url(name), **harness.options_of(args))
        seconds = time.perf_counter() - begun
        durability.append(str(report.durability))
        compare(arrays, server.root / name)
        server.remove(name)
        return seconds

    with grpc.insecure_channel(f"127.0.0.1:{port}", options=UNLIMITED) as channel:
        peer = Peer(pb, services.SinkStub(channel), arrays)

        def usual(way: str) -> float:
            out = folder / f"{way}{next(runs)}"
            out.mkdir()
            begun = time.perf_counter()
            count = getattr(peer, way)(out)
            seconds = time.perf_counter() - begun
            if count != len(arrays):
                raise RuntimeError(f"{way} kept {count} of {len(arrays)} arrays")
            compare(arrays, out)
            for path in out.iterdir():
                path.unlink()
            return seconds

        arms = {"save": save} | {way: lambda way=way: usual(way) for way in args.peers}
        found = harness.interleaved(arms, args.rounds, args.seed)
    for way in args.peers:
        each = harness.ratios(found[way], found["save"])
        harness.figure(
            "save_file against grpcio",
            args,
            peer=way,
            speedup=harness.median(each),
            ratios=each,
            save_gib_per_s=nbytes / GIB / harness.median(found["save"]),
            peer_gib_per_s=nbytes / GIB / harness.median(found[way]),
            save_seconds=found["save"],
            peer_seconds=found[way],
            durability=durability[-1],
        )


def compare(arrays: dict[str, np.ndarray], landed: Path) -> None:
    for name, array in arrays.items():
        if not np.array_equal(np.load(landed / f"{name}.npy", mmap_mode="r"), array):
            sys.exit(f"{name} landed with other bytes in {landed}")


if __name__ == "__main__":
    main()
