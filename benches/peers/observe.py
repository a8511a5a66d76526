"""Looks at running programs from outside: processor time, memory, what the disk still owes."""

from __future__ import annotations

import mmap
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tally import MIB

SAMPLE_S = 0.05
REAPED_WITHIN_S = 10.0
DRAINED_BYTES = 10 * MIB
DRAINED_WITHIN_S = 600.0


class Failed(Exception):
    """A program did not do what it must."""


# ---------------------------------------------------------------- /proc


def fields_of(text: str, names: Sequence[str]) -> dict[str, int]:
    """Bytes of the named `Name:   123 kB` lines of a file in /proc."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name in names and rest.split()[1:] == ["kB"]:
            found[name] = int(rest.split()[0]) * 1024
    return found


def descendants(pid: int) -> list[int]:
    """The living children of a process, theirs, and so on."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
            for task in tasks:
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue
        if parent != pid:
            found.append(parent)
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time of a process, its descendants, and those of them that have been reaped."""
    ticks = 0
    for one in [pid, *descendants(pid)]:
        try:
            text = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, text[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def cpu_seconds_at_rest(pid: int) -> float:
    """The same once the processes that served the last client have ended."""
    until = time.monotonic() + REAPED_WITHIN_S
    while descendants(pid) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.1)
    return cpu_seconds(pid)


@dataclass
class Memory:
    """The most that one side held at once. All its processes count, what they share more than once."""

    rss_bytes: int | None = None
    anon_bytes: int | None = None

    def see(self, pid: int) -> None:
        rss = anon = 0
        highest = 0
        for one in [pid, *descendants(pid)]:
            try:
                text = Path(f"/proc/{one}/status").read_text()
            except OSError:
                continue
            found = fields_of(text, ("VmHWM", "VmRSS", "RssAnon"))
            rss += found.get("VmRSS", 0)
            anon += found.get("RssAnon", 0)
            highest = max(highest, found.get("VmHWM", 0))
        if max(rss, highest):
            self.rss_bytes = max(self.rss_bytes or 0, rss, highest)
            self.anon_bytes = max(self.anon_bytes or 0, anon)


# ---------------------------------------------------------------- a client beside its server


@dataclass
class Observed:
    """A client that ran to its end, and what its server did meanwhile."""

    seconds: float
    out: str
    client_cpu_s: float
    server_cpu_s: float | None
    client: Memory
    server: Memory


def observe(command: Sequence[str | Path], server_pid: int | None, *, env: dict[str, str] | None = None,
            timeout: float = 600.0) -> Observed:  # fmt: skip
    """Runs a client; the clock runs from before its start to after its end. Failed unless it ends with 0."""
    client, server = Memory(), Memory()
    before = cpu_seconds_at_rest(server_pid) if server_pid else 0.0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begun = time.monotonic()
        process = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=env
        )
        ended = threading.Event()
        sampler = threading.Thread(target=_sample, args=(process.pid, client, server_pid, server, ended), daemon=True)
        sampler.start()
        stopper = threading.Timer(timeout, process.kill)
        stopper.daemon = True
        stopper.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begun
        stopper.cancel()
        ended.set()
        sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise Failed(f"{command[0]} ended with {process.returncode}: {err.read()[-1000:].strip()}")
        spent = cpu_seconds_at_rest(server_pid) - before if server_pid else None
        return Observed(seconds, out.read(), usage.ru_utime + usage.ru_stime, spent, client, server)


def _sample(client_pid: int, client: Memory, server_pid: int | None, server: Memory, ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_S):
        client.see(client_pid)
        if server_pid:
            server.see(server_pid)
    if server_pid:
        server.see(server_pid)


# ---------------------------------------------------------------- memory and disk


def touch_memory(nbytes: int) -> None:
    """Has the system find free memory, so that whoever comes next gets the same as everybody else.

    A virtual machine gives free memory back to its host, and getting it again costs more than a whole
    transfer: without this, whoever follows somebody that has just used memory would win.
    """
    free = fields_of(Path("/proc/meminfo").read_text(), ("MemFree",))["MemFree"]
    nbytes = min(nbytes, free * 9 // 10)
    if nbytes > 0:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        mmap.mmap(-1, nbytes, flags=flags).close()


def dirty_bytes(meminfo: str | None = None) -> int:
    """What waits to be written, or is being written, to any disk."""
    found = fields_of(meminfo or Path("/proc/meminfo").read_text(), ("Dirty", "Writeback"))
    return sum(found.values())


def drain(folder: Path) -> None:
    """Returns when the disk has caught up, so that earlier writes are nobody's burden."""
    until = time.monotonic() + DRAINED_WITHIN_S
    while True:
        subprocess.run(["sync", "-f", folder], check=True)
        left = dirty_bytes()
        if left < DRAINED_BYTES:
            return
        if time.monotonic() > until:
            raise Failed(f"{left / MIB:.0f} MiB are still dirty after {DRAINED_WITHIN_S:.0f} s")
        time.sleep(0.5)
