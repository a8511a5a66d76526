"""Landed checkpoints: opened and mapped, looked at, verified."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from . import _native
from ._dtypes import dtype_of
from ._errors import IntegrityError, usage
from ._inside import open_inside
from ._transfer import Path, options


class Checkpoint(Mapping):
    """A landed folder: names of tensors and their arrays, in the order of the manifest.

    Arrays are read-only ``numpy.memmap``: what is not touched is not read. Types that numpy
    does not have come through ``ml_dtypes`` where that is installed, else as raw bytes of the
    same width (``V2``); packed types and those in blocks are the bytes of the file. Bytes are
    not verified here; :func:`verify` does that. A manifest that names anything but regular files
    in its folder raises :class:`IntegrityError`: no link is followed.

    >>> checkpoint = tensorferry.open("/data/run7")
    >>> checkpoint["decoder/kernel"].shape
    (4096, 4096)
    """

    def __init__(self, path: Path) -> None:
        self.path = pathlib.Path(path)
        """The folder."""
        _native.check_manifest(self.path)
        self.manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_bytes())
        """All that ``manifest.json`` says."""
        self._tensors = {tensor["name"]: tensor for tensor in self.manifest["tensors"]}
        self._aliases = {
            alias: tensor
            for tensor in reversed(self.manifest["tensors"])
            for alias in tensor["aliases"]
        }

    @property
    def name(self) -> str:
        """The name it was published under."""
        return self.manifest["checkpoint"]

    @property
    def metadata(self) -> dict[str, str]:
        """Free text of the source."""
        return self.manifest["source"]["metadata"]

    @functools.cached_property
    def trainable(self) -> tuple[str, ...]:
        """Names of the tensors that the source says are trainable."""
        return tuple(name for name, tensor in self._tensors.items() if tensor.get("trainable"))

    @functools.cached_property
    def files(self) -> dict[str, pathlib.Path]:
        """Side files, such as ``config.json``, and where they are."""
        for file in self.manifest["files"]:
            # One that is gone is for whoever opens it to find out.
            with contextlib.suppress(FileNotFoundError):
                open_inside(self.path, file["file"], file["name"]).close()
        return {file["name"]: self.path / file["file"] for file in self.manifest["files"]}

    def info(self, name: str) -> dict[str, Any]:
        """What the manifest says of a tensor, by its name or an alias."""
        tensor = self._tensors.get(name) or self._aliases.get(name)
        if tensor is None:
            raise KeyError(name)
        return tensor

    def __getitem__(self, name: str) -> np.memmap:
        return _map(self.path, self.info(name))

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *raised: object) -> None:
        """Does nothing: an array keeps its own map."""

    def __repr__(self) -> str:
        return f"<tensorferry.Checkpoint {str(self.path)!r}: {len(self)} tensors>"


def _map(folder: pathlib.Path, tensor: dict[str, Any]) -> np.memmap:
    with open_inside(folder, tensor["file"], tensor["name"]) as stream:
        return _map_open(stream, folder / tensor["file"], tensor)


def _map_open(stream: io.BufferedReader, file: pathlib.Path, tensor: dict[str, Any]) -> np.memmap:
    dtype, shape = dtype_of(tensor["dtype"]), tuple(tensor["shape"])
    if dtype is None:
        # As the file has them; a file that tensors share has a run of bytes.
        dtype = np.dtype(np.uint8)
        shape = _npy_shape(stream) if file.suffix == ".npy" else (tensor["nbytes"],)
    elif tensor["byteorder"] == "big":
        dtype = dtype.newbyteorder(">")
    order: Literal["C", "F"] = "F" if tensor["fortran_order"] else "C"
    size = os.fstat(stream.fileno()).st_size
    if size < tensor["data_offset"] + tensor["nbytes"]:
        raise IntegrityError(
            f"{tensor['name']!r} is damaged: {file} has {size} bytes, "
            f"{tensor['data_offset'] + tensor['nbytes']} were expected",
            code="integrity", exit_code=6, tensor=tensor["name"], offset=size,
        )
    if tensor["nbytes"] == 0:
        # Nothing cannot be mapped.
        empty = np.zeros(shape, dtype, order)
        empty.flags.writeable = False
        return empty.view(np.memmap)
    mapped = np.memmap(stream, dtype, "r", tensor["data_offset"], shape, order)
    mapped.filename = file.resolve()  # type: ignore[assignment]
    return mapped


def _npy_shape(stream: io.BufferedReader) -> tuple[int, ...]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)[0]


def open(path: Path) -> Checkpoint:
    """Opens a folder that tensorferry has landed. Looks at no file but the manifest."""
    return Checkpoint(path)


def inspect(path: Path, *, include=(), exclude=(), trainable: bool = False, rename=()) -> dict[str, Any]:
    """What is in a checkpoint of any format, by its headers: ``format``, ``metadata``,
    ``total_bytes``, ``tensors`` (each with ``name``, ``dtype``, ``shape``, ``nbytes``, …) and
    ``files``. Of ``"ferry://host/name"`` it gives the manifest on the server.
    """
    if str(path).startswith("ferry://"):
        authority, _, name = str(path)[len("ferry://") :].partition("/")
        if not name:
            raise usage(f"{path} names no checkpoint")
        return json.loads(_native.describe(authority, name.strip("/")))
    chosen = options(include=include, exclude=exclude, trainable=trainable, rename=rename)
    return _native.inspect([os.fspath(path)], chosen)


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found."""

    files: int
    """Files that were looked at."""
    bytes: int
    """Raw bytes that the manifest promises."""
    damages: tuple[tuple[str, str, str], ...]
    """Tensor, file, and what was expected and found; none when all is whole."""

    @property
    def ok(self) -> bool:
        return not self.damages

    def raise_for_damage(self) -> None:
        """Raises :class:`IntegrityError` for the first damage."""
        for name, file, why in self.damages:
            message = f"{name!r} is damaged: {file}: {why}"
            raise IntegrityError(message, code="integrity", exit_code=6, tensor=name)


def verify(path: Path) -> VerifyReport:
    """Reads every byte of a landed folder again and compares lengths, headers and checksums
    with the manifest."""
    found = _native.verify(os.fspath(path))
    return VerifyReport(found["files"], found["bytes"], tuple(found["damages"]))
