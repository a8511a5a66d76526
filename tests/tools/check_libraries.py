#!/usr/bin/env python3
"""Pushes checkpoints that large libraries wrote, and compares what lands with what they read.

    check_libraries.py --binary PATH DIR...

Each DIR holds cases of `make_*.py`: a source and `expected.json`. Every source is pushed into a local
folder, with defaults and with three lanes, small chunks and `pread`; every landed `.npy` is opened by numpy and
its name, type, shape and SHA-256 are compared. What is trainable is pushed alone as well, in its order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

WAYS = ([], ["--lanes", "3", "--chunk", "256K", "--read", "pread"])


class Failed(Exception):
    """Something is not as it was."""


def push(binary: Path, source: Path, target: Path, words: list[str]) -> None:
    """Must succeed."""
    command = [binary, "push", source, target, "--format", "quiet", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode != 0:
        raise Failed(f"{source}: exit status {result.returncode}: {result.stderr.strip()}")


def refuse(binary: Path, source: Path, target: Path, words: str) -> None:
    """Must fail with these words."""
    result = subprocess.run([binary, "push", source, target], capture_output=True, text=True, timeout=600)
    if result.returncode == 0 or words not in result.stderr:
        raise Failed(f"{source} is not refused with {words!r}: {result.stderr.strip()}")


def compare(folder: Path, expected: dict[str, Any]) -> int:
    """Every tensor that landed; how many there are."""
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = {row["name"]: row for row in manifest["tensors"]}
    wanted = {row["name"]: row for row in expected["tensors"]}
    if rows.keys() != wanted.keys():
        raise Failed(f"{folder}: landed {sorted(rows.keys() - wanted.keys())}, not {sorted(wanted.keys() - rows.keys())}")
    for name, row in rows.items():
        want = wanted[name]
        for key in ("dtype", "shape", "trainable", "source_name"):
            if key in want and row.get(key) != want[key]:
                raise Failed(f"{name}: {key} is {row.get(key)!r}, not {want[key]!r}")
        values = np.load(folder / row["file"], mmap_mode="r")
        shape = (row["nbytes"],) if row["packed"] else tuple(row["shape"])
        if values.shape != shape or values.dtype != np.dtype(row["npy_descr"]):
            raise Failed(f"{name}: numpy sees {values.dtype} of {values.shape}")
        # Big-endian files keep their order; the values are what counts.
        native = values.astype(values.dtype.newbyteorder("=")) if values.dtype.byteorder == ">" else values
        if hashlib.sha256(np.ascontiguousarray(native).tobytes()).hexdigest() != want["sha256"]:
            raise Failed(f"{name}: the bytes differ")
    if "order" in expected and list(rows) != expected["order"]:
        raise Failed(f"{folder}: the order is {list(rows)}")
    return len(rows)


def check_damage(binary: Path, case: Path, temp: Path) -> None:
    """A byte of the data that differs from what TensorFlow's checksum says must not be published."""
    copy = temp / "damaged"
    shutil.copytree(case, copy)
    data = max(copy.glob("*.data-*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    source = copy / json.loads((case / "expected.json").read_text())["source"]
    result = subprocess.run([binary, "push", source, temp / "never"], capture_output=True, text=True, timeout=600)
    if result.returncode != 6 or (temp / "never").exists():
        raise Failed(f"damaged {data.name}: exit status {result.returncode}: {result.stderr.strip()}")


def check(binary: Path, case: Path, temp: Path) -> int:
    """One case in all ways; how many tensors were compared."""
    expected = json.loads((case / "expected.json").read_text())
    source = case / expected["source"]
    if "refused" in expected:
        refuse(binary, source, temp / "refused", expected["refused"])
        return 0
    if case.name == "dtypes":
        check_damage(binary, case, temp)
    count = 0
    for number, words in enumerate(WAYS):
        push(binary, source, temp / f"way {number}", words)
        count += compare(temp / f"way {number}", expected)
    if "trainable" in expected:
        target = temp / "trainable"
        push(binary, source, target, ["--trainable", "--layout", "indexed"])
        rows = json.loads((target / "manifest.json").read_text())["tensors"]
        if [row["name"] for row in rows] != expected["trainable"]:
            raise Failed(f"{source}: trainable are {[row['name'] for row in rows]}")
        if [row["file"] for row in rows] != [f"weight_{i}.npy" for i in range(len(rows))]:
            raise Failed(f"{source}: files are {[row['file'] for row in rows]}")
        of_these = [row for row in expected["tensors"] if row["name"] in expected["trainable"]]
        count += compare(target, {"tensors": of_these})
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True, type=Path)
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR")
    args = parser.parse_args()
    for folder in args.dirs:
        cases = sorted(path.parent for path in folder.glob("*/expected.json"))
        if not cases:
            raise Failed(f"{folder} holds no cases")
        count = 0
        for case in cases:
            with tempfile.TemporaryDirectory() as temp:
                count += check(args.binary, case, Path(temp))
        print(f"{folder.name}: {len(cases)} sources, {count} tensors compared, all equal")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
