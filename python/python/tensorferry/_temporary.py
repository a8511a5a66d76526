"""Temporary folders that a forked process leaves alone."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref


class TemporaryFolder:
    """A folder that is gone with this object, or at the end of the process.

    Other than with ``tempfile.TemporaryDirectory``, a forked process that drops its copy of the
    object removes nothing.
    """

    def __init__(self, prefix: str, within: str | os.PathLike[str] | None = None) -> None:
        self.name = tempfile.mkdtemp(prefix=prefix, dir=None if within is None else os.fspath(within))
        self._remove = weakref.finalize(self, _remove, self.name, os.getpid())

    def cleanup(self) -> None:
        """Removes it now; again it does nothing."""
        self._remove()


def _remove(folder: str, maker: int) -> None:
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)
