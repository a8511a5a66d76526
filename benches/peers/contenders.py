"""What is compared: each moves the same `.npy` files into an empty folder through a server of its own.

A contender says how its server starts, which client moves the files and, where the client's whole
life is not what counts, how long it took by its own account. Variants are settings that are all
tried before the first round; the fastest is the one that competes.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import supply
from observe import Failed, Observed, observe, touch_memory
from source import Source
from tally import MIB, Run

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "tests" / "tools"))
import harness  # noqa: E402

MARGIN_BYTES = 256 * MIB
"""Beyond the files: what programs take themselves."""

LISTENS_WITHIN_S = 30.0


@dataclass(frozen=True)
class Serving:
    """A server that listens."""

    port: int
    pid: int | None


class Contender:
    """One way to move the files."""

    name: str
    version: str
    variants: tuple[str, ...] = ("",)

    def serve(self, folder: Path, target: Path, variant: str) -> contextlib.AbstractContextManager[Serving]:
        """A server for one run. `folder` is for its own files, what it receives goes to `target`."""
        raise NotImplementedError

    def command(self, source: Source, target: Path, port: int, variant: str) -> Sequence[str | Path]:
        """The client."""
        raise NotImplementedError

    def read(self, source: Source, seen: Observed, variant: str) -> Run:
        """What a run says; the whole life of the client counts."""
        return Run(
            seen.seconds, source.nbytes, seen.client_cpu_s, seen.server_cpu_s,
            seen.client.rss_bytes, seen.server.rss_bytes, seen.client.anon_bytes, seen.server.anon_bytes, variant,
        )  # fmt: skip

    def landed(self, target: Path) -> Path | None:
        """The folder where the files lie afterwards, None when nothing stays."""
        return target

    def run(self, source: Source, folder: Path, target: Path, variant: str) -> Run:
        """One turn. The server listens before the clock starts."""
        with self.serve(folder, target, variant) as serving:
            command = self.command(source, target, serving.port, variant)
            touch_memory(source.nbytes + MARGIN_BYTES)
            seen = observe(command, serving.pid, timeout=harness.TIMEOUT_S)
        return self.read(source, seen, variant)


@contextlib.contextmanager
def daemon(command: Sequence[str | Path], log: Path, *, port: int | None = None) -> Iterator[Serving]:
    """A server that listens on `port`, or says `listening on ...PORT` in its first line; ended afterwards."""
    with log.open("wb") as out:
        stdout = subprocess.PIPE if port is None else out
        process = subprocess.Popen(list(map(str, command)), stdout=stdout, stderr=out, stdin=subprocess.DEVNULL)
    try:
        if port is None:
            port = _said_port(process, log)
        else:
            _wait_listening(process, port, log)
        yield Serving(port, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def _said_port(process: subprocess.Popen[bytes], log: Path) -> int:
    lines: queue.Queue[bytes] = queue.Queue()
    assert process.stdout is not None
    reader = threading.Thread(target=lambda out: lines.put(out.readline()), args=(process.stdout,), daemon=True)
    reader.start()
    try:
        line = lines.get(timeout=LISTENS_WITHIN_S).decode(errors="replace").strip()
    except queue.Empty:
        raise Failed(f"{process.args[0]} does not listen: {harness.tail(log)}") from None
    port = line.replace(":", " ").rpartition(" ")[2]
    if not line.startswith("listening on ") or not port.isdigit():
        raise Failed(f"{process.args[0]} said {line!r}: {harness.tail(log)}")
    return int(port)


def _wait_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + LISTENS_WITHIN_S
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise Failed(f"{process.args[0]} does not listen: {harness.tail(log)}")


def events(text: str) -> list[dict[str, object]]:
    """The objects among the lines that a program printed."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


