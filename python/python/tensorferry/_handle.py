"""Saves that go on while the caller does something else."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from ._convert import Named, lent, named
from ._save import begin
from ._transfer import Path, Report, finish


class Cancel:
    """Cancels whatever runs for one call, or what will run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: Any = None
        self._cancelled = False

    def on_start(self, running: Any) -> None:
        """Takes the native push or transfer that runs now."""
        with self._lock:
            self._running = running
            cancelled = self._cancelled
        if cancelled:
            running.cancel()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            running = self._running
        if running is not None:
            try:
                running.cancel()
            except RuntimeError:
                # A push that turns into a transfer just now: that one is told by on_start.
                pass


class Handle:
    """A save that runs in the background. Awaitable. A process waits for it before it ends."""

    def __init__(self, run: Callable[[Cancel], Report], name: str) -> None:
        self._cancel = Cancel()
        self._future: concurrent.futures.Future[Report] = concurrent.futures.Future()
        self._future.set_running_or_notify_cancel()
        threading.Thread(target=self._run, args=(run,), name=f"tensorferry {name}").start()

    def _run(self, run: Callable[[Cancel], Report]) -> None:
        try:
            self._future.set_result(run(self._cancel))
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            self._future.set_exception(error)

    def result(self, timeout: float | None = None) -> Report:
        """Waits for the end, ``timeout`` seconds at most; raises what the save raised, or
        ``TimeoutError``."""
        with _timeouts():
            return self._future.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As :meth:`result`, but gives what was raised."""
        with _timeouts():
            return self._future.exception(timeout)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def cancel(self) -> None:
        """Stops in good order: nothing is published, and what has arrived is kept for the
        next save of the same key. :meth:`result` raises then."""
        self._cancel.cancel()

    def add_done_callback(self, callback: Callable[[Handle], Any]) -> None:
        """Calls this with the handle at the end, from the thread of the save, or at once."""
        self._future.add_done_callback(lambda _future: callback(self))

    def __await__(self) -> Generator[Any, None, Report]:
        import asyncio

        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()


@contextlib.contextmanager
def _timeouts() -> Iterator[None]:
    # Until Python 3.10 that of futures was another.
    try:
        yield
    except concurrent.futures.TimeoutError as error:
        if isinstance(error, TimeoutError):
            raise
        raise TimeoutError("the save goes on") from None


def save_async(
    obj: Any,
    dest: Path,
    *,
    snapshot: bool = True,
    trainable: bool = False,
    name: str = "tensor",
    metadata: Mapping[str, str] | None = None,
    detect_mutation: bool = True,
    key: str | None = None,
    progress: Any = None,
    **transfer: Any,
) -> Handle:
    """As :func:`save`, but returns before anything has arrived, with a :class:`Handle`.

    With ``snapshot`` all tensors are copied first, which takes as much memory as they have, and
    the caller may go on changing them. Without, they are summed first, at the speed of memory,
    and must stay as they are until the handle is done: ``detect_mutation`` finds out when they
    did not. Variables of TensorFlow need no snapshot: TensorFlow makes a new buffer before it
    changes one that is lent.

    >>> handle = tensorferry.save_async(model, "lab:run7/step-900")
    >>> train()
    >>> handle.result()
    """
    items = named(obj, trainable=trainable, name=name)
    if snapshot:
        items = [_copied(item) for item in items]
        # Nobody else has the copies.
        detect_mutation = False

    # All is lent and summed before the caller goes on.
    running, known = begin(items, dest, metadata, detect_mutation, key, transfer)

    def run(cancel: Cancel) -> Report:
        return finish(running, progress, cancel.on_start, **known)

    return Handle(run, str(dest))



def _copied(item: Named) -> Named:
    tensor = lent(item.name, item.value)
    # What another library copied may still be known to it.
    if not tensor.is_fresh:
        tensor = dataclasses.replace(tensor, array=tensor.array.copy(), is_fresh=True)
    # It is no copy that the caller need hear of.
    return Named(item.name, dataclasses.replace(tensor, copied_bytes=0), item.trainable)
