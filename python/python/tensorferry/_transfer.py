"""Pushes and pulls of files, and what every transfer has."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from . import _native
from ._errors import FerryError
from ._progress import Progress, reporter

__all__ = ["Progress", "Report", "pull", "push"]

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a finished transfer did. All bytes are raw bytes unless said otherwise."""

    checkpoint: str
    """Name of the checkpoint, or its folder."""
    tensors: int
    files: int
    bytes: int
    """Of the whole checkpoint."""
    wire_bytes: int
    """Payload that this call moved, as it went over the wire."""
    resumed_bytes: int
    """What was there before and did not travel."""
    seconds: float
    sessions: int
    durability: str
    """``"disk"``: it survives a loss of power; ``"process"``: it does not."""
    unchanged: bool
    """The very same checkpoint stood there already."""
    lanes: int
    codec: str | None
    bottleneck: str | None
    """The stage that limited the transfer, such as ``"disk"``."""
    bottleneck_side: str | None
    copied_bytes: int = 0
    """Bytes that were copied before they could be lent: arrays with gaps, other devices."""
    copied: tuple[str, ...] = ()
    """Names of these tensors."""


def options(**given: Any) -> dict[str, Any]:
    """All options of the native module, by name."""
    known: dict[str, Any] = {
        "include": (),
        "exclude": (),
        "trainable": False,
        "rename": (),
        "first": (),
        "codec": "auto",
        "lanes": None,
        "overwrite": False,
        "restart": False,
        "verify": False,
        "durability": "group",
        "retries": None,
        "bwlimit": None,
        "layout": "named",
        "out_format": "npy",
        "npy_dtype": "bytes",
        "max_bytes": None,
    }
    if unknown := given.keys() - known.keys():
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
    known.update(given)
    for name in ("include", "exclude", "first"):
        known[name] = texts(name, known[name])
    rename = known["rename"]
    if isinstance(rename, dict):
        rename = [f"{old}={new}" for old, new in rename.items()]
    known["rename"] = texts("rename", rename)
    if known["bwlimit"] is not None:
        known["bwlimit"] = str(known["bwlimit"])
    if known["lanes"] == "auto":
        known["lanes"] = None
    if known["max_bytes"] is not None:
        known["max_bytes"] = size("max_bytes", known["max_bytes"])
    return known


_UNITS = {"": 1, "b": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgt", 1)
    for unit, base in ((letter, 1 << 10), (letter + "ib", 1 << 10), (letter + "b", 1000))
}


