#!/usr/bin/env python3
"""Writes a checkpoint of float32 tensors in any format that is read, of any size.

    format_files.py FORMAT PATH [--count N] [--bytes N] [--seed N | --holes]

With `--holes` the tensors are holes of their files: twenty gigabytes take no room and no time. Headers come from
the format's own library where it writes them without the data; the rest (zip archives, the index of TensorFlow)
is written here and opened by the library in `--check`, which reads the last tensor back.

Needs the Python packages of the large libraries (scripts/test.sh). Prints the source to name, for `push`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

TOOLS = Path(__file__).resolve().parent.parent / "tests" / "tools"
PIECE = 1 << 20
Tensors = list[tuple[str, int]]
"""Names, and how many elements of 4 bytes each has."""


# ---------------------------------------------------------------- checksums of what is not there


class Crc:
    """A reflected CRC of 32 bits whose values can be joined, so that none is computed of what repeats."""

    def __init__(self, polynomial: int) -> None:
        self.table = []
        for byte in range(256):
            for _ in range(8):
                byte = byte >> 1 ^ (polynomial if byte & 1 else 0)
            self.table.append(byte)
        # What a zero bit, and with it what a zero byte, makes of each bit of a sum.
        bit = [polynomial] + [1 << n for n in range(31)]
        self._zeros = self._twice(self._twice(self._twice(bit)))
        self._spans: dict[int, list[int]] = {}

    @staticmethod
    def _times(matrix: list[int], value: int) -> int:
        out = 0
        for row in matrix:
            if value & 1:
                out ^= row
            value >>= 1
        return out

    def _twice(self, matrix: list[int]) -> list[int]:
        return [self._times(matrix, row) for row in matrix]

    def of(self, data: bytes) -> int:
        """The sum of some bytes."""
        value = 0xFFFF_FFFF
        for byte in data:
            value = self.table[(value ^ byte) & 0xFF] ^ value >> 8
        return value ^ 0xFFFF_FFFF

    def join(self, first: int, second: int, second_len: int) -> int:
        """The sum of two runs, of which the second has so many bytes."""
        if second_len not in self._spans:
            span, doubled = [1 << n for n in range(32)], self._zeros
            length = second_len
            while length:
                if length & 1:
                    span = [self._times(doubled, row) for row in span]
                length >>= 1
                doubled = self._twice(doubled) if length else doubled
            self._spans[second_len] = span
        return self._times(self._spans[second_len], first) ^ second


CRC32C = Crc(0x82F6_3B78)
CRC32 = Crc(0xEDB8_8320)


def masked(crc: int) -> int:
    """A checksum as TensorFlow stores it."""
    return ((crc >> 15 | crc << 17) + 0xA282_EAD8) & 0xFFFF_FFFF


class Content:
    """What tensors hold: one piece of random values again and again, or a hole."""

    def __init__(self, seed: int | None) -> None:
        self.is_hole = seed is None
        values = np.random.default_rng(seed or 0).uniform(0.5, 1.0, PIECE // 4).astype("<f4")
        self.piece = bytes(PIECE) if self.is_hole else values.tobytes()
        self._known: dict[tuple[int, int], int] = {}

    def put(self, file: BinaryIO, length: int) -> None:
        """Writes a tensor where the file stands, and stands behind it then."""
        if self.is_hole:
            file.seek(length, os.SEEK_CUR)
            return
        for start in range(0, length, PIECE):
            file.write(self.piece[: length - start])

    def sum(self, crc: Crc, of: Callable[[bytes], int], length: int) -> int:
        """The checksum of a tensor."""
        key = (id(crc), length)
        if key not in self._known:
            count, rest = divmod(length, PIECE)
            piece, value = of(self.piece) if count else 0, 0
            for _ in range(count):
                value = crc.join(value, piece, PIECE)
            self._known[key] = crc.join(value, of(self.piece[:rest]), rest)
        return self._known[key]


def finish(file: BinaryIO) -> None:
    """A hole at the end belongs to the file."""
    file.truncate(file.tell())


# ---------------------------------------------------------------- numpy and safetensors


def npy_header(file: BinaryIO, count: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def npy(path: Path, tensors: Tensors, content: Content) -> Path:
    """A folder of files."""
    path.mkdir()
    for name, count in tensors:
        with (path / f"{name.replace('/', '.')}.npy").open("wb") as file:
            npy_header(file, count)
            content.put(file, count * 4)
            finish(file)
    return path


def safetensors(path: Path, tensors: Tensors, content: Content) -> Path:
    """The library wants the data, so its header is written here."""
    path = path.with_suffix(".safetensors")
    header, end = {}, 0
    for name, count in tensors:
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + count * 4]}
        end += count * 4
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, count in tensors:
            content.put(file, count * 4)
        finish(file)
    return path


# ---------------------------------------------------------------- zip archives


def member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, head: bytes, length: int, content: Content) -> None:
    """One that is stored. zipfile would read a hole for its checksum, so its counts are made here."""
    file: Any = archive.fp
    with archive.open(info, "w", force_zip64=True) as out:
        out.write(head)
        content.put(file, length)
        total = content.sum(CRC32, zlib.crc32, length)
        out._crc = CRC32.join(zlib.crc32(head), total, length)
        out._file_size += length


def npz(path: Path, tensors: Tensors, content: Content, **how: Any) -> Path:
    """As numpy.savez makes it, or savez_compressed where `how` says so."""
    path = path.with_suffix(".npz")
    if how:
        arrays = {name: np.resize(np.frombuffer(content.piece, "<f4"), count) for name, count in tensors}
        np.savez_compressed(path, **arrays)
        return path
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, count in tensors:
            head = io.BytesIO()
            npy_header(head, count)
            info = zipfile.ZipInfo(f"{name}.npy")
            member(archive, info, head.getvalue(), count * 4, content)
    return path


def deflated(path: Path, tensors: Tensors, content: Content) -> Path:
    """An archive of deflated members: a control."""
    return npz(path, tensors, content, compressed=True)


def pickled(tensors: Tensors, view: Callable[[int], tuple[tuple[int, ...], tuple[int, ...]]]) -> bytes:
    """The pickle of a dictionary of tensors, each with a storage of its own."""
    sys.path.insert(0, str(TOOLS))
    import stand_ins

    class Pickler(stand_ins.Pickler):
        """Storages know their own number."""

        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, stand_ins.Storage):
                return None
            return ("storage", stand_ins.MODULES["torch"].FloatStorage, obj.kind, "cpu", obj.array)

    out = io.BytesIO()
    root = stand_ins.OrderedDict()
    for number, (name, count) in enumerate(tensors):
        shape, strides = view(count)
        storage = stand_ins.Storage(count, str(number))
        root[name.replace("/", ".")] = stand_ins.Tensor(storage, 0, shape, strides, "float32")
    Pickler(out, 2).dump(root)
    return out.getvalue()


def pytorch(path: Path, tensors: Tensors, content: Content, turned: bool = False) -> Path:
    """What torch.save writes."""
    path = path.with_suffix(".pt")

    def view(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        # Rows of four elements, of which four lie between one and the next.
        return ((4, count // 16, 4), (4, 16, 1)) if turned else ((count,), (1,))

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def add(name: str, head: bytes, length: int = 0) -> None:
            file: Any = archive.fp
            info = zipfile.ZipInfo(f"archive/{name}")
            # force_zip64 adds a field of 20 bytes to the local header.
            start = file.tell() + 30 + len(info.filename) + 4 + 20
            info.extra = b"FB" + (-start % 64).to_bytes(2, "little") + b"Z" * (-start % 64)
            member(archive, info, head, length, content)

        add("data.pkl", pickled(tensors, view))
        add("byteorder", b"little")
        for number, (_, count) in enumerate(tensors):
            add(f"data/{number}", b"", count * 4)
        add("version", b"3\n")
    return path


def gathered(path: Path, tensors: Tensors, content: Content) -> Path:
    """PyTorch tensors whose elements lie in another order: a control."""
    return pytorch(path, tensors, content, turned=True)


# ---------------------------------------------------------------- HDF5


def arrays(path: Path, tensors: Tensors, content: Content, key: Callable[[int, str], str]) -> Path:
    """Contiguous arrays that have their places before they have values."""
    import h5py

    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    places = []
    with h5py.File(path, "w") as file:
        for number, (name, count) in enumerate(tensors):
            space = h5py.h5s.create_simple((count,))
            made = h5py.h5d.create(file.id, None, h5py.h5t.IEEE_F32LE, space, plist)
            h5py.h5o.link(made, file.id, key(number, name).encode(), lcpl=links)
            places.append((made.get_offset(), count * 4))
    with path.open("r+b") as out:
        for offset, length in () if content.is_hole else places:
            out.seek(offset)
            content.put(out, length)
    return path


def hdf5(path: Path, tensors: Tensors, content: Content) -> Path:
    """h5py, contiguous."""
    return arrays(path.with_suffix(".h5"), tensors, content, lambda _, name: name)


def keras(path: Path, tensors: Tensors, content: Content) -> Path:
    """The groups of `save_weights`: layers with two variables each."""
    import h5py

    path = path.with_suffix(".weights.h5")
    arrays(path, tensors, content, lambda number, _: f"layers/dense_{number // 2}/vars/{number % 2}")
    with h5py.File(path, "r+") as file:
        for name, layer in file["layers"].items():
            layer["vars"].attrs["name"] = name
    return path


# ---------------------------------------------------------------- GGUF and ONNX


def gguf(path: Path, tensors: Tensors, content: Content) -> Path:
    """The library's own header."""
    import gguf as library

    path = path.with_suffix(".gguf")
    writer = library.GGUFWriter(path, "llama")
    for name, count in tensors:
        writer.add_tensor_info(name, [count], np.dtype("float32"), count * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        for _, count in tensors:
            file.seek(-file.tell() % 32, os.SEEK_CUR)
            content.put(file, count * 4)
        finish(file)
    return path


def onnx(path: Path, tensors: Tensors, content: Content) -> Path:
    """A model whose initializers lie beside it."""
    from onnx import TensorProto, external_data_helper, helper

    path.mkdir()
    made, end = [], 0
    for name, count in tensors:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[count], raw_data=b"")
        external_data_helper.set_external_data(tensor, "weights.bin", end, count * 4)
        tensor.ClearField("raw_data")
        made.append(tensor)
        end += count * 4
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([], "g", [], [out], initializer=made)
    (path / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with (path / "weights.bin").open("wb") as file:
        for _, count in tensors:
            content.put(file, count * 4)
        finish(file)
    return path / "model.onnx"


# ---------------------------------------------------------------- TensorFlow


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: int | bytes) -> bytes:
    """A number or bytes of a protobuf message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value) if value else b""
    return varint(number << 3 | 2) + varint(len(value)) + value


def table(entries: Sequence[tuple[bytes, bytes]], block_len: int = 256 << 10) -> bytes:
    """A sorted table as LevelDB writes it, not compressed."""
    out, index = bytearray(), []

    def put(block: Sequence[tuple[bytes, bytes]]) -> bytes:
        start, restarts, last = len(out), [], b""
        for number, (key, value) in enumerate(block):
            shared = 0 if number % 16 == 0 else len(os.path.commonprefix([key, last]))
            if number % 16 == 0:
                restarts.append(len(out) - start)
            out.extend(varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value)
            last = key
        restarts = restarts or [0]
        out.extend(struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts)))
        length = len(out) - start
        out.append(0)
        out.extend(struct.pack("<I", masked(CRC32C.of(out[start:]))))
        return varint(start) + varint(length)

    block: list[tuple[bytes, bytes]] = []
    size = 0
    for entry in entries:
        block.append(entry)
        size += len(entry[0]) + len(entry[1])
        if size >= block_len:
            index.append((entry[0], put(block)))
            block, size = [], 0
    if block:
        index.append((block[-1][0], put(block)))
    footer = put([]) + put(index)
    return bytes(out) + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB47_7524_8B80_FB57)


GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


class Bundle:
    """A TensorFlow checkpoint in one shard; what `note` describes is then written to `data`."""

    def __init__(self, prefix: Path, *, big_endian: bool = False) -> None:
        self.prefix = prefix
        self.data = prefix.with_name(prefix.name + ".data-00000-of-00001").open("wb")
        self.entries = {b"": field(1, 1) + field(2, int(big_endian)) + field(3, field(1, 1))}

    def note(self, key: str, dtype: int, shape: Sequence[int], length: int, crc: int) -> None:
        """A tensor whose bytes, with this checksum, come next."""
        dims = b"".join(field(2, field(1, dim)) for dim in shape)
        place = field(4, self.data.tell()) + field(5, length)
        sum_ = varint(6 << 3 | 5) + struct.pack("<I", masked(crc))
        self.entries[key.encode()] = field(1, dtype) + field(2, dims) + place + sum_

    def close(self) -> Path:
        """Writes the index."""
        finish(self.data)
        self.data.close()
        self.prefix.with_name(self.prefix.name + ".index").write_bytes(table(sorted(self.entries.items())))
        return self.prefix


def bundle(prefix: Path, tensors: Tensors, content: Content, graph: bytes = b"") -> Path:
    """A TensorFlow checkpoint; `graph` names its variables where they are objects."""
    out = Bundle(prefix)
    for name, count in tensors:
        out.note(name, 1, [count], count * 4, content.sum(CRC32C, CRC32C.of, count * 4))
        content.put(out.data, count * 4)
    if graph:
        length = struct.pack("<I", len(graph))
        length_sum = struct.pack("<I", masked(CRC32C.of(length)))
        text = varint(len(graph)) + length_sum + graph
        out.note(GRAPH, 7, [], len(text), CRC32C.of(length + length_sum + graph))
        out.data.write(text)
    return out.close()


def variables(tensors: Tensors) -> Any:
    """A module of scalars with these names, in layers of four."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    import tensorflow as tf

    module = tf.Module()
    layers = []
    for start in range(0, len(tensors), 4):
        layer = tf.Module(name=f"layer_{start // 4}")
        with layer.name_scope:
            for number, (name, _) in enumerate(tensors[start : start + 4]):
                setattr(layer, f"w{number}", tf.Variable(0.0, name=name.replace("/", "_")))
        layers.append(layer)
    module.layers = layers
    return module


