"""A server, by address."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from . import _handle, _native, _save, _transfer
from ._handle import Handle
from ._transfer import Path, Report


class Client:
    """A server at ``"ferry://host[:port]"`` or ``"host[:port]"``.

    Names take the place of destinations; all else is as in the functions of the same name.
    Connections are made when they are needed, so that there is nothing to close.

    >>> lab = tensorferry.Client("lab")
    >>> lab.save(model, "run7/step-900")
    >>> [row["name"] for row in lab.list("run7/")]
    ['run7/step-900']
    """

    def __init__(self, server: str) -> None:
        authority = server.removeprefix("ferry://").rstrip("/")
        if not authority or "/" in authority:
            raise ValueError(f'{server!r} is no server, which is "host", "host:port" or "ferry://host:port"')
        self.authority: str = _native.authority(authority)
        """``host:port``."""

    def url(self, name: str) -> str:
        """``ferry://host:port/name``."""
        return f"ferry://{self.authority}/{name}"

    def push(self, src: Path | Iterable[Path], name: str, **options: Any) -> Report:
        """See :func:`tensorferry.push`."""
        return _transfer.push(src, self.url(name), **options)

    def pull(self, name: str, folder: Path, **options: Any) -> Report:
        """See :func:`tensorferry.pull`."""
        return _transfer.pull(self.url(name), folder, **options)

    def save(self, obj: Any, name: str, **options: Any) -> Report:
        """See :func:`tensorferry.save`; a single array is called ``tensor``."""
        return _save.save(obj, self.url(name), **options)

    def save_file(self, tensors: Mapping[str, Any], name: str, **options: Any) -> Report:
        """See :func:`tensorferry.save_file`."""
        return _save.save_file(tensors, self.url(name), **options)

    def save_async(self, obj: Any, name: str, **options: Any) -> Handle:
        """See :func:`tensorferry.save_async`."""
        return _handle.save_async(obj, self.url(name), **options)

    def list(self, prefix: str = "") -> list[dict[str, Any]]:
        """Checkpoints and unfinished transfers whose names begin with ``prefix``: ``name``,
        ``published``, ``offered`` (it lies elsewhere and can be pulled), ``entries``,
        ``total_bytes``, ``durable_bytes``, ``active``, ``modified`` (seconds since 1970)."""
        return _native.list(self.authority, prefix)

    def status(self, name: str) -> dict[str, Any]:
        """``published``, and of an unfinished ``transfer`` what :meth:`list` says, or ``None``."""
        return _native.status(self.authority, name)

    def describe(self, name: str) -> dict[str, Any]:
        """The manifest of a published checkpoint."""
        return json.loads(_native.describe(self.authority, name))

    def discard(self, name: str) -> int | None:
        """Throws an unfinished transfer away. The durable bytes that were lost, or ``None``
        when there was none."""
        return _native.discard(self.authority, name)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *raised: object) -> None:
        """Does nothing."""

    def __repr__(self) -> str:
        return f"<tensorferry.Client of {self.authority}>"