def size(name: str, given: str | int) -> int:
    """Bytes, such as ``"20G"``."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", str(given).strip().lower())
    if isinstance(given, bool) or not found or found[2] not in _UNITS:
        raise ValueError(f'{name} is a number of bytes, such as 1000000, "20G" or "8MiB", not {given!r}')
    number = float(found[1]) if "." in found[1] else int(found[1])
    return int(number * _UNITS[found[2]])


_Call = TypeVar("_Call", bound=Callable[..., Any])


def public(call: _Call) -> _Call:
    """Without what this package alone gives, in ``help()``."""
    signature = inspect.signature(call)
    shown = [parameter for name, parameter in signature.parameters.items() if not name.startswith("_")]
    call.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return call


def texts(name: str, given: str | Iterable[str]) -> list[str]:
    """A list of strings; one alone is no list of letters."""
    found = [given] if isinstance(given, str) else list(given)
    for text in found:
        if not isinstance(text, str):
            raise TypeError(f"{name} has strings, not {type(text).__name__}")
    return found


def finish(
    transfer: Any,
    progress: Any = None,
    on_start: Callable[[Any], None] | None = None,
    **known: Any,
) -> Report:
    """Waits for a native transfer. Ctrl-C stops it in good order: what has arrived stays."""
    if on_start is not None:
        on_start(transfer)
    with reporter(progress) as tell:
        return Report(**transfer.wait(tell), **known)


@public
def push(
    src: Path | Iterable[Path],
    dest: Path,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    trainable: bool = False,
    rename: Iterable[str] | dict[str, str] = (),
    first: Iterable[str] = (),
    codec: str = "auto",
    lanes: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = False,
    durability: str = "group",
    retries: int | None = None,
    bwlimit: str | int | None = None,
    layout: str = "named",
    out_format: str = "npy",
    npy_dtype: str = "bytes",
    progress: Any = None,
    _on_start: Callable[[Any], None] | None = None,
) -> Report:
    """Sends a checkpoint on disk to a server or into a local folder, and waits for it.

    ``src``: a file or folder of any known format (safetensors, npy, npz, PyTorch, TensorFlow,
    Keras, HDF5, GGUF, ONNX), or a list of files. ``dest``: ``"ferry://host[:port]/name"``,
    ``"host:name"``, or a folder of this machine.

    ``include`` and ``exclude`` choose tensors by patterns with ``*`` and ``?``; ``trainable``
    takes only those that the source calls so; ``rename`` has ``"OLD=NEW"``, or a dict; tensors
    with names like one of ``first`` go before the others, and are durable before these are there.

    How it travels: ``codec`` is ``"auto"`` (LZ4 where it helps), ``"lz4"`` or ``"none"``;
    ``lanes`` the number of connections, 1 to 16, by default as many as bring clearly more;
    ``bwlimit`` bytes a second, such as ``"10M"``; ``retries`` how many attempts in a row may make
    nothing durable before :class:`RetryableError` is raised, by default 5.

    What lands: ``layout`` names files after their tensors (``"named"``) or by number
    (``"indexed"``); ``out_format`` is ``"npy"``, or ``"safetensors"`` for one file of all tensors;
    ``npy_dtype`` writes the types that numpy does not have, such as ``bfloat16``, as so many bytes
    (``"bytes"``, which every numpy opens) or by name (``"named"``, which needs ``ml_dtypes``).

    How safe: ``durability`` says how often written bytes become durable: ``"strict"`` every 8 MiB,
    ``"group"`` at 128 MiB or half a second, ``"end"`` once before publishing, ``"none"`` never, so
    that a loss of power may cost everything. ``verify`` has the receiver read all back before it
    publishes. ``overwrite`` replaces what is published under the name, ``restart`` throws
    unfinished work of that name away first.

    ``progress`` is ``True``, a callable that takes a :class:`Progress`, or a ``fsspec`` callback.

    The same call made again goes on where it stopped. Raises :class:`FerryError`.
    """
    sources = [src] if isinstance(src, (str, os.PathLike)) else list(src)
    chosen = options(
        include=include, exclude=exclude, trainable=trainable, rename=rename, first=first, codec=codec,
        lanes=lanes, overwrite=overwrite, restart=restart, verify=verify, durability=durability,
        retries=retries, bwlimit=bwlimit, layout=layout, out_format=out_format, npy_dtype=npy_dtype,
    )
    transfer = _native.push([os.fspath(path) for path in sources], os.fspath(dest), chosen)
    return finish(transfer, progress, _on_start)


@public
def pull(
    url: str,
    folder: Path,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    max_bytes: str | int | None = None,
    first: Iterable[str] = (),
    codec: str = "auto",
    lanes: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = False,
    durability: str = "group",
    retries: int | None = None,
    bwlimit: str | int | None = None,
    layout: str = "named",
    out_format: str = "npy",
    npy_dtype: str = "bytes",
    progress: Any = None,
    _on_start: Callable[[Any], None] | None = None,
) -> Report:
    """Fetches a checkpoint of a server into a folder of this machine, and waits for it.

    ``url``: ``"ferry://host[:port]/name"`` or ``"host:name"``. ``max_bytes`` refuses a larger
    checkpoint before anything of it arrives: bytes, such as ``"20G"``. ``first`` is an order only:
    the program, ``tensorferry pull --ready``, tells where tensors lie as soon as they are complete.
    The other options are those of :func:`push`.
    """
    chosen = options(
        include=include, exclude=exclude, max_bytes=max_bytes, first=first, codec=codec, lanes=lanes,
        overwrite=overwrite, restart=restart, verify=verify, durability=durability, retries=retries,
        bwlimit=bwlimit, layout=layout, out_format=out_format, npy_dtype=npy_dtype,
    )
    transfer = _native.pull(os.fspath(url), os.fspath(folder), chosen)
    try:
        return finish(transfer, progress, _on_start)
    except FerryError as error:
        if error.code == "no-space" and max_bytes is not None:
            error.hint = "raise max_bytes=, or take a part of it with include=; or free space here"
        raise
