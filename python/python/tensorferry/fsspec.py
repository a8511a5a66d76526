"""``ferry://HOST[:PORT]/…`` for every library that opens files through fsspec.

    import fsspec

    with fsspec.open("ferry://lab/notes/run7.json", "wb") as file:
        file.write(b"{}")                       # close() returns when it is durable and published

    fs = fsspec.filesystem("ferry", host="lab")
    fs.ls("/run7")                              # the files of a checkpoint that was pushed
    fs.get("/run7/norm.weight.npy", "here.npy")

**How a path becomes a checkpoint and a file.** A server knows checkpoints, each published as a
whole and never changed in part. So there are two kinds of paths:

- *Inside a checkpoint.* If ``run7`` is a checkpoint, ``/run7`` is a folder that can be read but
  not written: ``/run7/manifest.json``, ``/run7/norm.weight.npy``, ``/run7/files/config.json``, as
  they lie in the receiver's folder.
- *A file of its own.* Whatever is written here becomes a checkpoint with nothing in it but that
  file, under the name of the whole path: ``/logs/run7/a.json`` is the checkpoint
  ``logs/run7/a.json`` with the side file ``a.json``. A folder is only what such names have
  in common; ``makedirs`` has nothing to do. A library that writes twenty files makes twenty
  checkpoints. To send a folder as one checkpoint use :func:`tensorferry.push`.

Names of checkpoints consist of ``A-Z a-z 0-9 . _ -`` and no part begins with a dot. Any other byte
of a path's part becomes ``-.`` and two hexadecimal digits in the checkpoint's name
(``.metadata`` is ``-.2emetadata`` there), and comes back in ``ls``.

**What it costs.**

- Writing: the bytes go into a temporary file of this machine first, for a server wants to know
  how many there are; ``close()`` sends them. So there must be room for them, and
  ``flush()`` sends nothing. What is not closed, or fails before, is never seen by anybody: leaving
  ``with fs.open(…)`` by an exception publishes nothing. (``with fsspec.open(…)`` is fsspec's own: it
  closes the file whatever happened, and so publishes what was written so far.)
- Reading: the file is fetched whole into a temporary folder of this machine when it is opened, and
  kept there for the next time (``cache_dir``); the first byte is there when the last one is. From
  inside a checkpoint one tensor travels, and with it all of its side files, for the protocol selects
  tensors only. ``manifest.json`` alone is asked for directly.
- ``ls``, ``info`` and ``exists`` ask for the list of names, and for one manifest for each
  checkpoint that has a single entry and was not seen yet.
- Only what was published to the server is seen. What it offers beyond that (``serve --export``,
  :func:`tensorferry.serve_model`) is in no list, and comes by :func:`tensorferry.pull`.

**What a server does not offer.** There is no call that deletes what is published. ``rm`` of a file
that was written through fsspec replaces it by an empty marker of some hundred bytes that ``ls`` does
not show, which gives its space back (its name cannot become a folder, though). ``rm`` of a checkpoint
raises ``NotImplementedError``, unless it is not published yet: then its unfinished transfer is discarded.
``mv`` is a copy through this machine, then ``rm``. Appending (``"ab"``) is not possible.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import tensorferry
from fsspec.compression import compr
from fsspec.core import get_compression
from fsspec.spec import AbstractFileSystem
from fsspec.utils import infer_storage_options

from ._temporary import TemporaryFolder

__all__ = ["FerryFileSystem", "checkpoint_name", "path_of"]

DEFAULT_PORT = 7744
KIND = "tensorferry.fsspec"
"""Key in the metadata of a checkpoint that this module made; its value says what it is."""
FILE, REMOVED = "file", "removed"
MANIFEST, CONTENT = "manifest.json", "content"

_LEGAL = re.compile(rb"[A-Za-z0-9._-]")
_ESCAPED = re.compile(rb"-\.([0-9a-f]{2})")


def checkpoint_name(path: str) -> str:
    """The name of a checkpoint for a path without host: ``/a b/.c`` is ``a-.20b/-.2ec``.

    What already is a legal name stays as it is, unless ``-.`` and two hexadecimal digits are in it.

    Raises:
        ValueError: no part, or one of ``.`` and ``..``.
    """
    parts = [part for part in path.split("/") if part]
    if not parts or any(part in (".", "..") for part in parts):
        raise ValueError(f"{path!r} names no file")
    return "/".join(_escape(part) for part in parts)


def _escape(part: str) -> str:
    raw = part.encode()
    escaped = bytearray()
    for index in range(len(raw)):
        byte = raw[index : index + 1]
        # A literal escape must not come back as the byte that it seems to stand for.
        is_ambiguous = byte == b"-" and _ESCAPED.match(raw, index) is not None
        if not _LEGAL.match(byte) or (byte == b"." and index == 0) or is_ambiguous:
            escaped += b"-.%02x" % byte[0]
        else:
            escaped += byte
    return escaped.decode()


def path_of(name: str) -> str:
    """The path of a checkpoint's name, with ``/`` in front: the inverse of :func:`checkpoint_name`."""
    raw = _ESCAPED.sub(lambda found: bytes([int(found[1], 16)]), name.encode())
    return "/" + raw.decode(errors="surrogateescape")


