"""Who is told how far a transfer is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


class Progress(dict):
    """Where a transfer stands: a dict whose keys are attributes too.

    ``stage`` (``connecting``, ``waiting``, ``sending``, ``publishing``, ``done``),
    ``total_bytes``, ``durable_bytes`` (they survive a crash of the receiver),
    ``settled_bytes`` (durable or only written), ``wire_bytes``, ``resumed_bytes``, ``sessions``.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


Tell = Callable[[dict[str, Any]], Any]


@contextlib.contextmanager
def reporter(progress: Any) -> Iterator[Tell | None]:
    """What the waiting thread calls, at most ten times a second and once at the end."""
    if progress is None or progress is False:
        yield None
    elif progress is True:
        with _bar() as tell:
            yield tell
    elif hasattr(progress, "set_size") and hasattr(progress, "absolute_update"):
        yield _callback(progress)
    elif callable(progress):
        yield lambda state: progress(Progress(state))
    else:
        raise TypeError("progress is True, a callable, or a callback of fsspec")


def _callback(callback: Any) -> Tell:
    size = None

    def tell(state: dict[str, Any]) -> None:
        nonlocal size
        if state["total_bytes"] != size:
            size = state["total_bytes"]
            callback.set_size(size)
        callback.absolute_update(state["settled_bytes"])

    return tell


@contextlib.contextmanager
def _bar() -> Iterator[Tell]:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        with _line() as tell:
            yield tell
        return
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def tell(state: dict[str, Any]) -> None:
            bar.total = state["total_bytes"] or None
            bar.set_description_str(state["stage"], refresh=False)
            # Written again after a lost connection, it goes back.
            bar.n = state["settled_bytes"]
            bar.refresh()

        yield tell


@contextlib.contextmanager
def _line() -> Iterator[Tell]:
    def tell(state: dict[str, Any]) -> None:
        settled, total = state["settled_bytes"], state["total_bytes"]
        share = f"{100 * settled / total:5.1f} %" if total else "      "
        print(f"\r{state['stage']:10} {share} {settled / 2**20:,.1f} MiB", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        print(file=sys.stderr)
