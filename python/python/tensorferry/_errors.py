"""Exceptions: what went wrong, with which tensor, and what to do next."""

from __future__ import annotations

import json
import re
from typing import Any


class FerryError(Exception):
    """Something that tensorferry cannot do.

    ``code`` is a stable word such as ``"no-space"`` and ``exit_code`` what the program ends with;
    ``hint`` says what to do next, ``causes`` what lies beneath, outermost first; ``tensor`` and
    ``offset`` (bytes) say where, when that is known.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "other",
        exit_code: int = 1,
        hint: str | None = None,
        causes: tuple[str, ...] = (),
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.exit_code = exit_code
        self.hint = hint
        self.causes = causes
        self.tensor = tensor
        self.offset = offset

    def __str__(self) -> str:
        words = ": ".join([self.message, *self.causes])
        return f"{words} ({self.hint})" if self.hint else words


class RetryableError(FerryError):
    """The network failed. The same call goes on where it stopped."""


class IntegrityError(FerryError):
    """Bytes are not what they should be. Nothing damaged was published."""


class SourceChangedError(FerryError):
    """What was sent changed while it was sent. Nothing was published."""


class ExistsError(FerryError):
    """Something of that name exists; ``overwrite=True`` replaces a published checkpoint."""


class AuthError(FerryError):
    """Not allowed, or not configured."""


_CLASSES = {
    "network": RetryableError,
    "integrity": IntegrityError,
    "source-changed": SourceChangedError,
    "exists": ExistsError,
    "auth": AuthError,
}

# The library speaks of its program.
_WORDS = (
    (r"run the same command again", "make the same call again"),
    (r"push --restart", "restart=True"),
    (r"--([a-z]+)-([a-z]+) ([a-z]+)", r'\1_\2="\3"'),
    (r"--(overwrite|restart|insecure|trainable)\b", r"\1=True"),
    (r"--(include|exclude|codec|lanes)\b", r"\1="),
    (r"see `tensorferry serve --help`", "see `help(tensorferry.Server)`"),
)
_NAME = re.compile(r'"(?:[^"\\]|\\.)*"')
_OFFSET = re.compile(r"\b(?:at|begin at) (?:byte )?(\d+)\b")


def from_native(details: dict[str, Any]) -> FerryError:
    """The exception for an error of the native module."""
    hint, message, code = details["hint"], details["message"], details["code"]
    for pattern, words in _WORDS:
        hint = hint and re.sub(pattern, words, hint)
        message = re.sub(pattern, words, message)
    causes = tuple(details["causes"])
    tensor, offset = details["tensor"], None
    if code in ("integrity", "source-changed"):
        text = ": ".join([message, *causes])
        if tensor is None and (found := _NAME.search(text)):
            tensor = _unquoted(found.group())
        if found := _OFFSET.search(text):
            offset = int(found.group(1))
    kind = RetryableError if details["retryable"] else _CLASSES.get(code, FerryError)
    error = kind(
        message,
        code=code,
        exit_code=details["exit_code"],
        hint=hint,
        causes=causes,
        tensor=tensor,
        offset=offset,
    )
    inner = error
    for cause in causes:
        inner.__cause__ = FerryError(cause, code=code)
        inner = inner.__cause__
    return error


def usage(message: str, hint: str | None = None) -> FerryError:
    """A call that makes no sense."""
    return FerryError(message, code="usage", exit_code=2, hint=hint)


def _unquoted(text: str) -> str:
    # Rust writes \u{1f} where JSON writes \u001f.
    text = re.sub(r"\\u\{([0-9a-f]+)\}", lambda found: chr(int(found.group(1), 16)), text[1:-1])
    try:
        return json.loads(f'"{text}"', strict=False)
    except ValueError:
        return text
