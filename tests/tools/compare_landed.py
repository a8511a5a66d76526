#!/usr/bin/env python3
"""Compares a landed checkpoint with its sources, read by the formats' own libraries.

    compare_landed.py SRC... -- LANDED_DIR

A SRC is a .safetensors file, an index of shards, a .npy file, a file that
read_formats.py knows, or a folder of one kind. The landed files are first opened by numpy alone (nobody has
imported ml_dtypes by then): that is how a user without this project opens them.
Side files of a folder must lie in files/; the index of shards may be left out.
Exit 1 with the first differences when anything is not as it was.
"""

from __future__ import annotations

import argparse
import io
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

SHOWN = 20
PIECE = 16 << 20
TENSOR_KEYS = {
    "index", "name", "source_name", "aliases", "file", "dtype", "npy_descr", "shape",
    "fortran_order", "data_offset", "nbytes", "crc32c",
}  # fmt: skip
FILE_KEYS = {"name", "file", "nbytes", "crc32c"}

# safetensors dtype -> name in the manifest, descr in the .npy file
SAFETENSORS = {
    "BOOL": ("bool", "|b1"), "U8": ("uint8", "|u1"), "I8": ("int8", "|i1"),
    "U16": ("uint16", "<u2"), "I16": ("int16", "<i2"), "U32": ("uint32", "<u4"),
    "I32": ("int32", "<i4"), "U64": ("uint64", "<u8"), "I64": ("int64", "<i8"),
    "F16": ("float16", "<f2"), "F32": ("float32", "<f4"), "F64": ("float64", "<f8"),
    "BF16": ("bfloat16", "<V2"), "C64": ("complex64", "<c8"),
    "F8_E4M3": ("float8_e4m3fn", "|V1"), "F8_E5M2": ("float8_e5m2", "|V1"),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", "|V1"), "F8_E5M2FNUZ": ("float8_e5m2fnuz", "|V1"),
    "F8_E8M0": ("float8_e8m0fnu", "|V1"), "F4": ("float4_e2m1fn", "|u1"),
    "F6_E2M3": ("float6_e2m3fn", "|u1"), "F6_E3M2": ("float6_e3m2fn", "|u1"),
}  # fmt: skip
PACKED = ("F4", "F6_E2M3", "F6_E3M2")


@dataclass
class Expected:
    """What a tensor must look like after the journey."""

    name: str
    dtype: str
    descr: str
    shape: list[int]  # as the manifest says it
    file_shape: tuple[int, ...]  # as the .npy file says it
    fortran: bool
    raw: np.ndarray  # u1, one dimension


