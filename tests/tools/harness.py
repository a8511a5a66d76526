"""What the test tools share: sources, servers, pushes, a TCP proxy and a reader of what landed.

Everything here looks at tensorferry from outside: its command line, its sockets and the files it
leaves. Nothing is imported from it, so a mistake in the program cannot hide in the check.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

MIB = 1 << 20
TIMEOUT_S = float(os.environ.get("TENSORFERRY_TOOL_TIMEOUT", "600"))
"""How long a push may take before a tool calls it stuck. Generous: test machines are slow."""


class Broken(Exception):
    """A published checkpoint is not whole."""


class Failed(Exception):
    """A step of a check did not do what it must; the message says which."""


def require_strace() -> None:
    """Ends the process when strace is missing: quietly on a desk, as a failure in CI."""
    if shutil.which("strace") is None:
        not_run("strace")


def not_run(what: str) -> None:
    """Says that a check could not run. In CI that is a failure: there everything must run."""
    print(f"not run: {what}")
    sys.exit(1 if os.environ.get("CI") == "true" else 0)


def parse_size(text: str) -> int:
    """`64M` -> bytes."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    unit = units.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit else int(text)


def free_port() -> int:
    """A port that nobody listens on now. Chosen up front so that a server can come back to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- sources


def random_tensors(lengths: dict[str, int], seed: int) -> dict[str, bytes]:
    """Bytes that no codec can shrink, so that every cell travels as it is."""
    rng = random.Random(seed)
    return {name: rng.randbytes(length) for name, length in lengths.items()}


def write_safetensors(path: Path, tensors: dict[str, bytes]) -> int:
    """Writes one-dimensional U8 tensors in the order given; returns the file offset of the first."""
    header: dict[str, object] = {}
    offset = 0
    for name, data in tensors.items():
        end = offset + len(data)
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for data in tensors.values():
            file.write(data)
    return 8 + len(text)


def wait_settled(path: Path, seconds: float = 3.0) -> None:
    """Waits until the last change is old enough for any later one to show in ctime."""
    newest = max(p.stat().st_ctime for p in [path, *path.rglob("*")])
    time.sleep(max(0.0, newest + seconds - time.time()))


def rewrite_byte(path: Path, offset: int) -> None:
    """Flips one byte in place and puts mtime back: only ctime tells that the file changed."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ 0xFF]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# ---------------------------------------------------------------- what landed