class FerryFileSystem(AbstractFileSystem):
    """Files on a tensorferry server. The module's text says what a path means and what it costs.

    Args:
        host: name or address of the server, without a port or with one (``"lab:7744"``).
        port: its port; 7744 if it is nowhere.
        cache_dir: folder for what is fetched; by default a temporary one that ends with this
            object. A folder that is given is never emptied, and is for one process at a time.
        overwrite: whether ``open(path, "wb")`` may replace a file that was written through
            fsspec, as other file systems do. ``"xb"`` never does. A checkpoint that was
            pushed or saved is never replaced from here.
        push_options: keyword arguments of :func:`tensorferry.push` for what is written
            (``durability``, ``retries``, …).
        pull_options: keyword arguments of :func:`tensorferry.pull` for what is read.
    """

    protocol = "ferry"
    root_marker = "/"
    # Every question goes to the server: another process may have published meanwhile.
    use_listings_cache = False

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | str | None = None,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        overwrite: bool = True,
        push_options: dict[str, Any] | None = None,
        pull_options: dict[str, Any] | None = None,
        **storage_options: Any,
    ) -> None:
        if getattr(self, "_cached", False):
            return
        super().__init__(**storage_options)
        self.authority = _authority(host, port)
        self.overwrite = overwrite
        self.push_options = dict(push_options or {})
        self.pull_options = dict(pull_options or {})
        self._client = tensorferry.Client(self.authority)
        self._fetching = threading.Lock()
        if cache_dir is None:
            self._own_cache = TemporaryFolder("tensorferry-fsspec-")
            self._cache = Path(self._own_cache.name)
        else:
            self._cache = Path(cache_dir)
            self._cache.mkdir(parents=True, exist_ok=True)
        # Manifests do not change as long as a name's time of change and size do not.
        self._manifests: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}

    # ---------------------------------------------------------------- addresses

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        path = os.fspath(path)
        if path.startswith("ferry://"):
            _, _, path = path.removeprefix("ferry://").partition("/")
        return "/" + path.strip("/")

    @staticmethod
    def _get_kwargs_from_urls(urlpath: str) -> dict[str, Any]:
        options = infer_storage_options(urlpath)
        return {key: options[key] for key in ("host", "port") if key in options}

    def unstrip_protocol(self, name: str) -> str:
        return f"ferry://{self.authority}{self._strip_protocol(name)}"

    # ---------------------------------------------------------------- asking

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What is directly in a folder; of a file, the file itself.

        Each row has ``name``, ``size`` (bytes; 0 for a folder), ``type``, and where it stands for
        something published ``created`` (seconds since 1970) and ``checkpoint``.
        """
        path = self._strip_protocol(path)
        rows = self._rows_at(path)
        return rows if detail else [row["name"] for row in rows]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path == "/":
            return _folder(path)
        rows = self._rows_at(path)
        if len(rows) == 1 and rows[0]["name"] == path:
            return rows[0]
        return _folder(path)

    def created(self, path: str) -> Any:
        return self.modified(path)

    def modified(self, path: str) -> Any:
        import datetime

        info = self.info(path)
        if "created" not in info:
            raise NotImplementedError(f"{path} is a folder: it has no time")
        return datetime.datetime.fromtimestamp(info["created"], tz=datetime.timezone.utc)

    def ukey(self, path: str) -> str:
        info = self.info(path)
        return f"{info['name']} {info['size']} {info.get('created')}"

    def _published(self, prefix: str = "") -> Iterator[dict[str, Any]]:
        return (row for row in self._client.list(prefix) if row["published"])

    def _manifest(self, row: dict[str, Any]) -> dict[str, Any]:
        state = (row["modified"], row["total_bytes"])
        known = self._manifests.get(row["name"])
        # A file may be replaced by one of the same length within the second.
        if known is None or known[0] != state or row["total_bytes"] == 0:
            known = (state, self._client.describe(row["name"]))
            self._manifests[row["name"]] = known
        return known[1]

    def _kind(self, row: dict[str, Any]) -> str | None:
        """FILE, REMOVED, or None for a checkpoint that is a folder."""
        # What this module makes has exactly one entry: nothing need be asked about all others.
        return _kind_of(self._manifest(row)) if row["entries"] == 1 else None

    def _rows_at(self, path: str) -> list[dict[str, Any]]:
        """The rows of a folder, or the one row of a file.

        Raises:
            FileNotFoundError: nothing published has this path or lies beneath it.
        """
        parts = path.strip("/").split("/") if path != "/" else []
        rows: dict[str, dict[str, Any]] = {}
        # The first part is common to a checkpoint, what lies in it, and names that begin with it.
        prefix = _escape(parts[0]) if parts else ""
        for row in self._published(prefix):
            name = path_of(row["name"])
            if name == path or path.startswith(name + "/"):
                kind = self._kind(row)
                if kind is None:
                    return _rows_inside(name, path, row, self._manifest(row))
                if kind == FILE and name == path:
                    return [_file(name, row["total_bytes"], row)]
            elif path == "/" or name.startswith(path + "/"):
                rest = name.removeprefix(path).lstrip("/")
                kind = self._kind(row)
                if kind == REMOVED:
                    continue
                child, _, deeper = rest.partition("/")
                child_path = f"{path.rstrip('/')}/{child}"
                if deeper or kind is None:
                    rows.setdefault(child_path, _folder(child_path, None if deeper else row))
                else:
                    rows[child_path] = _file(child_path, row["total_bytes"], row)
        if not rows and path != "/":
            raise FileNotFoundError(f"ferry://{self.authority}{path}")
        return [rows[name] for name in sorted(rows)]

    def exists(self, path: str, **_: Any) -> bool:
        # The inherited one takes a server that cannot be reached for a file that is not there.
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    # ---------------------------------------------------------------- reading and writing

    def open(
        self,
        path: str,
        mode: str = "rb",
        block_size: Any = None,
        cache_options: Any = None,
        compression: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``open`` of Python: ``r``, ``rb``, ``w``, ``wb``, ``x``, ``xb``; see :meth:`_open`."""
        if mode.startswith("r"):
            return super().open(path, mode, block_size, cache_options, compression, **kwargs)
        text = {key: kwargs.pop(key) for key in ("encoding", "errors", "newline") if key in kwargs}
        file: Any = super().open(path, f"{mode.replace('b', '').replace('t', '')}b", block_size, **kwargs)
        # The inherited method would let the compressor close itself and leave the file beneath it open.
        if (method := get_compression(path, compression)) is not None:
            file = _CompressedUpload(file, compr[method](file, mode="w"))
        return file if "b" in mode else _TextUpload(file, **text)

    def _open(self, path: str, mode: str = "rb", autocommit: bool = True, **_: Any) -> BinaryIO:
        """Opens a file: ``rb`` fetches it, ``wb`` and ``xb`` publish it when it is closed.

        In a ``with fs.transaction:`` files are published at its end instead, one after the other,
        and none is when it is left by an exception.

        Raises:
            FileNotFoundError, IsADirectoryError: as ever.
            FileExistsError: ``xb``, or ``wb`` with ``overwrite=False``, and it is there.
            ValueError: another mode.
        """
        if mode == "rb":
            return open(self._fetched(path), "rb")
        if mode not in ("wb", "xb"):
            raise ValueError(f"mode {mode!r}: rb, wb and xb are possible, for a published file never changes")
        self._check_writable(path, may_replace=mode == "wb" and self.overwrite)
        may_replace = mode == "wb" and self.overwrite
        return _Upload(self, path, may_replace, autocommit)  # type: ignore[return-value]

    def _check_writable(self, path: str, may_replace: bool) -> None:
        checkpoint_name(path)
        try:
            info = self.info(path)
        except FileNotFoundError:
            return
        if info["type"] == "directory":
            raise IsADirectoryError(f"{path} is a folder or a checkpoint")
        if info.get("inside"):
            raise PermissionError(f"{path} is inside the checkpoint {info['checkpoint']}, which never changes")
        if not may_replace:
            raise FileExistsError(path)

    def _fetched(self, path: str) -> Path:
        """The local copy of a file."""
        info = self.info(path)
        if info["type"] == "directory":
            raise IsADirectoryError(path)
        name = info["checkpoint"]
        manifest_text = _text_of(self._client.describe(name))
        manifest = json.loads(manifest_text)
        folder = self._cache / f"{_escape(name.replace('/', ' '))[:128]}-{_digest(name + manifest_text)}"
        if not info.get("inside"):
            return _landed(self._pulled(name, folder, None, manifest), manifest["files"][0]["name"])
        inner = info["inside"]
        if inner == MANIFEST:
            # In a folder of its own: with a manifest beside them no other could be fetched there.
            file = folder / "manifest-only" / MANIFEST
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(manifest_text)
            return file
        tensors = [row for row in manifest["tensors"] if row["file"] == inner]
        if not tensors:
            blob = next(row["name"] for row in manifest["files"] if row["file"] == inner)
            # A selection must name a tensor: the smallest one costs least.
            least = min(manifest["tensors"], key=lambda row: row["nbytes"], default=None)
            include = None if least is None else [least["name"]]
            return _landed(self._pulled(name, folder / "files-only", include, manifest), blob)
        if len(tensors) > 1:
            # One container for all tensors.
            pulled = self._pulled(name, folder / "container", None, manifest, out_format="safetensors")
            return pulled / "model.safetensors"
        pulled = self._pulled(name, folder / _digest(tensors[0]["name"]), [tensors[0]["name"]], manifest)
        landed = json.loads((pulled / MANIFEST).read_text())["tensors"]
        return pulled / next(row["file"] for row in landed if row["name"] == tensors[0]["name"])

    def _pulled(self, name: str, folder: Path, include: list[str] | None, manifest: dict, **options: Any) -> Path:
        """Fetches into a folder of the cache, unless it is there."""
        selection = {} if include is None else {"include": include}
        # Of threads that open the same file one fetches it and the others wait.
        with self._fetching:
            if not (folder / MANIFEST).is_file():
                folder.parent.mkdir(parents=True, exist_ok=True)
                url = f"ferry://{self.authority}/{name}"
                tensorferry.pull(url, str(folder), **{**self.pull_options, **selection, **options})
        return folder

    def _publish(self, path: str, folder: Path, kind: str, overwrite: bool) -> None:
        """Pushes CONTENT in a folder as a checkpoint of its own; returns when it is durable and published."""
        name = checkpoint_name(path)
        basename = path.rstrip("/").rpartition("/")[2]
        blob = {"name": basename, "file": CONTENT, "nbytes": (folder / CONTENT).stat().st_size}
        # A folder as a receiver leaves it: the only source whose side files may have any size and name.
        source = {"format": "fsspec", "metadata": {KIND: kind}}
        manifest = {"format": "tensorferry", "version": 1, "source": source, "tensors": [], "files": [blob]}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        url = f"ferry://{self.authority}/{name}"
        options = {**self.push_options, "overwrite": overwrite}
        try:
            tensorferry.push(str(folder), url, **options)
        except tensorferry.FerryError as error:
            # What a writer that died left behind under the name would block it for days.
            if error.code != "busy" or not self._has_stale_transfer(name):
                raise
            tensorferry.push(str(folder), url, **{**options, "restart": True})
        self._manifests.pop(name, None)

    def _has_stale_transfer(self, name: str) -> bool:
        return any(
            row["name"] == name and not row["published"] and not row["active"] for row in self._client.list(name)
        )

    # ---------------------------------------------------------------- changing

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Nothing: a folder is what names have in common."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: a folder is what names have in common."""

    def rmdir(self, path: str) -> None:
        """Nothing to do for a folder without files, which does not exist; else ``OSError``."""
        if self.exists(path):
            raise OSError(f"{path} is not empty")

    def rm_file(self, path: str) -> None:
        """Removes a file that was written through fsspec, or an unfinished transfer.

        Raises:
            FileNotFoundError: there is none.
            NotImplementedError: a checkpoint, or a file inside of one.
        """
        path = self._strip_protocol(path)
        try:
            info = self.info(path)
        except FileNotFoundError:
            if path != "/" and self._has_stale_transfer(checkpoint_name(path)):
                self._client.discard(checkpoint_name(path))
                return
            raise
        if info["type"] == "directory" or info.get("inside"):
            raise NotImplementedError(
                f"{path} is {'a checkpoint or a folder' if info['type'] == 'directory' else 'inside a checkpoint'}: "
                "a server has no call that deletes what is published"
            )
        with tempfile.TemporaryDirectory(prefix="tensorferry-fsspec-") as folder:
            (Path(folder) / CONTENT).touch()
            self._publish(path, Path(folder), REMOVED, overwrite=True)

    _rm = rm_file

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Removes files; with ``recursive`` all that were written through fsspec beneath a folder."""
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        for one in map(self._strip_protocol, paths):
            if recursive and self.isdir(one):
                found = self.find(one, maxdepth=maxdepth, detail=True)
                # Before the first is gone: half a removal helps nobody.
                for name, row in found.items():
                    if row.get("inside"):
                        raise NotImplementedError(f"{name} is inside a checkpoint, which a server cannot delete")
                for name in found:
                    self.rm_file(name)
            else:
                self.rm_file(one)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copies a file through this machine."""
        with self.open(path1, "rb") as source, self.open(path2, "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)


class _Upload:
    """A file that is being written: spooled here, pushed by :meth:`close`.

    A context manager. Leaving it by an exception discards what was written: nothing is
    published. So does forgetting to close it.
    """

    mode = "wb"

    def __init__(self, fs: FerryFileSystem, path: str, may_replace: bool, autocommit: bool) -> None:
        self._fs = fs
        self.path = path
        self._may_replace = may_replace
        self._autocommit = autocommit
        self._folder = TemporaryFolder("tensorferry-fsspec-")
        self._spool = (Path(self._folder.name) / CONTENT).open("w+b")

    def write(self, data: Any) -> int:
        return self._spool.write(data)

    def writelines(self, lines: Any) -> None:
        self._spool.writelines(lines)

    def read(self, size: int = -1) -> bytes:
        return self._spool.read(size)

    def tell(self) -> int:
        return self._spool.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Any place: nothing has been sent yet. A zip archive, for one, goes back to its heads."""
        return self._spool.seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        return self._spool.truncate(size)

    def flush(self) -> None:
        """Into the temporary file. Nothing is sent before :meth:`close`."""
        self._spool.flush()

    def fileno(self) -> int:
        """That of the temporary file, so that ``os.fsync`` after ``flush`` succeeds and means nothing."""
        return self._spool.fileno()

    def isatty(self) -> bool:
        return False

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @property
    def closed(self) -> bool:
        return self._spool.closed

    def close(self) -> None:
        """Publishes the file, unless a transaction will. Returns when it is as durable as the receiver says.

        Raises:
            tensorferry.FerryError: it could not be published; what was written is gone, and
                what was there before is still there.
        """
        if self.closed:
            return
        self._spool.close()
        if self._autocommit:
            self.commit()

    def commit(self) -> None:
        """Publishes the closed file."""
        try:
            overwrite = self._may_replace or self._is_removed()
            self._fs._publish(self.path, Path(self._folder.name), FILE, overwrite)
        finally:
            self._folder.cleanup()

    def _is_removed(self) -> bool:
        """Whether a marker of ``rm`` stands where the file is to be, which may always be replaced."""
        name = checkpoint_name(self.path)
        rows = (row for row in self._fs._published(name) if row["name"] == name)
        return any(self._fs._kind(row) == REMOVED for row in rows)

    def discard(self) -> None:
        """Throws away what was written."""
        self._spool.close()
        self._folder.cleanup()

    def __enter__(self) -> _Upload:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        # Half a file must not be published because its writer died of an exception.
        if hasattr(self, "_spool") and not self.closed:
            self.discard()


class _CompressedUpload(io.BufferedIOBase):
    """A compressor over :class:`_Upload`, with the same rule for exceptions."""

    def __init__(self, upload: _Upload, compressor: Any) -> None:
        super().__init__()
        self._upload = upload
        self._compressor = compressor

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._compressor.write(data)

    def flush(self) -> None:
        if not self._upload.closed:
            self._compressor.flush()

    def close(self) -> None:
        if not self.closed:
            self._compressor.close()
            self._upload.close()
            super().close()

    def discard(self) -> None:
        self._upload.discard()
        super().close()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        # That of the base class would close, which publishes.
        if not self._upload.closed:
            self.discard()


class _TextUpload(io.TextIOWrapper):
    """Text over :class:`_Upload`, with the same rule for exceptions."""

    def __exit__(self, kind: object, *details: object) -> None:
        if kind is None:
            self.close()
        else:
            self.buffer.discard()  # type: ignore[attr-defined]

    def __del__(self) -> None:
        # That of the base class would close, which publishes.
        if not self.buffer.closed:
            self.buffer.discard()  # type: ignore[attr-defined]


# ---------------------------------------------------------------- rows


def _authority(host: str, port: int | str | None) -> str:
    has_port = re.search(r"(?:^[^:]*|\]):\d+$", host) is not None
    if has_port:
        return host
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{host}:{DEFAULT_PORT if port is None else int(port)}"


def _kind_of(manifest: dict[str, Any]) -> str | None:
    metadata = (manifest.get("source") or {}).get("metadata") or {}
    is_one_file = not manifest["tensors"] and len(manifest["files"]) == 1
    return metadata.get(KIND) if is_one_file else None


def _folder(path: str, row: dict[str, Any] | None = None) -> dict[str, Any]:
    info: dict[str, Any] = {"name": path, "size": 0, "type": "directory"}
    if row is not None:
        info |= {"checkpoint": row["name"], "created": row["modified"]}
    return info


def _file(path: str, size: int, row: dict[str, Any], inside: str | None = None) -> dict[str, Any]:
    info = {"name": path, "size": size, "type": "file", "checkpoint": row["name"], "created": row["modified"]}
    return info if inside is None else info | {"inside": inside}


def _rows_inside(name: str, path: str, row: dict[str, Any], manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows at a path that is a checkpoint or lies in one."""
    sizes: dict[str, int] = {MANIFEST: len(_text_of(manifest).encode())}
    for tensor in manifest["tensors"]:
        end = tensor["data_offset"] + tensor["nbytes"]
        sizes[tensor["file"]] = max(end, sizes.get(tensor["file"], 0))
    sizes |= {blob["file"]: blob["nbytes"] for blob in manifest["files"]}
    inner = path.removeprefix(name).strip("/")
    if inner in sizes:
        return [_file(path, sizes[inner], row, inner)]
    start = f"{inner}/" if inner else ""
    rows: dict[str, dict[str, Any]] = {}
    for file, size in sizes.items():
        if file.startswith(start):
            child, _, deeper = file.removeprefix(start).partition("/")
            child_path = f"{path}/{child}"
            found = _folder(child_path) if deeper else _file(child_path, size, row, file)
            rows.setdefault(child_path, found)
    if not rows:
        raise FileNotFoundError(path)
    return [rows[child] for child in sorted(rows)]


def _text_of(manifest: dict[str, Any]) -> str:
    """A manifest as the receiver writes it."""
    return json.dumps(manifest, indent=2, ensure_ascii=False)


def _landed(folder: Path, blob: str) -> Path:
    """Where a side file lies in a pulled folder."""
    rows = json.loads((folder / MANIFEST).read_text())["files"]
    return folder / next(row["file"] for row in rows if row["name"] == blob)


def _digest(text: str) -> str:
    import hashlib

    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