def written(prefix: Path) -> tuple[list[str], bytes]:
    """Keys and graph of what TensorFlow has written."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(prefix))
    keys = [key for key, dtype in reader.get_variable_to_dtype_map().items() if dtype == tf.float32]
    return sorted(keys), reader.get_tensor(GRAPH)


def grow(prefix: Path, tensors: Tensors, content: Content) -> Path:
    """Makes a checkpoint of scalars one of tensors, as many as it has."""
    keys, graph = written(prefix)
    assert len(keys) == len(tensors), (len(keys), len(tensors))
    for old in prefix.parent.glob(f"{prefix.name}.*"):
        old.unlink()
    return bundle(prefix, [(key, count) for key, (_, count) in zip(keys, tensors)], content, graph)


def tensorflow(path: Path, tensors: Tensors, content: Content) -> Path:
    """A checkpoint of objects: TensorFlow's own graph, an index with other lengths."""
    import tensorflow as tf

    path.mkdir()
    made = variables(tensors)
    tf.train.Checkpoint(model=made).write(str(path / "ckpt-1"))
    return grow(path / "ckpt-1", tensors, content)


def plain_tensorflow(path: Path, tensors: Tensors, content: Content) -> Path:
    """A checkpoint of names, as tf.compat.v1.train.Saver writes it; needs no TensorFlow."""
    path.mkdir()
    return bundle(path / "model.ckpt", tensors, content)