class Ceiling(Contender):
    """The plain TCP program of `tensorferry bench`: no framing, no names, no answer."""

    def __init__(self, binary: Path, kind: str):
        self.name, self.kind, self.binary = f"ceiling {kind}", kind, binary
        self.version = supply.first_line(binary, "--version")

    @contextlib.contextmanager
    def serve(self, folder: Path, target: Path, variant: str) -> Iterator[Serving]:
        # Both of its sides are one process.
        yield Serving(0, None)

    def command(self, source: Source, target: Path, port: int, variant: str) -> Sequence[str | Path]:
        return [
            self.binary, "bench", target, "--only", self.kind, "--rounds", "1", "--no-warm-up", "--source", source.whole,
            "--bytes", str(source.nbytes), "--format", "json",
        ]  # fmt: skip

    def read(self, source: Source, seen: Observed, variant: str) -> Run:
        for event in events(seen.out):
            if event.get("event") == "ceiling" and event.get("name") == self.kind:
                if event["bytes"] != source.nbytes:
                    raise Failed(f"{self.name} moved {event['bytes']} bytes, not {source.nbytes}")
                run = super().read(source, seen, "both sides in one process")
                run.seconds, run.client_cpu_s = float(event["seconds"]), event.get("cpu_seconds")
                return run
        raise Failed(f"no figure of {self.kind} in {seen.out[-300:]!r}")

    def landed(self, target: Path) -> Path | None:
        return None


class Tensorferry(Contender):
    """A push with so many lanes; checksums are always on."""

    def __init__(self, binary: Path, lanes: str, serve: Sequence[str] = (), push: Sequence[str] = ()):
        self.name, self.lanes, self.binary = f"tensorferry, lanes {lanes}", lanes, binary
        self.serve_flags, self.push_flags = list(serve), list(push)
        self.version = supply.first_line(binary, "--version")

    @contextlib.contextmanager
    def serve(self, folder: Path, target: Path, variant: str) -> Iterator[Serving]:
        with harness.Server(self.binary, target, harness.free_port(), extra=self.serve_flags) as server:
            yield Serving(server.port, server.process.pid)

    def command(self, source: Source, target: Path, port: int, variant: str) -> Sequence[str | Path]:
        to = f"ferry://127.0.0.1:{port}/run"
        return [self.binary, "push", source.folder, to, "--format", "json", "--lanes", self.lanes, *self.push_flags]

    def read(self, source: Source, seen: Observed, variant: str) -> Run:
        for event in reversed(events(seen.out)):
            if event.get("event") == "done":
                if event["bytes"] != source.nbytes:
                    raise Failed(f"{self.name} moved {event['bytes']} bytes, not {source.nbytes}")
                said = f"durability {event['durability']}"
                if event.get("bottleneck"):
                    said += f", bottleneck {event['bottleneck']}"
                return super().read(source, seen, said)
        raise Failed(f"no done event in {seen.out[-300:]!r}")

    def landed(self, target: Path) -> Path | None:
        return target / "run"


class Rsync(Contender):
    """`rsync -W --inplace` to its own daemon."""

    name = "rsync"

    def __init__(self, *, install: bool):
        self.rsync = supply.system("rsync", "rsync", install=install)
        self.version = supply.first_line(self.rsync, "--version")

    def serve(self, folder: Path, target: Path, variant: str) -> contextlib.AbstractContextManager[Serving]:
        port = harness.free_port()
        config = folder / "rsyncd.conf"
        config.write_text(
            f"port = {port}\naddress = 127.0.0.1\nuse chroot = no\nmax verbosity = 0\n"
            f"log file = {folder / 'rsyncd.log'}\n[target]\npath = {target}\nread only = no\n"
            f"uid = {os.geteuid()}\ngid = *\n"
        )
        command = [self.rsync, "--daemon", "--no-detach", f"--config={config}"]
        return daemon(command, folder / "rsync.log", port=port)

    def command(self, source: Source, target: Path, port: int, variant: str) -> Sequence[str | Path]:
        return [self.rsync, "-a", "-W", "--inplace", f"{source.folder}/", f"rsync://127.0.0.1:{port}/target/"]


class Rclone(Contender):
    """`rclone copy` to `rclone serve`."""

    name = "rclone"
    variants = ("webdav", "sftp")

    def __init__(self, *, install: bool):
        self.rclone = supply.system("rclone", "rclone", install=install)
        self.version = supply.first_line(self.rclone, "version")
        self.quiet = ["--config", "", "--log-level", "ERROR"]

    def serve(self, folder: Path, target: Path, variant: str) -> contextlib.AbstractContextManager[Serving]:
        port = harness.free_port()
        access = ["--user", "bench", "--pass", "bench"] if variant == "sftp" else []
        command = [self.rclone, *self.quiet, "serve", variant, target, "--addr", f"127.0.0.1:{port}", *access]
        return daemon(command, folder / "rclone.log", port=port)

    def command(self, source: Source, target: Path, port: int, variant: str) -> Sequence[str | Path]:
        to = f":webdav,url='http://127.0.0.1:{port}':"
        if variant == "sftp":
            password = supply.first_line(self.rclone, *self.quiet, "obscure", "bench")
            to = f":sftp,host=127.0.0.1,port={port},user=bench,pass='{password}':"
        return [self.rclone, *self.quiet, "copy", source.folder, to]


