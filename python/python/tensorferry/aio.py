"""The same for asyncio.

A transfer runs on a thread of its own; when the task that awaits it is cancelled, it stops in
good order, and the same call goes on from there. ``progress`` is called in the event loop.

>>> report = await tensorferry.aio.push("ckpt/", "lab:run7")
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

from . import _save, _transfer
from ._handle import Handle
from ._transfer import Report

__all__ = ["pull", "push", "save", "save_file"]


async def _run(call: Callable[..., Report], *given: Any, progress: Any = None, **options: Any) -> Report:
    loop = asyncio.get_running_loop()
    if callable(progress) and progress is not True and not hasattr(progress, "absolute_update"):
        progress = functools.partial(loop.call_soon_threadsafe, progress)
    handle = Handle(
        lambda cancel: call(*given, progress=progress, _on_start=cancel.on_start, **options),
        call.__name__,
    )
    # Whoever awaits this hears.
    handle._ending.is_heard = True
    ending = asyncio.wrap_future(handle._future)
    try:
        return await asyncio.shield(ending)
    except asyncio.CancelledError:
        handle.cancel()
        # What has arrived is made durable first, which takes two seconds at most.
        await asyncio.wait([ending])
        if not ending.cancelled():
            ending.exception()
        raise


async def push(*given: Any, **options: Any) -> Report:
    """See :func:`tensorferry.push`."""
    return await _run(_transfer.push, *given, **options)


async def pull(*given: Any, **options: Any) -> Report:
    """See :func:`tensorferry.pull`."""
    return await _run(_transfer.pull, *given, **options)


async def save(*given: Any, **options: Any) -> Report:
    """See :func:`tensorferry.save`. The object is looked at on another thread: do not change
    it until this has returned."""
    return await _run(_save.save, *given, **options)


async def save_file(*given: Any, **options: Any) -> Report:
    """See :func:`tensorferry.save_file`."""
    return await _run(_save.save_file, *given, **options)
