"""What the scripts that measure share: the machine in words, sources, processor time, verdicts.

A measurement prints every round and ends with one verdict for each goal. With `--quick` sizes are
small and nothing is judged: that only shows that the script itself works.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS.parent / "tests" / "tools"))
import harness  # noqa: E402

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PIECE = 16 * MIB
TMPFS = Path("/dev/shm")
_CACHE = os.environ.get("TENSORFERRY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tensorferry"
LARGE_PYTHON = Path(_CACHE).expanduser() / "venv-big" / "bin" / "python"
"""The Python that has the large libraries; `scripts/test.sh all` makes it."""
SETTLE_S = 3.0
"""A source that changed later than this before a push may be fingerprinted as unsettled."""


def arguments(description: str | None, *, workdir: Path | None = None) -> argparse.ArgumentParser:
    """The options that every measurement has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    binary = SCRIPTS.parent / "target" / "release" / "tensorferry"
    parser.add_argument("--binary", type=Path, default=binary, help="default: %(default)s")
    parser.add_argument(
        "--workdir", type=Path, default=workdir or Path(tempfile.gettempdir()),
        help="a fresh folder in it holds everything and is deleted at the end; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="of the tensors' values; default: 1")
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing judged")
    parser.add_argument("--markdown", action="store_true", help="end with rows for docs/figures.md")
    return parser


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`."""
    best, found = "", "?"
    real = str(path.resolve())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        mount, kind = line.split()[1:3]
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, found = mount, kind
    return found


def machine() -> str:
    """Processor, cores, memory and kernel in one line."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {memory:.0f} GiB, Linux {platform.release()}"


@dataclass
class Figure:
    """One measurement: its header, its verdicts and the rows for the document."""

    title: str
    args: argparse.Namespace
    folder: Path
    rows: list[str] = field(default_factory=list)
    failed: bool = False

    def header(self) -> None:
        """Where and when this was measured."""
        now = datetime.datetime.now(datetime.timezone.utc)
        version = subprocess.run([self.args.binary, "--version"], capture_output=True, text=True, check=True)
        print(f"{self.title}: {version.stdout.strip()}")
        print(f"machine: {machine()}")
        print(f"file system: {file_system(self.folder)}; date: {now:%Y-%m-%d}; seed: {self.args.seed}", flush=True)

    def judge(self, what: str, value: float, sign: str, goal: float, unit: str = "", digits: int = 2) -> None:
        """Compares a value with its goal; `sign` is `<=` or `>=`."""
        good = value <= goal if sign == "<=" else value >= goal
        word = "not judged" if self.args.quick else "PASS" if good else "FAIL"
        self.failed |= not good and not self.args.quick
        shown = f"{value:.{digits}f}{unit}"
        print(f"{word}: {what}: {shown} (goal {sign} {goal:.4g}{unit})", flush=True)
        mark = {"<=": "≤", ">=": "≥"}[sign]
        self.rows.append(f"| {what} | {mark} {goal:.4g}{unit} | {shown} | {word} |")

    def invalid(self, why: str) -> None:
        """A measurement that did not take place as planned is a failure."""
        print(f"FAIL: {why}", flush=True)
        self.rows.append(f"| {why} | | | FAIL |")
        self.failed = True

    def end(self) -> int:
        """Prints the rows if they are wanted; the exit status."""
        if self.args.markdown:
            now = datetime.datetime.now(datetime.timezone.utc)
            print(f"\n{self.title}; {machine()}; {file_system(self.folder)}; {now:%Y-%m-%d}\n")
            print("| what | goal | measured | |\n|---|---:|---:|---|")
            print("\n".join(self.rows))
        return 1 if self.failed else 0


@contextlib.contextmanager
def figure(title: str, args: argparse.Namespace) -> Iterator[Figure]:
    """A measurement in a folder of its own, which is deleted at the end."""
    args.binary = args.binary.resolve()
    if not args.binary.is_file():
        sys.exit(f"{args.binary} does not exist: cargo build --release")
    args.workdir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="figure-", dir=args.workdir))
    try:
        found = Figure(title, args, folder)
        found.header()
        yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_noted: set[str] = set()


def flags(binary: Path, verb: str, wanted: dict[str, object]) -> list[str]:
    """`{"lanes": 4}` -> `--lanes 4`; what this program does not know, or is None, is left out."""
    known = subprocess.run([binary, verb, "--help"], capture_output=True, text=True, check=True).stdout
    out: list[str] = []
    for name, value in wanted.items():
        if value is None:
            continue
        if f"--{name} " in known:
            out += [f"--{name}", str(value)]
        elif (note := f"note: {verb} has no --{name}; measured without {name} {value}") not in _noted:
            _noted.add(note)
            print(note, flush=True)
    return out


# ---------------------------------------------------------------- sources


class Floats:
    """Endless random float32 values between 2^-15 and 2 with either sign, in pieces.

    With `sparse`, every other 2 KiB are zeros, as in a pruned model: a codec then saves half.
    """

    def __init__(self, seed: int, *, sparse: bool = False):
        self._random = random.Random(seed)
        block = struct.pack("<I", 0x87FF_FFFF) * 512
        block += (bytes(2048) if sparse else block)
        exponent = struct.pack("<I", 0x3800_0000) * 512
        exponent += (bytes(2048) if sparse else exponent)
        self._keep = int.from_bytes(block * (PIECE // 4096), "little")
        self._set = int.from_bytes(exponent * (PIECE // 4096), "little")

    def piece(self) -> bytes:
        """The next `PIECE` bytes."""
        values = int.from_bytes(self._random.randbytes(PIECE), "little") & self._keep | self._set
        return values.to_bytes(PIECE, "little")


def write_model(path: Path, lengths: Sequence[int], seed: int, *, sparse: bool = False, distinct: int = 4) -> int:
    """A safetensors file of one-dimensional F32 tensors; returns the length of its header.

    `distinct` pieces of values repeat: making random values takes longer than moving them.
    """
    header: dict[str, object] = {}
    offset = 0
    for index, length in enumerate(lengths):
        spec = {"dtype": "F32", "shape": [length // 4], "data_offsets": [offset, offset + length]}
        header[f"layer.{index}.weight"] = spec
        offset += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source = Floats(seed, sparse=sparse)
    pieces = [source.piece() for _ in range(max(1, min(distinct, -(-offset // PIECE))))]
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for index, start in enumerate(range(0, offset, PIECE)):
            out.write(memoryview(pieces[index % len(pieces)])[: offset - start])
    return 8 + len(text)


def make_format(python: Path, kind: str, path: Path, extra: Sequence[str]) -> Path:
    """A checkpoint of `format_files.py`; the source to name."""
    command = [str(python), str(SCRIPTS / "format_files.py"), kind, str(path), *extra]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise harness.Failed(f"{kind} cannot be made: {made.stderr[-1000:].strip()}")
    return Path(made.stdout.splitlines()[-1])


def warm(path: Path) -> None:
    """Reads a file once, so that it is in memory."""
    with path.open("rb", buffering=0) as file:
        view = memoryview(bytearray(PIECE))
        while file.readinto(view):
            pass


# ---------------------------------------------------------------- processes


def library(name: str, folder: Path) -> Path:
    """Compiles one of the C files beside this one, for LD_PRELOAD."""
    out = folder / f"{name}.so"
    # -fno-builtin: a loop that copies must not become a call of the memcpy that it stands for.
    options = ["-O2", "-Wall", "-fno-builtin", "-shared", "-fPIC"]
    subprocess.run(["cc", *options, "-o", out, SCRIPTS / name, "-ldl"], check=True)
    return out


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its children that have ended."""
    text = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, text[11:15])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Run:
    """A program that ran to its end."""

    seconds: float
    cpu: float
    out: str


def timed(command: Sequence[str | Path], *, timeout: float = harness.TIMEOUT_S) -> Run:
    """Runs a program; wall time from before its start to after its end. Failed unless it ends with 0."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begun = time.monotonic()
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        stopper = threading.Timer(timeout, process.kill)
        stopper.daemon = True
        stopper.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begun
        stopper.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise harness.Failed(f"{command[0]} ended with {process.returncode}: {err.read()[-1000:].strip()}")
        return Run(seconds, usage.ru_utime + usage.ru_stime, out.read())


def push_command(binary: Path, source: Path, port: int, name: str, extra: Sequence[str] = ()) -> list[str]:
    """The command line of a push."""
    target = f"ferry://127.0.0.1:{port}/{name}"
    return [str(binary), "push", str(source), target, "--format", "json", *extra]


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)
