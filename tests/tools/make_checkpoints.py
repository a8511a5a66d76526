#!/usr/bin/env python3
"""Makes small checkpoints with every dtype, odd names and unaligned data.

    DIR/every_dtype_st/    two safetensors shards, their index, side files
    DIR/every_dtype_npy/   .npy files as numpy saves them, odd names
    DIR/one.npy            a single array

The safetensors are written by hand: the library pads its headers to 8 bytes and
cannot write 4 and 6 bit types, and both are what a reader trips over. The bytes
are random with a fixed seed, so two runs make the same files.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

SEED = 20261122
LARGE = 3 * (1 << 20) + 5  # bytes: several cells, and the last one is odd

# Bits per element of every safetensors dtype.
ST_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32,
    "U64": 64, "I64": 64, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

NPY_DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
)  # fmt: skip

Named = list[tuple[str, str, list[int]]]


def write_safetensors(
    path: Path, tensors: Named, rng: np.random.Generator, *, odd: bool, metadata: dict[str, str]
) -> int:
    """One shard; `odd` makes the data begin at an odd offset. Bytes of data."""
    header: dict[str, object] = {"__metadata__": metadata}
    data = bytearray()
    for name, dtype, shape in tensors:
        count = int(np.prod(shape, dtype=np.int64))
        bits = count * ST_BITS[dtype]
        assert bits % 8 == 0, (name, shape)
        raw = rng.integers(0, 2 if dtype == "BOOL" else 256, bits // 8, dtype=np.uint8)
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw.tobytes()
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * ((1 - len(text)) % 2 if odd else -len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return len(data)


def every_dtype_st(folder: Path, rng: np.random.Generator) -> None:
    """Every safetensors dtype twice, in shards of different alignment."""
    folder.mkdir(parents=True)
    shards: list[Named] = [[], []]
    for number, dtype in enumerate(ST_BITS):
        packed = ST_BITS[dtype] < 8
        shards[number % 2].append((f"{dtype.lower()}.matrix", dtype, [5, 8] if packed else [5, 7]))
        shards[1 - number % 2].append((f"{dtype.lower()}.empty", dtype, [0, 3]))
        if not packed:
            shards[1].append((f"{dtype.lower()}.scalar", dtype, []))
    shards[0] += [
        ("large.f32", "F32", [3 << 10, 256]),
        ("large.u8", "U8", [LARGE]),
        ("exactly_two_mib", "BF16", [1024, 1024]),
    ]
    shards[1] += [
        ("large.odd_start", "U8", [LARGE]),
        ("large.bf16", "BF16", [LARGE // 2]),
        ("large.f4", "F4", [2, LARGE]),
        ("large.f8", "F8_E4M3", [LARGE]),
        ("net/d1/kernel:0", "F16", [3, 2, 1]),
        ("名前 with space", "I16", [2, 2]),
        ("Case", "U8", [1]),
        ("case", "U8", [1]),
        ("x" * 300, "U8", [2]),
        ("deep", "U8", [1] * 31 + [2]),
    ]
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        metadata = {"format": "pt", "note": "ünï\n\"quoted\""}
        total += write_safetensors(
            folder / name, tensors, rng, odd=number == 2, metadata=metadata
        )
        weight_map |= {tensor: name for tensor, _, _ in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text('{"model_type": "every-dtype"}\n')
    (folder / "my notes.txt").write_bytes(b"")  # zero-size, and a space in its name
    (folder / "tokenizer.model").write_bytes(rng.bytes(LARGE))


def array(dtype: np.dtype, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random bytes as an array."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = rng.integers(0, 2 if dtype.kind == "b" else 256, size, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def every_dtype_npy(folder: Path, rng: np.random.Generator) -> None:
    """Every numpy dtype in every form that changes the header."""
    folder.mkdir(parents=True)
    types = [np.dtype(name) for name in NPY_DTYPES] + [np.dtype(ml_dtypes.bfloat16)]
    files: dict[str, np.ndarray] = {}
    for dtype in types:
        files[f"{dtype.name}.matrix"] = array(dtype, (5, 7), rng)
        files[f"{dtype.name}.scalar"] = array(dtype, (), rng)
        files[f"{dtype.name}.empty"] = array(dtype, (0, 3), rng)
        files[f"{dtype.name}.fortran"] = np.asfortranarray(array(dtype, (4, 3, 2), rng))
        if dtype.kind in "iufc" and dtype.itemsize > 1:
            big = dtype.newbyteorder(">")
            files[f"{dtype.name}.big_endian"] = array(big, (3, 3), rng)
            files[f"{dtype.name}.big_fortran"] = np.asfortranarray(array(big, (3, 5), rng))
    u1, f4 = np.dtype("u1"), np.dtype("f4")
    files |= {
        "large": array(u1, (LARGE,), rng),
        "large fortran": np.asfortranarray(array(f4, (1031, 701), rng)),
        "über größe 名前": array(f4, (3,), rng),
        "Foo": array(f4, (2,), rng),
        "foo": array(f4, (2,), rng),
        "with:colon": array(u1, (1,), rng),
        "CON": array(u1, (1,), rng),
        "per%cent~tilde": array(u1, (1,), rng),
        "x" * 240: array(u1, (1,), rng),
        "deep": array(u1, (1,) * 31 + (2,), rng),
    }
    for name, value in files.items():
        path = folder / f"{name}.npy"
        if path.exists():  # Where case is folded, Foo and foo are one file.
            print(f"left out, this file system folds case: {path.name}", file=sys.stderr)
            continue
        np.save(path, value)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="the two folders must not exist")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    every_dtype_st(args.dir / "every_dtype_st", rng)
    every_dtype_npy(args.dir / "every_dtype_npy", rng)
    np.save(args.dir / "one.npy", array(np.dtype("f4"), (1000, 1001), rng))
    return 0


if __name__ == "__main__":
    sys.exit(main())
