#!/usr/bin/env python3
"""Makes GGUF files, with what the library gguf itself reads from each.

    make_gguf.py DIR [--large]

Each case is a folder of DIR; `expected.json` in it says what must land: name, type, shape and SHA-256
of every tensor, read back by the library. The values are random with a fixed seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

SEED = 20261128
PLAIN = {Type.F32: "float32", Type.F16: "float16", Type.F64: "float64", Type.I8: "int8", Type.I16: "int16",
         Type.I32: "int32", Type.I64: "int64", Type.BF16: "bfloat16"}  # fmt: skip


def plain(writer: gguf.GGUFWriter, rng: np.random.Generator, large: bool) -> None:
    """Every type that is not quantised, and every kind of value about the model."""
    writer.add_string("general.name", "some möd\u00e9l")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -3)
    writer.add_float32("t.f32", 0.5)
    writer.add_float64("t.f64", 0.25)
    writer.add_bool("t.bool", True)
    writer.add_int64("t.i64", -(1 << 40))
    writer.add_array("t.words", ["a", "", "word"] * (20_000 if large else 3))
    writer.add_array("t.numbers", [1, 2, 3])
    for type_, dtype in PLAIN.items():
        shape = (1031, 1999) if large and type_ == Type.F32 else (3, 5, 2)
        if type_ == Type.BF16:
            raw = rng.integers(0, 256, (3, 5, 4), dtype=np.uint8)
            writer.add_tensor("w.bf16", raw, raw_dtype=type_)
            continue
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        values = rng.integers(0, 256, count, dtype=np.uint8).view(dtype).reshape(shape)
        writer.add_tensor(f"w.{type_.name.lower()}", values)


def aligned(writer: gguf.GGUFWriter, rng: np.random.Generator, large: bool) -> None:
    """Another alignment, lengths that leave gaps, one value."""
    writer.add_custom_alignment(128)
    for count in (1, 31, 32, 33):
        writer.add_tensor(f"n{count}", rng.normal(size=count).astype("f4"))


def quantised(writer: gguf.GGUFWriter, rng: np.random.Generator, large: bool) -> None:
    """Every type of block."""
    for type_ in Type:
        block_len, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        if block_len == 1:
            continue
        rows, blocks = (2000, 40) if large and type_ == Type.Q4_K else (3, 2)
        raw = rng.integers(0, 256, (rows, blocks * block_bytes), dtype=np.uint8)
        writer.add_tensor(f"blk.0.{type_.name.lower()}.weight", raw, raw_dtype=type_)


def expect(path: Path) -> dict[str, object]:
    """What the library reads."""
    rows = []
    for tensor in gguf.GGUFReader(path).tensors:
        type_ = tensor.tensor_type
        shape = [int(n) for n in reversed(tensor.shape)]
        dtype = PLAIN.get(type_, type_.name.lower())
        raw = np.ascontiguousarray(tensor.data).tobytes()
        rows.append({"name": tensor.name, "dtype": dtype, "shape": shape, "sha256": hashlib.sha256(raw).hexdigest()})
    return {"source": path.name, "tensors": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, metavar="DIR")
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    for number, case in enumerate((plain, aligned, quantised)):
        folder = args.dir / case.__name__
        folder.mkdir(parents=True)
        path = folder / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        case(writer, np.random.default_rng(SEED + number), args.large)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        expected = expect(path)
        (folder / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")
        print(f"{case.__name__}: {len(expected['tensors'])} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
