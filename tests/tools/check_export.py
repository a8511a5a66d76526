#!/usr/bin/env python3
"""Exports what landed of each source to .npz, .safetensors and shards of it, and compares what numpy and
the safetensors package load with what they load of the source.

What the package itself can write is written by it too, and must be the same file byte for byte.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from compare_landed import Expected, flat, read_sources, safetensors_file, same

MAX_SHARD = 2_000_000
# The package's own writer takes these of numpy.
WRITABLE = {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
            "float16", "float32", "float64", "bfloat16", "complex64"}  # fmt: skip


def main() -> int:
    """Exit status 0 when everything is equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True, type=Path)
    parser.add_argument("sources", nargs="+", type=Path)
    args = parser.parse_args()
    for source in args.sources:
        expected, _, _ = read_sources([source])
        with tempfile.TemporaryDirectory() as temp:
            Check(args.binary, expected, Path(temp)).run(source)
        print(f"{source}: {len(expected)} tensors equal in every export")
    return 0


class Check:
    """The exports of one source."""

    def __init__(self, binary: Path, expected: dict[str, Expected], folder: Path) -> None:
        self.binary = binary
        self.expected = expected
        self.folder = folder

    def run(self, source: Path) -> None:
        """All kinds of export, one after the other."""
        self.program("push", source, "landed")
        self.npz()
        # safetensors has neither big-endian elements nor all of the types.
        fits = {name: e for name, e in self.expected.items() if e.descr[0] != ">" and e.dtype != "complex128"}
        leaving_out = []
        if len(fits) < len(self.expected):
            refused = self.program("export", "landed", "all.safetensors", status=2)
            assert "complex128" in refused and "big-endian" in refused and ".npz" in refused, refused
            leaving_out = ["--exclude", "complex128.*", "--exclude", "*.big_*"]
        self.program("export", "landed", "one.safetensors", *leaving_out)
        self.safetensors([self.folder / "one.safetensors"], fits)
        self.shards(fits, leaving_out)
        self.by_the_package(fits)
        names = {path.name for path in self.folder.iterdir() if path.name.startswith(".")}
        assert not names, f"left behind: {names}"

    def program(self, *words: Any, status: int = 0) -> str:
        """Runs the program; what it says on standard error."""
        words = [self.binary.resolve(), *words[:1], *[str(w) for w in words[1:]]]
        if words[1] == "push":
            words[2] = str(Path(words[2]).resolve())
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == status, f"{words}: {done.returncode}: {done.stderr}"
        return done.stderr

    def npz(self) -> None:
        """As numpy loads it, which must say what it says of a landed file."""
        self.program("export", "landed", "all.npz")
        with np.load(self.folder / "all.npz", allow_pickle=False) as archive:
            members = [name + ".npy" for name in self.expected]
            assert archive.zip.namelist() and set(archive.zip.namelist()) == set(members)
            assert archive.zip.testzip() is None
            for name, e in self.expected.items():
                values = archive[name + ".npy"]
                assert (values.dtype, values.shape) == (np.dtype(e.descr), e.file_shape), (name, values.dtype)
                fortran = values.flags.f_contiguous and not values.flags.c_contiguous
                assert fortran == e.fortran, name
                assert same(flat(values), e.raw), name

    def safetensors(self, files: list[Path], fits: dict[str, Expected]) -> None:
        """As the package loads it, or by its offsets where numpy has no such type."""
        by_library = {True: 0, False: 0}
        found = {e.name: e for file in files for e in safetensors_file(file, by_library)}
        assert set(found) == set(fits)
        for name, e in fits.items():
            assert (found[name].dtype, found[name].shape) == (e.dtype, e.shape), name
            assert same(found[name].raw, c_order(e)), name

    def shards(self, fits: dict[str, Expected], leaving_out: list[str]) -> None:
        """The index must say what is where, and no shard may be too long."""
        self.program("export", "landed", "many.safetensors", "--max-shard", MAX_SHARD, *leaving_out)
        sizes = [e.raw.size for e in fits.values()]
        index_path = self.folder / "many.safetensors.index.json"
        if sum(sizes) <= MAX_SHARD or len(fits) == 1:
            assert not index_path.exists()
            return
        index = json.loads(index_path.read_text())
        files = sorted(set(index["weight_map"].values()))
        count = len(files)
        assert files == [f"many-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
        assert index["metadata"]["total_size"] == sum(sizes)
        self.safetensors([self.folder / name for name in files], fits)
        for name in files:
            header, data_len = header_of(self.folder / name)
            names = set(header) - {"__metadata__"}
            assert names == {tensor for tensor, file in index["weight_map"].items() if file == name}
            assert data_len <= MAX_SHARD or len([n for n in names if fits[n].raw.size]) == 1, name

    def by_the_package(self, fits: dict[str, Expected]) -> None:
        """What the package writes of the same arrays."""
        from safetensors.numpy import save

        one = self.folder / "one.safetensors"
        header, _ = header_of(one)
        metadata = header.get("__metadata__")
        # The package keeps texts in an order that changes.
        if not all(e.dtype in WRITABLE for e in fits.values()) or len(metadata or {}) > 1:
            return
        arrays = {}
        for name, e in fits.items():
            raw = np.ascontiguousarray(c_order(e))
            arrays[name] = np.frombuffer(raw.tobytes(), named(e.dtype)).reshape(e.shape)
        assert save(arrays, metadata) == one.read_bytes(), "the package writes another file"
        print(f"{one.name}: the package writes the same {one.stat().st_size} bytes")


def named(dtype: str) -> np.dtype:
    """A type by its name, also one that numpy itself does not have."""
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, dtype, None) or dtype)


def c_order(e: Expected) -> np.ndarray:
    """The bytes in C order."""
    if not e.fortran:
        return e.raw
    item = np.dtype(f"V{np.dtype(e.descr).itemsize}")
    values = e.raw.view(item).reshape(e.file_shape, order="F")
    return np.frombuffer(values.tobytes(order="C"), np.uint8)


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON of a file and the length of its data."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return json.loads(file.read(length)), path.stat().st_size - 8 - length


if __name__ == "__main__":
    sys.exit(main())