def savedmodel(path: Path, tensors: Tensors, content: Content) -> Path:
    """TensorFlow's own model, with other shapes."""
    made = variables(tensors)
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    tf.saved_model.save(made, str(path))
    model = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    for node in model.meta_graphs[0].object_graph_def.nodes:
        if node.HasField("variable"):
            node.variable.shape.dim.add(size=tensors[0][1])
    (path / "saved_model.pb").write_bytes(model.SerializeToString())
    grow(path / "variables" / "variables", tensors, content)
    return path


# ---------------------------------------------------------------- a landed folder


def landed(path: Path, tensors: Tensors, content: Content) -> Path:
    """A folder that a push has left."""
    npy(path, tensors, content)
    rows = []
    for index, (name, count) in enumerate(tensors):
        crc32c = content.sum(CRC32C, CRC32C.of, count * 4)
        rows.append({"index": index, "name": name, "file": f"{name.replace('/', '.')}.npy", "dtype": "float32",
                     "npy_descr": "<f4", "shape": [count], "fortran_order": False, "data_offset": 128,
                     "nbytes": count * 4, "crc32c": f"{crc32c:08x}"})  # fmt: skip
    manifest = {"format": "tensorferry", "version": 1, "tensors": rows, "files": []}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


FORMATS = {
    "npy": npy, "safetensors": safetensors, "npz": npz, "pytorch": pytorch, "hdf5": hdf5, "keras": keras,
    "gguf": gguf, "onnx": onnx, "tf-bundle": tensorflow, "tf-names": plain_tensorflow, "savedmodel": savedmodel,
    "tensorferry": landed, "npz-deflated": deflated, "pytorch-gathered": gathered,
}  # fmt: skip


