"""Checkpoints back into the objects that they are of."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import tempfile
from typing import Any

import numpy as np

from ._checkpoint import Checkpoint
from ._convert import Named, _library, named
from ._dtypes import ML_DTYPES, dtype_of
from ._errors import FerryError, usage
from ._transfer import Path, pull

# Names in the text of an error.
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What :func:`load_into` assigned."""

    tensors: int
    bytes: int
    missing: tuple[str, ...]
    """Tensors of the model that the checkpoint does not have; only without ``strict``."""
    unused: tuple[str, ...]
    """Tensors of the checkpoint that the model does not have."""


def load_into(
    model: Any,
    src: Path,
    *,
    folder: Path | None = None,
    strict: bool = True,
    cast: bool = False,
    trainable: bool = False,
    progress: Any = None,
    **transfer: Any,
) -> Loaded:
    """Assigns a checkpoint to a model, by the names that :func:`save` gives.

    ``model``: all that ``save`` takes whose tensors can be assigned: Keras and TensorFlow
    variables, modules of PyTorch, dicts and lists of numpy arrays. ``src``: a landed folder, or
    ``"ferry://host/name"`` or ``"host:name"``, which is pulled into ``folder`` and stays there;
    without ``folder`` it goes to a temporary one. A ``folder`` that has another checkpoint by then
    needs ``overwrite=True``, one of the options of :func:`pull` that are handed on.

    Nothing is assigned when a tensor is missing (unless ``strict`` is false), has another shape,
    or another type (unless ``cast`` is true). Types that come as raw bytes (those of ml_dtypes where
    it is not installed, and packed ones) are never converted.
    """
    targets = named(model, trainable=trainable)
    if not targets:
        raise usage(f"{type(model).__name__} has no tensors", "build the model first, such as by calling it once")
    if not _is_address(os.fspath(src)):
        return _assign(targets, Checkpoint(src), strict, cast)
    if folder is not None:
        pull(os.fspath(src), folder, progress=progress, **transfer)
        return _assign(targets, Checkpoint(folder), strict, cast)
    with tempfile.TemporaryDirectory(prefix="tensorferry-") as temporary:
        landed = os.path.join(temporary, "checkpoint")
        pull(os.fspath(src), landed, progress=progress, **transfer)
        return _assign(targets, Checkpoint(landed), strict, cast)


def _is_address(src: str) -> bool:
    # As in every destination: a colon before the first slash, or a URL.
    return re.match(r"^([a-z]+://|\[[^/]*\]:|[^/:\[]+:)", src) is not None


def _assign(targets: list[Named], checkpoint: Checkpoint, strict: bool, cast: bool) -> Loaded:
    missing = [target.name for target in targets if target.name not in checkpoint]
    if missing and strict:
        raise FerryError(
            f"{checkpoint.path} lacks {len(missing)} of {len(targets)} tensors: {_some(missing)}",
            code="source-missing", exit_code=3, tensor=missing[0],
            hint=f"it has {_some(list(checkpoint))}; strict=False leaves missing ones as they are",
        )
    found = [target for target in targets if target.name in checkpoint]
    # All are looked at before the first is changed.
    for target in found:
        _check(target, checkpoint[target.name], checkpoint.info(target.name)["dtype"], cast)
    count = 0
    for target in found:
        array = checkpoint[target.name]
        _set(target.value, array)
        count += array.nbytes
    wanted = {target.name for target in targets}
    unused = tuple(name for name in checkpoint if name not in wanted)
    return Loaded(len(found), count, tuple(missing), unused)


def _check(target: Named, array: np.ndarray, stored: str, cast: bool) -> None:
    """``stored`` is the type that the manifest says; the array may have nothing but its bytes."""
    shape = tuple(target.value.shape)
    if shape != array.shape:
        raise usage(f"{target.name!r} has shape {list(array.shape)} in the checkpoint and {list(shape)} here")
    here = _dtype_name(target.value)
    if here != array.dtype.name and (hint := _why_raw(array, stored, here)):
        raise usage(f"{target.name!r} has type {stored} in the checkpoint and {here} here", hint)
    if here != array.dtype.name and not cast:
        raise usage(
            f"{target.name!r} has type {array.dtype.name} in the checkpoint and {here} here",
            "cast=True converts",
        )
    if isinstance(target.value, np.ndarray) and not target.value.flags.writeable:
        raise usage(f"{target.name!r} cannot be written to")


def _why_raw(array: np.ndarray, stored: str, here: str) -> str | None:
    """Why the numbers of an array cannot become those of a target, and what can be done."""
    if array.dtype.name.startswith("void") and stored in ML_DTYPES:
        return "without ml_dtypes, or with one that is too old, only raw bytes can be had: pip install -U ml_dtypes"
    if array.dtype.name.startswith("void") or here.startswith("void") or dtype_of(stored) is None:
        return "there is no conversion: load into an array of the same raw type"
    return None


def _dtype_name(value: Any) -> str:
    dtype = value.dtype
    name = getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")
    return name


def _set(value: Any, array: np.ndarray) -> None:
    if isinstance(value, np.ndarray):
        np.copyto(value, array, casting="unsafe")
    elif _library(value) == "torch":
        torch = sys.modules["torch"]
        if array.dtype.name == "bfloat16":
            source = torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
        else:
            source = torch.from_numpy(np.array(array))
        with torch.no_grad():
            value.copy_(source)
    elif hasattr(value, "assign"):
        value.assign(np.asarray(array).astype(_numpy_dtype(value, array), copy=False))
    else:
        raise usage(f"{type(value).__name__} cannot be assigned to")


def _numpy_dtype(value: Any, array: np.ndarray) -> np.dtype:
    dtype = getattr(value.dtype, "as_numpy_dtype", None)
    if dtype is not None:
        return np.dtype(dtype)
    return dtype_of(_dtype_name(value)) or array.dtype


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown + ", …" if len(names) > _SHOWN else shown
