"""Moves checkpoints between machines into folders of memory-mappable ``.npy`` files.

>>> import tensorferry as ferry
>>> ferry.save(model, "ferry://lab/run7")              # arrays, keras, tf, torch, pytrees
>>> ferry.push("ckpt/", "lab:run7", progress=True)     # files of any known format
>>> ferry.pull("ferry://lab/run7", "/data/run7")
>>> ferry.open("/data/run7")["decoder/kernel"][:10]    # np.memmap, nothing is read before

Every chunk is verified, what is acknowledged survives a crash, and the same call made again
goes on where the receiver's disk stands. ``tensorferry.aio`` has the same for asyncio.
"""

from __future__ import annotations

import importlib

from ._checkpoint import Checkpoint, VerifyReport, inspect
from ._client import Client
from ._errors import (
    AuthError,
    ExistsError,
    FerryError,
    IntegrityError,
    RetryableError,
    SourceChangedError,
)
from ._handle import Handle, save_async
from ._load import Loaded, load_into
from ._local import open, verify
from ._native import __version__
from ._save import CopyWarning, save, save_file
from ._server import ModelServer, Server, serve_model
from ._transfer import Progress, Report, pull, push

__all__ = [
    "AuthError",
    "Checkpoint",
    "Client",
    "CopyWarning",
    "ExistsError",
    "FerryError",
    "Handle",
    "IntegrityError",
    "Loaded",
    "ModelServer",
    "Progress",
    "Report",
    "RetryableError",
    "Server",
    "SourceChangedError",
    "VerifyReport",
    "__version__",
    "inspect",
    "load_into",
    "open",
    "pull",
    "push",
    "save",
    "save_async",
    "save_file",
    "serve_model",
    "verify",
]

_LAZY = ("aio", "fsspec", "keras", "torch")


def __getattr__(name: str):
    # What needs another library is imported when it is asked for.
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