# ---------------------------------------------------------------- what the libraries say


def last_of(kind: str, source: Path, name: str) -> np.ndarray | None:
    """The last tensor as the format's library reads it; None where there is no such library."""
    if kind in ("npy", "tensorferry"):
        return np.load(source / f"{name.replace('/', '.')}.npy", mmap_mode="r")
    if kind in ("npz", "npz-deflated"):
        return np.load(source)[name]
    if kind in ("hdf5", "keras"):
        import h5py

        found: list[Any] = []
        file = h5py.File(source)
        file.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
        return found[-1][()]
    if kind == "gguf":
        import gguf as library

        return library.GGUFReader(source).tensors[-1].data
    if kind == "onnx":
        import onnx as library
        from onnx import numpy_helper

        model = library.load(source, load_external_data=False)
        return numpy_helper.to_array(model.graph.initializer[-1], str(source.parent))
    if kind in ("tf-bundle", "tf-names", "savedmodel"):
        import tensorflow as tf

        prefix = source / "variables" / "variables" if source.is_dir() else source
        reader = tf.train.load_checkpoint(str(prefix))
        keys = [k for k, dtype in reader.get_variable_to_dtype_map().items() if dtype == tf.float32]
        return reader.get_tensor(max(keys))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=sorted(FORMATS))
    parser.add_argument("path", type=Path, help="without an ending")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--bytes", type=int, default=1 << 20, help="of all tensors together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--holes", action="store_true", help="zeros that take no room")
    parser.add_argument("--check", action="store_true", help="have the library read the last tensor")
    args = parser.parse_args()
    count = max(args.bytes // args.count // 64 * 16, 16)
    parts = ("query", "key", "value", "output")
    tensors = [(f"model/layers/{n // 4:05}/attention/{parts[n % 4]}/kernel", count) for n in range(args.count)]
    content = Content(None if args.holes else args.seed)
    source = FORMATS[args.format](args.path, tensors, content)
    if args.check:
        last = last_of(args.format, source, tensors[-1][0])
        if last is not None:
            expected = np.resize(np.frombuffer(content.piece, "<f4"), count)
            if not np.array_equal(last, expected):
                sys.exit(f"the library reads something else: {last.shape}, {last[:4]} for {expected[:4]}")
    print(source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
