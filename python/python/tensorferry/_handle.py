"""Saves that go on while the caller does something else."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from ._convert import Named, lent, named
from ._errors import FerryError
from ._save import begin
from ._transfer import Path, Report, finish

_log = logging.getLogger("tensorferry")
# Seconds that an interrupted wait gives the transfer: making durable what has arrived takes two.
_FAREWELL = 3.0


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

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody did."""
        return self._cancelled

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


class _Ending:
    """How a save ended, and whether anybody has heard."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: str | None = None
        self.is_heard = False

    def tell(self) -> None:
        """Says that it failed, unless that was heard."""
        if self.error is not None and not self.is_heard:
            _log.error("%s failed and nobody asked for its result: %s", self.name, self.error)


class Handle:
    """A save that runs in the background. Awaitable. A process waits for it before it ends.

    A failure that nobody asked for is logged, as an error of the logger ``tensorferry``, when the
    handle goes away or the process ends; on stderr where logging is not set up.
    """

    def __init__(self, run: Callable[[Cancel], Report], name: str) -> None:
        self._name = name
        self._cancel = Cancel()
        self._ending = _Ending(name)
        self._future: concurrent.futures.Future[Report] = concurrent.futures.Future()
        self._future.set_running_or_notify_cancel()
        # At the end of the process, too: after its threads have ended.
        weakref.finalize(self, self._ending.tell)
        # Without the handle, which can go away before the save has ended.
        given = (run, self._future, self._cancel, self._ending)
        threading.Thread(target=_run, args=given, name=f"tensorferry {name}").start()

    def result(self, timeout: float | None = None) -> Report:
        """Waits for the end, ``timeout`` seconds at most; raises what the save raised, or
        ``TimeoutError``, after which the save goes on.

        Ctrl-C while it waits cancels the save in good order, as :meth:`cancel` does."""
        with self._waiting():
            return self._future.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As :meth:`result`, but gives what was raised."""
        with self._waiting():
            return self._future.exception(timeout)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def cancel(self) -> None:
        """Stops in good order: nothing is published, and what has arrived is kept for the
        next save of the same name and key. :meth:`result` raises a :class:`FerryError` of the code
        ``"interrupted"`` then, within some seconds."""
        self._cancel.cancel()

    def add_done_callback(self, callback: Callable[[Handle], Any]) -> None:
        """Calls this with the handle at the end, from the thread of the save, or at once. Who
        waits in :meth:`result` may go on before the callbacks have run."""
        self._future.add_done_callback(lambda _future: callback(self))

    def __await__(self) -> Generator[Any, None, Report]:
        import asyncio

        self._ending.is_heard = True
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()

    def __repr__(self) -> str:
        if not self._future.done():
            state = "is being cancelled" if self._cancel.is_cancelled else "runs"
        else:
            state = "is done" if self._ending.error is None else f"failed: {self._ending.error}"
        return f"<tensorferry.Handle {self._name!r} {state}>"

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
            self._ending.is_heard = True
        except concurrent.futures.TimeoutError as error:
            # Until Python 3.10 that of futures was another.
            if isinstance(error, TimeoutError):
                raise
            raise TimeoutError("the save goes on") from None
        except BaseException:
            if not self._future.done():
                # A signal's handler raised, as that of Ctrl-C does.
                self.cancel()
                concurrent.futures.wait([self._future], _FAREWELL)
            self._ending.is_heard = True
            raise


def _run(
    run: Callable[[Cancel], Report],
    future: concurrent.futures.Future[Report],
    cancel: Cancel,
    ending: _Ending,
) -> None:
    try:
        report = run(cancel)
    except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
        if isinstance(error, FerryError) and error.code == "interrupted" and cancel.is_cancelled:
            error.hint = error.hint or "it was cancelled; the same call made again goes on with what has arrived"
            # Who cancelled it knows.
            ending.is_heard = True
        ending.error = str(error) or type(error).__name__
        future.set_exception(error)
    else:
        future.set_result(report)


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

    return Handle(run, f"save_async to {os.fspath(dest)}")


def _copied(item: Named) -> Named:
    tensor = lent(item.name, item.value)
    # What another library copied may still be known to it.
    if not tensor.is_fresh:
        tensor = dataclasses.replace(tensor, array=tensor.array.copy(), is_fresh=True)
    # It is no copy that the caller need hear of.
    return Named(item.name, dataclasses.replace(tensor, copied_bytes=0), item.trainable)