class Scp(Contender):
    """`scp` to an sshd of its own with keys of its own and the cheapest cipher that authenticates."""

    name = "scp"
    variants = ("sftp protocol", "scp protocol")

    def __init__(self, *, install: bool):
        self.sshd = supply.system("sshd", "openssh-server", install=install)
        self.scp = supply.system("scp", "openssh-client", install=install)
        self.keygen = supply.system("ssh-keygen", "openssh-client", install=install)
        self.version = supply.first_line(supply.system("ssh", "openssh-client", install=install), "-V")

    def serve(self, folder: Path, target: Path, variant: str) -> contextlib.AbstractContextManager[Serving]:
        port = harness.free_port()
        for key in ("host_key", "user_key"):
            if not (folder / key).is_file():
                command = [self.keygen, "-q", "-t", "ed25519", "-N", "", "-f", folder / key]
                subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        if os.geteuid() == 0:
            # sshd refuses to run as root without the folder of its unprivileged half.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        config = folder / "sshd_config"
        config.write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host_key'}\nPidFile none\n"
            f"AuthorizedKeysFile {folder / 'user_key.pub'}\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nSubsystem sftp internal-sftp\n"
        )
        return daemon([self.sshd, "-D", "-e", "-f", config], folder / "sshd.log", port=port)

    def command(self, source: Source, target: Path, port: int, variant: str) -> Sequence[str | Path]:
        # The target lies beside the keys: both are in the folder of this run.
        key = target.parent / "user_key"
        options = ["IdentitiesOnly=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes"]
        return [
            self.scp, "-q", "-F", "none", *(["-O"] if variant == "scp protocol" else []), "-P", str(port), "-i", key,
            "-c", "aes128-gcm@openssh.com", *(word for option in options for word in ("-o", option)),
            *source.paths, f"{getpass.getuser()}@127.0.0.1:{target}/",
        ]  # fmt: skip


class Flight(Contender):
    """Arrow Flight: DoPut of slices of the mapped source into `np.memmap`s. Only the DoPuts count."""

    name = "Arrow Flight"

    def __init__(self, *, install: bool):
        self.python = supply.flight_python(install=install)
        self.version = supply.first_line(self.python, "-c", "import pyarrow; print('pyarrow', pyarrow.__version__)")
        self.variants = tuple(
            f"batches of {size} MiB, {streams} stream{'s' * (streams > 1)}" for streams in (1, 2) for size in (1, 2, 4, 8)
        )

    def serve(self, folder: Path, target: Path, variant: str) -> contextlib.AbstractContextManager[Serving]:
        return daemon([self.python, HERE / "flight_server.py", target], folder / "flight.log")

    def command(self, source: Source, target: Path, port: int, variant: str) -> Sequence[str | Path]:
        words = variant.split()
        return [
            self.python, HERE / "flight_client.py", source.folder, str(port),
            "--batch-bytes", str(int(words[2]) * MIB), "--streams", words[4],
        ]  # fmt: skip

    def read(self, source: Source, seen: Observed, variant: str) -> Run:
        said = events(seen.out)[-1]
        if said["bytes"] != source.nbytes:
            raise Failed(f"{self.name} moved {said['bytes']} bytes, not {source.nbytes}")
        run = super().read(source, seen, variant)
        run.seconds, run.client_cpu_s = float(said["seconds"]), float(said["cpu_seconds"])
        return run


class Stock(Contender):
    """A first draft in tonic: default settings, messages of 32 KiB."""

    name = "stock tonic"

    def __init__(self) -> None:
        self.stock = supply.stock()
        self.version = supply.stock_version()

    def serve(self, folder: Path, target: Path, variant: str) -> contextlib.AbstractContextManager[Serving]:
        port = harness.free_port()
        return daemon([self.stock, "serve", target, f"127.0.0.1:{port}"], folder / "stock.log", port=port)

    def command(self, source: Source, target: Path, port: int, variant: str) -> Sequence[str | Path]:
        return [self.stock, "push", source.folder, f"127.0.0.1:{port}"]
