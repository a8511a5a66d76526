"""What works on folders of this machine."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TypeVar

from . import _checkpoint
from ._errors import usage
from ._load import _is_address
from ._transfer import Path

_Found = TypeVar("_Found")


def _of_folder(call: Callable[[Path], _Found]) -> Callable[[Path], _Found]:
    @functools.wraps(call)
    def checked(path: Path) -> _Found:
        text = os.fspath(path)
        if text.startswith("ferry://") or (_is_address(text) and not os.path.exists(text)):
            raise usage(f"{text} is on a server", f"pull it first: tensorferry.pull({text!r}, folder)")
        return call(path)

    return checked


open = _of_folder(_checkpoint.open)
verify = _of_folder(_checkpoint.verify)
