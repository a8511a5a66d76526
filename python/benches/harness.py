"""What the benches of the Python package share: a server, memory of a process, rounds, figures.

Every bench prints one JSON object a line on standard output, each a figure, and talks on standard
error. What is compared runs interleaved in every round, in an order that the seed shuffles, because the
speed of a shared machine drifts; ratios are taken within a round and their median is the figure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MIB, GIB = 1 << 20, 1 << 30
UNITS = {"": 1, "K": 1 << 10, "M": MIB, "G": GIB}

SERVE = """
import sys, tensorferry
with tensorferry.Server(sys.argv[1], listen="127.0.0.1:0") as server:
    print(server.address, flush=True)
    sys.stdin.read()
"""


def parse_size(text: str) -> int:
    """Bytes: ``256M``, ``2G``, ``4096``; powers of 1,024."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: 4096, 256M, 2G")
    return int(float(number) * UNITS[unit])


def arguments(doc: str | None, *, size: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with what every bench takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=parse_size, default=parse_size(size), metavar="SIZE", help=f"default {size}")
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"default {rounds}; one more is run first to warm up"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--binary", type=Path, help="the command line program, which then is the server; else a Python process"
    )
    parser.add_argument(
        "--workdir", type=Path, default=Path(tempfile.gettempdir()), help="where everything lands; emptied at the end"
    )
    parser.add_argument("--durability", help="of what tensorferry sends; its own default if absent")
    return parser


def checked(args: argparse.Namespace) -> argparse.Namespace:
    if args.rounds < 1 or args.bytes < 1:
        sys.exit("at least one round and one byte")
    if args.binary is not None and not os.access(args.binary, os.X_OK):
        sys.exit(f"{args.binary} is no program")
    return args


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of the save that the command line asked for."""
    return {} if args.durability is None else {"durability": args.durability}


@contextlib.contextmanager
def work_folder(args: argparse.Namespace) -> Iterator[Path]:
    args.workdir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="tensorferry-bench-", dir=args.workdir))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Server:
    """A server in a process of its own, the command line program or a Python one."""

    def __init__(self, root: Path, binary: Path | None) -> None:
        self.root = root
        if binary is None:
            command = [sys.executable, "-c", SERVE, str(root)]
        else:
            command = [str(binary), "serve", str(root), "--listen", "127.0.0.1:0", "--format", "json", "--quiet"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process: subprocess.Popen[str] = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"the server ended with {self.process.wait()}")
        self.address: str = line if binary is None else json.loads(line)["address"]

    def url(self, name: str) -> str:
        return f"ferry://{self.address}/{name}"

    def remove(self, name: str) -> None:
        """Takes a published checkpoint from the disk, so that the next one has the same room."""
        shutil.rmtree(self.root / name)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Child:
    """A Python program that answers one JSON line to each that it is given."""

    def __init__(self, program: str, *arguments: str) -> None:
        command = [sys.executable, "-c", program, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: subprocess.Popen[str] = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]

    def tell(self, request: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a child ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, request: object) -> Any:
        self.tell(request)
        return self.answer()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                # What was not read by a child that is dead cannot be flushed to it.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def anonymous_memory(pid: int) -> int:
    """Bytes of memory of a process that no file stands behind (RssAnon)."""
    text = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class AnonymousPeak:
    """The most :func:`anonymous_memory` of a process while this is open, by sampling.

    Peaks shorter than ``interval_s`` may be missed. What is to be compared with it is the memory before
    the *first* piece of work: an allocator keeps what it had once, and later work fits into that.
    """

    def __init__(self, pid: int, interval_s: float = 0.002) -> None:
        self._pid = pid
        self._interval_s = interval_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.bytes = 0

    def _sample(self) -> None:
        while not self._is_over.wait(self._interval_s):
            self.bytes = max(self.bytes, anonymous_memory(self._pid))

    def __enter__(self) -> AnonymousPeak:
        self.bytes = anonymous_memory(self._pid)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_memory(self._pid))


def interleaved(arms: dict[str, Callable[[], Any]], rounds: int, seed: int) -> dict[str, list[Any]]:
    """Runs every arm once a round, in an order of that round. The first round warms up and is dropped."""
    order = random.Random(seed)
    found: dict[str, list[Any]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        names = list(arms)
        order.shuffle(names)
        for name in names:
            begun = time.perf_counter()
            value = arms[name]()
            say(f"round {number} of {rounds}: {name} took {time.perf_counter() - begun:.2f} s in all")
            if number > 0:
                found[name].append(value)
    return found


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """How many times as long the first took, round by round."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def median(values: list[float]) -> float:
    return statistics.median(values)


def figure(name: str, args: argparse.Namespace, **values: Any) -> None:
    """Prints one figure, with what it was measured on."""
    import tensorferry

    where = {
        "bytes": args.bytes,
        "rounds": args.rounds,
        "seed": args.seed,
        "server": "python" if args.binary is None else "binary",
        "durability_asked": args.durability,
        "workdir_file_system": file_system(args.workdir),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "tensorferry": getattr(tensorferry, "__version__", None),
    }
    print(json.dumps({"figure": name, **rounded(values), **where}), flush=True)


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return value


def file_system(folder: Path) -> str:
    """Type of the file system that a folder is on, as the kernel calls it."""
    resolved = folder.resolve()
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [(len(where), kind) for _, where, kind, *_ in mounts if resolved.is_relative_to(where)]
    return max(holding)[1]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