@dataclass
class Landed:
    """What numpy alone makes of a landed file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    offset: int
    header: bytes


# ------------------------------------------------------------------- the source


def flat(values: np.ndarray) -> np.ndarray:
    """The bytes of an array in the order in which they lie."""
    return np.ravel(values, order="K").view(np.uint8)


def safetensors_file(path: Path, by_library: dict[bool, int]) -> Iterator[Expected]:
    """Tensors of one shard; by the library for all dtypes that it can give to numpy."""
    from safetensors import safe_open

    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r")[8 + length :]
    with safe_open(path, framework="np") as library:
        if set(library.keys()) != set(header):
            raise SystemExit(f"{path}: the library sees other tensors than the header names")
        for name, info in header.items():
            dtype, descr = SAFETENSORS[info["dtype"]]
            start, end = info["data_offsets"]
            raw, shape, packed = data[start:end], info["shape"], info["dtype"] in PACKED
            try:
                values = library.get_tensor(name)
            except Exception:
                if not info["dtype"].startswith(("F4", "F6", "F8")):
                    raise
                by_library[False] += 1
            else:
                by_library[True] += 1
                if list(values.shape) != shape or values.dtype.name != dtype:
                    raise SystemExit(f"{path}: {name}: the library says {values.dtype}")
                raw = flat(values)
            file_shape = (len(raw),) if packed else tuple(shape)
            yield Expected(name, dtype, descr, shape, file_shape, False, raw)


def npy_file(path: Path, name: str) -> Expected:
    """One array as numpy loads it; what numpy knows as two raw bytes is bfloat16."""
    values = np.load(path, mmap_mode="r")
    dtype, descr = values.dtype.newbyteorder("=").name, values.dtype.str
    if values.dtype == np.dtype("V2"):
        dtype, descr = "bfloat16", "<V2"
    elif values.dtype.kind == "V":
        dtype = f"V{values.dtype.itemsize}"
    fortran = values.flags.f_contiguous and not values.flags.c_contiguous
    shape = values.shape
    return Expected(name, dtype, descr, list(shape), shape, fortran, flat(values))


def readers() -> Any:
    """The other formats; imported late, because ml_dtypes comes with them."""
    import read_formats

    return read_formats


def other_format(found: list[tuple[str, np.ndarray]]) -> Iterator[Expected]:
    """Arrays of one of the formats of read_formats.py."""
    for name, values in found:
        dtype, descr = readers().described(values.dtype)
        fortran = values.flags.f_contiguous and not values.flags.c_contiguous
        raw = np.ascontiguousarray(values.T if fortran else values)
        shape = values.shape
        raw = np.frombuffer(raw.tobytes(), np.uint8)
        yield Expected(name, dtype, descr, list(shape), shape, bool(fortran), raw)


def read_sources(paths: list[Path]) -> tuple[dict[str, Expected], dict[str, Path | bytes], dict[bool, int]]:
    """Every tensor, every side file, and how many tensors the library could give."""
    import ml_dtypes  # noqa: F401  The library needs it for bf16; numpy must not see it earlier.

    tensors: list[Expected] = []
    sides: dict[str, Path | bytes] = {}
    by_library = {True: 0, False: 0}
    for source in paths:
        if source.is_dir() and (whole := readers().folder_tensors(source)) is not None:
            tensors += other_format(whole)
            files = [p for p in sorted(source.iterdir()) if not p.name.startswith(".") and p.suffix != ".distcp"]
        elif source.is_dir():
            files = sorted(p for p in source.rglob("*") if p.is_file())
        elif source.name.endswith(".weights.json"):
            tensors += other_format(readers().indexed(source))
            files = []
        elif source.name.endswith(".index.json"):
            files = readers().shards(source)
        else:
            files = [source]
        for file in files:
            relative = file.relative_to(source).as_posix() if source.is_dir() else file.name
            if file.suffix == ".safetensors":
                tensors += safetensors_file(file, by_library)
            elif file.suffix == ".npy":
                tensors.append(npy_file(file, relative.removesuffix(".npy")))
            elif (found := readers().tensors(file)) is not None:
                tensors += other_format(found)
                sides |= readers().sides(file)
            else:
                sides[relative] = file
    return {t.name: t for t in tensors}, sides, by_library


# ------------------------------------------------------------------ what landed


def open_plainly(path: Path) -> Landed:
    """What a user with nothing but numpy sees."""
    assert "ml_dtypes" not in sys.modules, "numpy must not have help here"
    values = np.load(path, mmap_mode="r")
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0}[version]  # fmt: skip
        shape, fortran, dtype = read(file)
        offset = file.tell()
        file.seek(0)
        header = file.read(offset)
    if shape != values.shape or dtype != values.dtype:
        raise ValueError("mmap and header differ")
    return Landed(dtype, shape, fortran, offset, header)


def numpy_header(expected: Expected) -> bytes:
    """The header that np.save writes for this array (without its data)."""
    values = np.empty(expected.file_shape, np.dtype(expected.descr))  # Never touched.
    if expected.fortran:
        values = values.reshape(expected.file_shape[::-1]).T
    out = io.BytesIO()
    fields = np.lib.format.header_data_from_array_1_0(values)
    np.lib.format.write_array_header_1_0(out, fields)
    return out.getvalue()


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equality in pieces, so that no array of truth values grows large."""
    return a.size == b.size and all(
        np.array_equal(a[i : i + PIECE], b[i : i + PIECE]) for i in range(0, a.size, PIECE)
    )


def crc32c(raw: np.ndarray) -> int:
    """CRC-32C of the bytes."""
    value = 0
    for start in range(0, raw.size, PIECE):
        value = google_crc32c.extend(value, raw[start : start + PIECE].tobytes())
    return value


def number(crc: Any) -> int:
    """The manifest spells a crc as 8 hex digits."""
    return int(crc, 16) if isinstance(crc, str) else int(crc)


