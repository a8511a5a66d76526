"""Servers in the background of this process."""

from __future__ import annotations

import functools
import logging
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from . import _native
from ._convert import Named, lent, named
from ._errors import usage
from ._temporary import TemporaryFolder
from ._transfer import Path

_Snapshot = Iterator[tuple[str, Callable[[], tuple[dict[str, Any], np.ndarray, bool | None]]]]

_log = logging.getLogger("tensorferry")


class Server:
    """Receives checkpoints into ``root`` and gives them to those who pull, until it is stopped.

    ``exports`` offers checkpoints that lie elsewhere, by name: ``{"base": "/models/base"}``.
    Beyond this machine it listens only with ``insecure=True``: there is no encryption.

    >>> with tensorferry.Server("/data/ckpts") as server:
    ...     tensorferry.save({"w": w}, server.url("run7"))
    """

    def __init__(
        self,
        root: Path,
        listen: str = "127.0.0.1:0",
        exports: Mapping[str, Path] | None = None,
        *,
        insecure: bool = False,
    ) -> None:
        self.root = os.fspath(root)
        pairs = [(name, os.fspath(path)) for name, path in (exports or {}).items()]
        self._native = _native.serve(self.root, listen, pairs, [], insecure, None)

    @property
    def address(self) -> str:
        """``host:port``."""
        return self._native.address

    def url(self, name: str = "") -> str:
        """``ferry://host:port/name``."""
        return f"ferry://{_reachable(self.address)}/{name}"

    def stop(self) -> None:
        """Stops in good order: what has arrived is made durable."""
        self._native.stop()

    def __enter__(self):
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<tensorferry.{type(self).__name__} at {self.address}>"


class ModelServer(Server):
    """Offers the current weights of a model of this process. See :func:`serve_model`."""

    def __init__(self, model: Any, listen: str, name: str, insecure: bool) -> None:
        self.lock = threading.RLock()
        """Held while a snapshot is taken, also while ``model`` is called if it is a function; that
        may take it again. Who changes weights under it never has half of a change pulled. Do not
        pull from this server while you hold it."""
        self.name = name
        self.last_error: BaseException | None = None
        """Why the last snapshot failed, if it did; the puller is not told."""
        self._model = model
        # A server has a root, and this one takes nothing in: no checkpoint may have a byte.
        self._root = TemporaryFolder("tensorferry-")
        self.root = self._root.name
        # Nobody finds a cycle that goes through the native side: the server would never end.
        snapshot = functools.partial(_snapshot_of, weakref.ref(self))
        self._native = _native.serve(self.root, listen, [], [(name, snapshot)], insecure, 1)

    @property
    def url(self) -> str:  # type: ignore[override]
        """Where the weights can be pulled from: ``ferry://host:port/name``."""
        return f"ferry://{_reachable(self.address)}/{self.name}"

    def stop(self) -> None:
        """Stops; pulls under way have five seconds to end."""
        super().stop()
        self._root.cleanup()

    def _snapshot(self) -> _Snapshot:
        try:
            with self.lock:
                is_empty = True
                for item in named(_current(self._model)):
                    is_empty = False
                    # Only what is wanted is converted; the native side copies it at once.
                    yield item.name, functools.partial(_lend, item)
                if is_empty:
                    raise usage("no tensor was found in the model. Is it built yet?")
        except Exception as error:
            self.last_error = error
            _log.exception("no snapshot of %s can be had", self.name)
            raise


def _snapshot_of(reference: weakref.ref[ModelServer]) -> _Snapshot:
    server = reference()
    if server is None:
        raise ReferenceError("the ModelServer is gone")
    return server._snapshot()


def serve_model(
    model: Any,
    listen: str = "127.0.0.1:0",
    name: str = "model",
    *,
    insecure: bool = False,
) -> ModelServer:
    """Offers the weights of a model as they are at the moment of each pull.

    ``model``: all that :func:`save` takes, or a function that returns that. When a pull opens,
    the tensors that it wants are copied, one after the other, under the GIL; the copy is held
    until that pull ends. Steps of a training in between may be seen in some tensors and not in
    others, unless they are made under ``server.lock``:

    >>> with tensorferry.serve_model(model, "0.0.0.0:7744", insecure=True) as server:
    ...     for batch in data:
    ...         with server.lock:
    ...             train_step(batch)

    A pull that loses its connection goes on with a snapshot of that later moment: what has come
    is compared with it, and what lands is always one snapshot.

    A pull while the model has no weights, because it is not built yet, fails.

    It serves until it is stopped, or until nothing refers to it any more: keep what this returns.
    """
    if model is None:
        raise TypeError("serve_model takes a model, or a function that gives one, not None")
    return ModelServer(model, listen, name, insecure)


def _lend(item: Named) -> tuple[dict[str, Any], np.ndarray, bool | None]:
    tensor = lent(item.name, item.value)
    return tensor.meaning, tensor.array, item.trainable


def _current(model: Any) -> Any:
    is_model = any(hasattr(model, name) for name in ("variables", "state_dict", "_flatten", "shape"))
    if callable(model) and not is_model:
        return model()
    if model is None:
        raise usage("there is no model")
    return model


def _reachable(address: str) -> str:
    host, _, port = address.rpartition(":")
    if host in ("0.0.0.0", "[::]"):
        host = socket.gethostname()
    return f"{host}:{port}"
