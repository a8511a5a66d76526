#!/usr/bin/env python3
"""Makes ONNX models, with what the library onnx itself reads from each.

    make_onnx.py DIR [--large]

Each case is a folder of DIR; `expected.json` in it says what must land: name, type, shape and SHA-256
of every initializer, read back by the library. The values are random with a fixed seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

SEED = 20261128
TYPES = {
    "float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int8": TensorProto.INT8,
    "uint16": TensorProto.UINT16, "int16": TensorProto.INT16, "int32": TensorProto.INT32,
    "int64": TensorProto.INT64, "bool": TensorProto.BOOL, "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE, "uint32": TensorProto.UINT32, "uint64": TensorProto.UINT64,
    "complex64": TensorProto.COMPLEX64, "complex128": TensorProto.COMPLEX128,
    "bfloat16": TensorProto.BFLOAT16, "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float8_e4m3fnuz": TensorProto.FLOAT8E4M3FNUZ, "float8_e5m2": TensorProto.FLOAT8E5M2,
    "float8_e5m2fnuz": TensorProto.FLOAT8E5M2FNUZ,
}  # fmt: skip
PACKED = {"uint4_packed": TensorProto.UINT4, "int4_packed": TensorProto.INT4}
TYPED = ("float32", "float64", "int64", "int32", "int16", "int8", "uint16", "uint8", "uint32", "uint64", "bool")


def values(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random bytes as an array."""
    known = np.dtype(getattr(ml_dtypes, dtype, dtype))
    count = int(np.prod(shape)) * known.itemsize
    return rng.integers(0, 2 if dtype == "bool" else 256, count, dtype=np.uint8).view(known).reshape(shape)


def raw(name: str, kind: int, shape: tuple[int, ...], data: bytes) -> TensorProto:
    """A tensor with these bytes."""
    return helper.make_tensor(name, kind, shape, data, raw=True)


def save(path: Path, tensors: list[TensorProto]) -> None:
    """A model that does nothing, with these initializers."""
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Constant", [], ["y"], value=helper.make_tensor("c", TensorProto.FLOAT, [1], [1.0]))
    graph = helper.make_graph([node], "g", [], [out], initializer=tensors)
    path.write_bytes(helper.make_model(graph, producer_name="tests").SerializeToString())


def types(folder: Path, rng: np.random.Generator, large: bool) -> list[str]:
    """Every type as bytes, and those that may be stored as numbers in that way as well."""
    tensors = []
    for dtype, kind in TYPES.items():
        for form, shape in (("matrix", (5, 7)), ("scalar", ()), ("empty", (0, 3))):
            tensors.append(raw(f"{dtype}.{form}", kind, shape, values(dtype, shape, rng).tobytes()))
    for dtype, kind in PACKED.items():
        tensors.append(raw(f"{dtype}.matrix", kind, (3, 4), rng.bytes(6)))
    for dtype in TYPED:
        # Not a number is not equal to itself.
        array = np.nan_to_num(values(dtype, (4, 3), rng))
        tensors.append(helper.make_tensor(f"{dtype}.numbers", TYPES[dtype], (4, 3), array.flatten().tolist()))
    if large:
        tensors.append(raw("large", TensorProto.FLOAT, (1031, 1999), values("float32", (1031, 1999), rng).tobytes()))
    tensors.append(helper.make_tensor("a text", TensorProto.STRING, [2], [b"some", b"words"]))
    save(folder / "model.onnx", tensors)
    return ["a text"]


def outside(folder: Path, rng: np.random.Generator, large: bool) -> list[str]:
    """Data in files beside the model, one of them in a subfolder."""
    tensors = [raw("inside", TensorProto.FLOAT, (3,), values("float32", (3,), rng).tobytes())]
    data = bytearray(b"front")
    (folder / "sub").mkdir()
    for name, shape in (("a", (5, 7)), ("b", (1000, 1000) if large else (11,))):
        array = values("float32", shape, rng)
        tensor = raw(name, TensorProto.FLOAT, shape, array.tobytes())
        external_data_helper.set_external_data(tensor, "sub/data.bin", len(data), array.nbytes)
        data += array.tobytes() + b"x"
        tensor.ClearField("raw_data")
        tensors.append(tensor)
    (folder / "sub/data.bin").write_bytes(data)
    whole = values("int64", (2, 2), rng)
    tensor = raw("whole file", TensorProto.INT64, (2, 2), whole.tobytes())
    external_data_helper.set_external_data(tensor, "whole.bin")
    tensor.ClearField("raw_data")
    (folder / "whole.bin").write_bytes(whole.tobytes())
    save(folder / "model.onnx", [*tensors, tensor])
    return []


def expect(path: Path, skipped: list[str]) -> dict[str, object]:
    """What the library reads."""
    rows = []
    names = {kind: name for name, kind in (TYPES | PACKED).items()}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.name in skipped:
            continue
        dtype = names[tensor.data_type]
        # Two to a byte the library would unpack.
        data = tensor.raw_data if dtype in PACKED else numpy_helper.to_array(tensor).tobytes()
        rows.append({"name": tensor.name, "dtype": dtype, "shape": list(tensor.dims),
                     "sha256": hashlib.sha256(data).hexdigest()})  # fmt: skip
    return {"source": path.name, "tensors": rows, "skipped": skipped}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, metavar="DIR")
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    for number, case in enumerate((types, outside)):
        folder = args.dir / case.__name__
        folder.mkdir(parents=True)
        skipped = case(folder, np.random.default_rng(SEED + number), args.large)
        expected = expect(folder / "model.onnx", skipped)
        (folder / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")
        print(f"{case.__name__}: {len(expected['tensors'])} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
