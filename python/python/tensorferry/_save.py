"""Saves what is in the memory of this process."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import _native
from ._convert import Named, check, lent, named
from ._errors import usage
from ._progress import Tell, reporter
from ._transfer import Path, Report, options, public

# More bytes copied than this are worth a warning.
_COPY_WORTH_SAYING = 1 << 20
# Seconds between two tellings of the progress, at least.
_TELL = 0.1
# Stands for this process's memory where the caller names nothing better.
_KEY = "tensorferry.save"


class CopyWarning(UserWarning):
    """Tensors had to be copied before they could be sent, which takes as much memory. Given for
    more than 1 MiB in all; ``Report.copied`` names them however few bytes they have."""


@public
def save_file(
    tensors: Mapping[str, Any],
    dest: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    detect_mutation: bool = True,
    key: str | None = None,
    progress: Any = None,
    _on_start: Callable[[Any], None] | None = None,
    **transfer: Any,
) -> Report:
    """Sends arrays by name to a server or into a local folder, and waits for it.

    ``tensors``: arrays of numpy, TensorFlow, PyTorch, JAX, or of anything with DLPack. Their
    memory is lent, not copied, where it is in one piece and on the CPU; ``Report.copied_bytes``
    says how much was not. ``dest`` is as in :func:`push`, ``metadata`` free text for the
    manifest.

    What lands are the values at the time of the call, unless another thread changes them
    meanwhile. With ``detect_mutation`` each tensor is summed before it is sent, and when its
    memory changes after that nothing is published and :class:`SourceChangedError` names it.
    Without, a change on the way goes unnoticed. Never resize a lent array with
    ``resize(refcheck=False)``: its memory would be freed while it is read.

    ``key`` stands for the source: after a crash, the same call with the same key goes on with
    what has arrived, as far as that is equal. A name that is published is taken, as for
    :func:`save`. The other options are those of :func:`push`.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"save_file takes a mapping of names to arrays, not {type(tensors).__name__}; see save")
    items = [Named(str(name), value, _trainable(value)) for name, value in tensors.items()]
    return send(items, dest, metadata, detect_mutation, key, progress, _on_start, transfer)


@public
def save(
    obj: Any,
    dest: Path,
    *,
    trainable: bool = False,
    name: str = "tensor",
    metadata: Mapping[str, str] | None = None,
    detect_mutation: bool = True,
    key: str | None = None,
    progress: Any = None,
    _on_start: Callable[[Any], None] | None = None,
    **transfer: Any,
) -> Report:
    """Sends what a model holds to a server or into a local folder, and waits for it.

    ``obj``: a Keras model or layer (names are the paths of its variables), a ``tf.Module``
    (names of attributes), a ``torch.nn.Module`` (keys of its state dict), a list of variables
    (their names), or dicts, lists and tuples of arrays (keys joined by ``/``); a single array
    is called ``name``. ``trainable`` takes only what is. All else is as in :func:`save_file`.

    A name is published once: a second save under it raises :class:`ExistsError`, also of equal
    values. Give each step a name of its own, or ``overwrite=True``.

    >>> tensorferry.save(model, "lab:run7/step-900", metadata={"step": "900"})
    """
    items = named(obj, trainable=trainable, name=name)
    return send(items, dest, metadata, detect_mutation, key, progress, _on_start, transfer)


def send(
    items: Iterable[Named],
    dest: Path,
    metadata: Mapping[str, str] | None,
    detect_mutation: bool,
    key: str | None,
    progress: Any,
    on_start: Callable[[Any], None] | None,
    given: dict[str, Any],
) -> Report:
    """Adds all tensors and waits."""
    with reporter(progress) as tell:
        transfer, known = begin(items, dest, metadata, detect_mutation, key, given, on_start, tell)
        if on_start is not None:
            on_start(transfer)
        return Report(**transfer.wait(tell), **known)


def begin(
    items: Iterable[Named],
    dest: Path,
    metadata: Mapping[str, str] | None,
    detect_mutation: bool,
    key: str | None,
    given: dict[str, Any],
    on_start: Callable[[Any], None] | None = None,
    tell: Tell | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Lends one tensor after the other; the first travels while the second is summed. A native
    transfer with all of them, and what the report says of copies.

    Raises:
        ValueError: there are no tensors.
    """
    chosen = options_of_save(given)
    for option, text in (metadata or {}).items():
        if not isinstance(option, str) or not isinstance(text, str):
            raise TypeError("metadata has strings only")
    items = list(items)
    if not items:
        raise ValueError(
            "there is nothing to save: no tensor was found. Was an empty dict or None given, "
            "or a model that is not built yet? Call it once first"
        )
    check(items)
    push = _native.open_push(os.fspath(dest), key or _KEY, dict(metadata or {}), chosen)
    copied = _add(push, items, detect_mutation, on_start, tell)
    copied_bytes = sum(copied.values())
    if copied_bytes > _COPY_WORTH_SAYING:
        shown = ", ".join(list(copied)[:3]) + (", …" if len(copied) > 3 else "")
        warnings.warn(
            f"{copied_bytes} bytes of {len(copied)} tensors had to be copied, as they are not in one piece or "
            f"not on the CPU: {shown}",
            CopyWarning,
            stacklevel=4,
        )
    return push.finish(), {"copied_bytes": copied_bytes, "copied": tuple(copied)}


def options_of_save(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a save, for the native module.

    Raises:
        TypeError: an option that does not exist.
        FerryError: one that is for files.
    """
    chosen = options(**given)
    for unfit in ("include", "exclude", "trainable", "rename", "max_bytes"):
        if chosen[unfit]:
            raise usage(f"{unfit}= is for files: choose before you save")
    return chosen


def _add(push: Any, items: Iterable[Named], checked: bool, on_start: Any, tell: Any) -> dict[str, int]:
    """Names and bytes of what had to be copied."""
    copied: dict[str, int] = {}
    told = time.monotonic()
    try:
        if on_start is not None:
            on_start(push)
        for item in items:
            tensor = lent(item.name, item.value)
            if tensor.copied_bytes:
                copied[item.name] = tensor.copied_bytes
            push.add(tensor.meaning, tensor.array, item.trainable, checked)
            if push.has_ended():
                # Why is told at the end.
                break
            if tell is not None and time.monotonic() - told >= _TELL:
                told = time.monotonic()
                tell(push.progress())
    except BaseException:
        push.abandon()
        raise
    return copied


def _trainable(value: Any) -> bool | None:
    found = getattr(value, "trainable", None)
    return found if isinstance(found, bool) else None