def landed(folder: Path) -> dict[str, bytes]:
    """Raw bytes of every tensor and side file of a published checkpoint; Broken unless it is whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise Broken(f"{folder.name}: no readable manifest.json: {error}") from error
    found: dict[str, bytes] = {}
    files = {"manifest.json"}
    entries = [(e, e["data_offset"]) for e in manifest["tensors"]]
    entries += [(e, 0) for e in manifest.get("files", [])]
    for entry, start in entries:
        name, file = entry["name"], entry["file"]
        files.add(file)
        try:
            data = (folder / file).read_bytes()
        except OSError as error:
            raise Broken(f"{name}: {error}") from error
        if len(data) != start + entry["nbytes"]:
            raise Broken(f"{name}: {file} has {len(data)} bytes, not {start + entry['nbytes']}")
        found[name] = data[start:]
    stray = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - files
    if stray:
        raise Broken(f"files that no manifest lists: {sorted(stray)}")
    return found


def first_difference(found: dict[str, bytes], wanted: dict[str, bytes]) -> str | None:
    """Says in words where two checkpoints differ, None when they are equal."""
    if found.keys() != wanted.keys():
        return f"names differ: {sorted(found.keys() ^ wanted.keys())[:8]}"
    for name, data in wanted.items():
        if found[name] != data:
            pairs = enumerate(zip(found[name], data, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(found[name]), len(data)))
            return f"{name} differs at byte {at}"
    return None


def staging(root: Path) -> list[str]:
    """Names of the transfers that still have a staging folder."""
    folder = root / ".tensorferry" / "transfers"
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


# ---------------------------------------------------------------- processes


class Server:
    """A `tensorferry serve`, possibly under a wrapper such as strace."""

    def __init__(
        self,
        binary: Path,
        root: Path,
        port: int,
        *,
        host: str = "127.0.0.1",
        wrapper: Sequence[str] = (),
        extra: Sequence[str] = (),
    ):
        self.host, self.port = host, port
        self.log = root.parent / f"{root.name}.server.log"
        command = [
            *wrapper,
            str(binary),
            "serve",
            str(root),
            "--listen",
            f"{host}:{port}",
            "--format",
            "json",
            *extra,
        ]
        # A session of its own: the wrapper and the server can be ended together, and nobody else.
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, cwd=root, start_new_session=True
            )
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._drain = threading.Thread(target=self._read, daemon=True)
        self._drain.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def wait_listening(self, timeout: float = 60.0) -> bool:
        """True once it listens, False when it died before that; raises when it says something else."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise Failed(f"the server did not say that it listens within {timeout:.0f} s") from None
        if not line:
            self.process.wait(timeout=30)
            return False
        event = json.loads(line)
        if event.get("event") != "listening" or event.get("address") != f"{self.host}:{self.port}":
            raise Failed(f"first line of the server: {line!r}")
        return True

    def alive(self) -> bool:
        """Whether the process (or its wrapper) still runs."""
        return self.process.poll() is None

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to the whole session after 10 seconds."""
        for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            if self.alive():
                self.process.send_signal(number)
            try:
                self.process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._drain.join(10)

    def __enter__(self) -> Server:
        if not self.wait_listening():
            self.stop()
            raise Failed(f"the server ended at once ({self.process.returncode}): {tail(self.log)}")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Push:
    """A `tensorferry push` that runs in the background."""

    def __init__(self, binary: Path, sources: Iterable[Path], port: int, name: str, *extra: str):
        command = [
            str(binary),
            "push",
            *map(str, sources),
            f"ferry://127.0.0.1:{port}/{name}",
            "--format",
            "json",
            *extra,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        """Exit status; Failed when it takes too long."""
        try:
            self.out, self.err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failed(f"push did not end within {timeout:.0f} s: {self.err[-1000:]}") from None
        return self.process.returncode

    def kill(self) -> None:
        """SIGKILL: no goodbye to the server."""
        self.process.kill()
        self.out, self.err = self.process.communicate()

    def expect(self, *statuses: int) -> Push:
        """Waits and raises Failed unless the exit status is one of these."""
        status = self.wait()
        if status not in statuses:
            wanted = " or ".join(map(str, statuses))
            raise Failed(f"push ended with {status}, not {wanted}: {self.err[-1000:].strip()}")
        return self

    def done(self) -> dict[str, object]:
        """The `done` event of a push that succeeded."""
        for line in reversed(self.out.splitlines()):
            event: dict[str, object] = json.loads(line)
            if event.get("event") == "done":
                return event
        raise Failed("push printed no done event")


def tail(path: Path, length: int = 1000) -> str:
    """The end of a log, for an error message."""
    try:
        return path.read_text(errors="replace")[-length:].strip()
    except OSError:
        return ""


# ---------------------------------------------------------------- proxy


class Proxy:
    """Stands between client and server; may slow down or change what the client says."""

    def __init__(
        self, server_port: int, *, rate: float | None = None, tap: Callable[[], Callable[[bytes], bytes]] | None = None
    ):
        """`rate` is bytes per second of all connections; `tap` makes one filter for each connection."""
        self.rate = rate
        self.passed = 0
        self._server_port = server_port
        self._tap = tap
        self._lock = threading.Lock()
        self._due = time.monotonic()
        # Small buffers: what the client has sent and the server has not seen is at most this.
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 << 10)
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._server_port))
            except OSError:
                client.close()
                continue
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets.append(one)
            tap = self._tap() if self._tap else None
            threading.Thread(target=self._up, args=(client, server, tap), daemon=True).start()
            threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket, tap: Callable[[bytes], bytes] | None) -> None:
        try:
            while data := client.recv(64 << 10):
                self._throttle(len(data))
                server.sendall(tap(data) if tap else data)
                with self._lock:
                    self.passed += len(data)
            server.shutdown(socket.SHUT_WR)
        except OSError:
            self._break(client, server)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        try:
            while data := server.recv(64 << 10):
                client.sendall(data)
        except OSError:
            pass
        self._break(client, server)

    @staticmethod
    def _break(*sockets: socket.socket) -> None:
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _throttle(self, length: int) -> None:
        if self.rate is None:
            return
        with self._lock:
            self._due = max(self._due, time.monotonic()) + length / self.rate
            pause = self._due - time.monotonic()
        time.sleep(max(0.0, pause))

    def wait_passed(self, count: int, push: Push, timeout: float = TIMEOUT_S) -> None:
        """Returns when the server has been given this many bytes; Failed when the push ends before."""
        deadline = time.monotonic() + timeout
        while self.passed < count:
            if push.process.poll() is not None:
                raise Failed(f"push ended with {push.wait()} after {self.passed} bytes: {push.err[-1000:].strip()}")
            if time.monotonic() > deadline:
                raise Failed(f"only {self.passed} of {count} bytes passed within {timeout:.0f} s")
            time.sleep(0.02)

    def close(self) -> None:
        """Ends every connection."""
        self._listener.close()
        self._break(*self._sockets)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PayloadFlipper:
    """Flips a bit of the payload in gRPC messages that a client sends over one connection.

    Frames and messages are followed, so that only payload is damaged: a flipped length or stream
    number would end the connection instead of testing the checksum. `payload` is the last field of a
    message, so three quarters into a large message lies payload and nothing else.
    """

    LARGE = 64 << 10

    def __init__(self, wants: Callable[[], bool]):
        """`wants` is asked once for each large message."""
        self._wants = wants
        self._preface = 24
        self._head = bytearray()
        self._frame_left = 0
        self._is_data = False
        self._stream = 0
        self._messages: dict[int, list[int]] = {}
        self._prefixes: dict[int, bytearray] = {}

    def __call__(self, data: bytes) -> bytes:
        out = bytearray(data)
        at = 0
        while at < len(out):
            if self._preface:
                step = min(self._preface, len(out) - at)
                self._preface -= step
            elif not self._frame_left:
                step = min(9 - len(self._head), len(out) - at)
                self._head += out[at : at + step]
                if len(self._head) == 9:
                    self._frame_left = int.from_bytes(self._head[:3], "big")
                    self._is_data = self._head[3] == 0
                    self._stream = int.from_bytes(self._head[5:], "big") & 0x7FFF_FFFF
                    if self._is_data and self._head[4] & 8:
                        raise Failed("the client pads DATA frames; the proxy does not follow that")
                    self._head.clear()
            else:
                step = min(self._frame_left, len(out) - at)
                if self._is_data:
                    self._walk(out, at, at + step)
                self._frame_left -= step
            at += step
        return bytes(out)

    def _walk(self, out: bytearray, at: int, stop: int) -> None:
        """`state` of a stream: bytes left of its message, position in it, position to damage."""
        state = self._messages.setdefault(self._stream, [0, 0, -1])
        prefix = self._prefixes.setdefault(self._stream, bytearray())
        while at < stop:
            if not state[0]:
                step = min(5 - len(prefix), stop - at)
                prefix += out[at : at + step]
                if len(prefix) == 5:
                    length = int.from_bytes(prefix[1:], "big")
                    damage = length * 3 // 4 if length >= self.LARGE and self._wants() else -1
                    state[:] = [length, 0, damage]
                    prefix.clear()
            else:
                step = min(state[0], stop - at)
                if state[1] <= state[2] < state[1] + step:
                    out[at + state[2] - state[1]] ^= 0x10
                state[0] -= step
                state[1] += step
            at += step
