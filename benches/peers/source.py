"""The files that every contender moves, and whether they arrived."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from figures import PIECE, Floats  # noqa: E402

from observe import Failed  # noqa: E402

MAGIC = b"\x93NUMPY\x01\x00"


@dataclass(frozen=True)
class Source:
    """A folder of `.npy` files and nothing else."""

    folder: Path
    paths: tuple[Path, ...]
    whole: Path
    """One file with as many bytes: the only one, or all of them in a row."""
    nbytes: int
    """Of the arrays alone."""


def npy_header(values: int) -> bytes:
    """Of a one-dimensional array of f32, as numpy writes it."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({values},), }}"
    text += " " * (-(len(MAGIC) + 2 + len(text) + 1) % 64) + "\n"
    return MAGIC + struct.pack("<H", len(text)) + text.encode()


def data_offset(path: Path) -> int:
    """Where the values of a `.npy` file begin."""
    with path.open("rb") as file:
        start = file.read(10)
    if len(start) < 10 or start[:8] != MAGIC:
        raise Failed(f"{path.name} is no .npy file of version 1")
    return 10 + struct.unpack("<H", start[8:])[0]


def write(folder: Path, count: int, nbytes: int, seed: int, *, whole: Path | None = None) -> Source:
    """`count` files of together about `nbytes` of random values that no codec makes much smaller.

    With several files, `whole` is where the one file for contenders that move only one goes.
    """
    values = nbytes // count // 4
    if values == 0:
        raise ValueError(f"{nbytes} bytes are too few for {count} files")
    floats = Floats(seed)
    left = b""
    paths = []
    for index in range(count):
        path = folder / f"weight_{index}.npy"
        with path.open("wb") as out:
            out.write(npy_header(values))
            missing = values * 4
            while missing:
                left = left or floats.piece()
                out.write(memoryview(left)[:missing])
                taken = min(missing, len(left))
                left, missing = left[taken:], missing - taken
        paths.append(path)
    if whole:
        with whole.open("wb") as out:
            for path in paths:
                out.writelines(pieces(path))
    return Source(folder, tuple(paths), whole or paths[0], values * 4 * count)


def pieces(path: Path) -> Iterator[bytes]:
    """The values of a file."""
    with path.open("rb") as file:
        file.seek(data_offset(path))
        while piece := file.read(PIECE):
            yield piece


def check_landed(source: Source, folder: Path) -> None:
    """Failed unless every array arrived, to the byte. Headers may differ in their padding."""
    for path in source.paths:
        landed = folder / path.name
        if not landed.is_file():
            raise Failed(f"{path.name} did not arrive")
        length = path.stat().st_size - data_offset(path)
        if landed.stat().st_size - data_offset(landed) != length:
            raise Failed(f"{path.name} has another length")
        for index, (sent, found) in enumerate(zip(pieces(path), pieces(landed), strict=True)):
            if sent != found:
                raise Failed(f"{path.name} differs in the {PIECE} bytes from {index * PIECE}")
