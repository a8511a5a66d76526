#!/usr/bin/env python3
"""Pushes safetensors files with `--out-format safetensors` and with `--npy-dtype named`, through a server and
into a local folder, and compares what landed with the source: bytes by the header, values by the real library."""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy the names of bfloat16 and the small floats)
import numpy as np
import safetensors
from harness import Server, free_port

FOREIGN_TO_NUMPY = ("BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
PACKED = ("F4", "F6_E2M3", "F6_E3M2")


def main() -> int:
    """Exit status 0 when everything is equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True, type=Path)
    parser.add_argument("sources", nargs="+", type=Path, help=".safetensors files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        root = Path(temp) / "root"
        root.mkdir()
        with Server(args.binary, root, free_port()) as server:
            for number, source in enumerate(args.sources):
                dest = f"ferry://127.0.0.1:{server.port}/one-{number}"
                flags = ["--chunk", "256K", "--lanes", "3"]
                push(args.binary, source, dest, "--out-format", "safetensors", *flags)
                compare_container(source, root / f"one-{number}")
                local = Path(temp) / f"local {number}"
                push(args.binary, source, str(local), "--out-format", "safetensors")
                compare_container(source, local)
                push(args.binary, source, f"{dest}-named", "--npy-dtype", "named")
                compare_named(source, root / f"one-{number}-named")
    return 0


def push(binary: Path, source: Path, dest: str, *flags: str) -> None:
    """Must succeed."""
    subprocess.run([binary, "push", source, dest, *flags, "--format", "quiet"], check=True)


def read(path: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]:
    """Tensors and free text of a file, by nothing but its header."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    body = data[8 + length :]
    assert max((row["data_offsets"][1] for row in header.values()), default=0) == len(body)
    rows = {
        name: (row["dtype"], row["shape"], body[slice(*row["data_offsets"])]) for name, row in header.items()
    }
    return rows, metadata


def compare_container(source: Path, landed: Path) -> None:
    """One file with the same tensors, which the library takes for one of its own."""
    path = landed / "model.safetensors"
    assert read(path) == read(source), f"{source}: the landed file says something else"
    assert not list(landed.glob("*.npy"))
    manifest = json.loads((landed / "manifest.json").read_text())
    assert {row["file"] for row in manifest["tensors"]} <= {"model.safetensors"}
    count = 0
    with safetensors.safe_open(path, "np") as ours, safetensors.safe_open(source, "np") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        for name in ours.keys():  # noqa: SIM118  (it is no dict)
            if ours.get_slice(name).get_dtype() not in (*FOREIGN_TO_NUMPY, *PACKED):
                assert ours.get_tensor(name).tobytes() == theirs.get_tensor(name).tobytes(), name
                count += 1
    print(f"{source.name}: {len(manifest['tensors'])} tensors in one file, {count} compared by the library")


def compare_named(source: Path, landed: Path) -> None:
    """`.npy` files that numpy opens with their own types."""
    tensors, _ = read(source)
    manifest = json.loads((landed / "manifest.json").read_text())
    named = 0
    for row in manifest["tensors"]:
        array = np.load(landed / row["file"], mmap_mode="r")
        dtype, _, data = tensors[row["name"]]
        assert array.tobytes() == data, row["name"]
        if not row["packed"]:
            assert array.dtype.name == row["dtype"], (row["name"], array.dtype)
        named += dtype in FOREIGN_TO_NUMPY
    print(f"{source.name}: {len(manifest['tensors'])} .npy files, {named} of them of types that ml_dtypes names")


if __name__ == "__main__":
    sys.exit(main())
