"""Files that a manifest names: opened only where they lie in its folder.

A manifest may come from anybody. What it names must not lead to other files of this machine.
"""

from __future__ import annotations

import errno
import io
import os
import pathlib
import stat

from ._errors import IntegrityError

_HINT = "tensorferry writes no such folder: do not trust where it comes from, and fetch it again"


def _check_name(file: object, entry: str) -> None:
    """Refuses what is no plain relative path."""
    if not isinstance(file, str):
        raise _refusal(entry, file, "is no path")
    if file.startswith("/"):
        raise _refusal(entry, file, "is not relative to the folder")
    if "\\" in file or "\0" in file or any(part in ("", ".", "..") for part in file.split("/")):
        raise _refusal(entry, file, "is no plain path")


def open_inside(folder: pathlib.Path, file: str, entry: str) -> io.BufferedReader:
    """Opens a regular file beneath the folder. Follows no link and waits for no pipe."""
    _check_name(file, entry)
    opened = io.open(os.fspath(folder / file), "rb", opener=lambda *_: _descend(folder, file, entry))
    assert isinstance(opened, io.BufferedReader)
    return opened


def _descend(folder: pathlib.Path, file: str, entry: str) -> int:
    # Part by part, so that nobody can put a link into the way of what was looked at.
    *parents, last = file.split("/")
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parents:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner = os.open(part, flags, dir_fd=here)
            os.close(here)
            here = inner
        found = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
    except OSError as error:
        # A link in the place of a folder is ENOTDIR, a socket in that of a file ENXIO.
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise _refusal(entry, file, "is a link, goes through one, or is no regular file") from error
        raise type(error)(error.errno, error.strerror, os.fspath(folder / file)) from None
    finally:
        os.close(here)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise _refusal(entry, file, "is no regular file")
    return found


def _refusal(entry: str, file: object, why: str) -> IntegrityError:
    return IntegrityError(
        f"the manifest says that {entry!r} is in {file!r}, which {why}",
        code="integrity", exit_code=6, tensor=entry, hint=_HINT,
    )