class Comparison:
    """Collects differences instead of stopping at the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.differences: list[str] = []
        self.plain: dict[str, Landed] = {}

    def differ(self, name: str, what: str) -> None:
        """Notes one difference."""
        self.differences.append(f"{name}: {what}")

    def rows(self, key: str, keys: set[str]) -> dict[str, dict[str, Any]]:
        """Rows of the manifest by name; all their keys must be there."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.manifest.get(key, []):
            name = str(row.get("name"))
            if keys - row.keys():
                self.differ(name, f"manifest lacks {sorted(keys - row.keys())}")
            elif name in found:
                self.differ(name, "twice in the manifest")
            else:
                found |= dict.fromkeys((name, *row.get("aliases", ())), row)
        return found

    def open_all(self) -> None:
        """Before anything imports ml_dtypes."""
        for row in self.manifest["tensors"]:
            try:
                landed = open_plainly(self.folder / row["file"])
                self.plain |= dict.fromkeys((row["name"], *row["aliases"]), landed)
            except (OSError, ValueError, KeyError) as error:
                self.differ(str(row.get("name")), f"numpy cannot open it: {error}")

    def names(self, kind: str, want: set[str], have: set[str], optional: set[str]) -> set[str]:
        """Names on both sides."""
        for name in sorted(want - have - optional):
            self.differ(name, f"{kind} did not land")
        for name in sorted(have - want):
            self.differ(name, f"{kind} is in no source")
        return want & have

    def tensor(self, want: Expected, row: dict[str, Any]) -> None:
        """One tensor: manifest, header, bytes, checksum."""
        name, landed = want.name, self.plain.get(want.name)
        if landed is None:
            return
        path = self.folder / row["file"]
        for what, is_, should in (
            ("manifest dtype", row["dtype"], want.dtype),
            ("manifest npy_descr", row["npy_descr"], want.descr),
            ("manifest shape", row["shape"], want.shape),
            ("manifest fortran_order", row["fortran_order"], want.fortran),
            ("manifest nbytes", row["nbytes"], want.raw.size),
            ("manifest data_offset", row["data_offset"], landed.offset),
            ("dtype", landed.dtype, np.dtype(want.descr)),
            ("shape", landed.shape, want.file_shape),
            ("fortran_order", landed.fortran, want.fortran),
            ("file size", path.stat().st_size, landed.offset + want.raw.size),
        ):
            if is_ != should:
                self.differ(name, f"{what} is {is_!r}, not {should!r}")
        if want.descr[1] != "V" and landed.header != numpy_header(want):
            self.differ(name, f"header {landed.header!r} is not what np.save writes")
        if not same(flat(np.load(path, mmap_mode="r")), want.raw):
            self.differ(name, "the bytes differ")
        self.crc(name, row, want.raw)

    def side(self, name: str, source: Path | bytes, row: dict[str, Any]) -> None:
        """One side file."""
        path = self.folder / row["file"]
        raw = source if isinstance(source, bytes) else source.read_bytes()
        if not row["file"].startswith("files/"):
            self.differ(name, f"lies at {row['file']}, not in files/")
        if not path.is_file() or path.read_bytes() != raw or row["nbytes"] != len(raw):
            self.differ(name, "the side file differs")
        self.crc(name, row, np.frombuffer(raw, np.uint8))

    def crc(self, name: str, row: dict[str, Any], raw: np.ndarray) -> None:
        """The checksum in the manifest."""
        if number(row["crc32c"]) != crc32c(raw):
            self.differ(name, f"crc32c is {row['crc32c']}, not {crc32c(raw):08x}")

    def strays(self) -> None:
        """Files that the manifest does not know."""
        known = {row["file"] for key in ("tensors", "files") for row in self.manifest.get(key, [])}
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            relative = path.relative_to(self.folder).as_posix()
            if relative not in known | {"manifest.json"}:
                self.differ(relative, "landed, but is not in the manifest")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s [-h] SRC... -- LANDED_DIR",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", type=Path, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if len(args.paths) < 2:
        parser.error("needs at least one SRC and the LANDED_DIR")
    *sources, folder = args.paths
    comparison = Comparison(folder)
    comparison.open_all()
    wanted, wanted_sides, by_library = read_sources(sources)
    rows = comparison.rows("tensors", TENSOR_KEYS)
    for name in sorted(comparison.names("tensor", set(wanted), set(rows), set())):
        comparison.tensor(wanted[name], rows[name])
    sides = comparison.rows("files", FILE_KEYS)
    optional = {name for name in wanted_sides if name.endswith((".index.json", ".weights.json")) or name.startswith(".")}
    equal_sides = comparison.names("side file", set(wanted_sides), set(sides), optional)
    for name in sorted(equal_sides):
        comparison.side(name, wanted_sides[name], sides[name])
    comparison.strays()
    for difference in comparison.differences[:SHOWN]:
        print(difference, file=sys.stderr)
    if len(comparison.differences) > SHOWN:
        print(f"… and {len(comparison.differences) - SHOWN} more", file=sys.stderr)
    if comparison.differences:
        return 1
    print(f"{len(wanted)} tensors, {len(equal_sides)} files equal", end="")
    if any(by_library.values()):
        print(f" ({by_library[True]} read by safetensors, {by_library[False]} raw)", end="")
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
