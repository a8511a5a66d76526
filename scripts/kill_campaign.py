#!/usr/bin/env python3
"""Kills server and client again and again, and checks what is left each time.

Each iteration pushes one checkpoint into a fresh root through the judging relay.
At random moments `kill -9` hits the server or the client; the server comes back
on its port, the client's command is given again, until the push is done. Then
every tensor is compared with its source, and the relay tells whether a cell that
was acked durable travelled twice. What is at stake is in docs/semantics.md: a
crash of either process costs no durable byte and never yields a wrong one.

The same seed gives the same victims and the same fractions of the expected time;
the exact moment within the protocol is up to the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent.parent / "tests" / "tools"
sys.path.insert(0, str(TOOLS))

from relay import Relay  # noqa: E402

NAME = "campaign/model"
PIECE = 4 << 20
NETWORK = 5  # exit status: network, run again
MAX_RUNS = 30  # of the client in one iteration


class Failure(Exception):
    """The program broke a promise; the text says which."""


# ------------------------------------------------------------------ the source


@dataclass
class Tensor:
    """Where a tensor's bytes are in the source."""

    path: Path
    offset: int
    length: int
    shape: list[int]


def shapes(total: int, rng: random.Random) -> list[tuple[str, list[int]]]:
    """Large and tiny, odd and empty tensors of U8 that make about `total` bytes."""
    found: list[tuple[str, list[int]]] = [("empty", [0, 7]), ("scalar", [])]
    found += [(f"bias.{i}", [rng.randrange(1, 5000)]) for i in range(60)]
    left = total - sum(s[0] for n, s in found if n.startswith("bias"))
    for i in range(10_000):
        if left <= 0:
            break
        rows = min(left, rng.randrange(total // 40, total // 8) | 1)
        found.append((f"layer.{i}.weight", [rows]))
        left -= rows
    rng.shuffle(found)
    return found


def make_source(folder: Path, total: int, rng: random.Random) -> dict[str, Tensor]:
    """Two shards of random bytes; written by hand so that it needs no package."""
    folder.mkdir(parents=True)
    every, tensors = shapes(total, rng), {}
    weight_map = {}
    for number, part in enumerate((every[::2], every[1::2]), 1):
        path = folder / f"model-{number:05}-of-00002.safetensors"
        header, at = {}, 0
        for name, shape in part:
            length = shape[0] * (shape[1] if len(shape) > 1 else 1) if shape else 1
            header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [at, at + length]}
            tensors[name] = Tensor(path, at, length, shape)
            weight_map[name] = path.name
            at += length
        text = json.dumps(header).encode()
        for name, _ in part:
            tensors[name].offset += 8 + len(text)
        with path.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for start in range(0, at, PIECE):
                n = min(PIECE, at - start)
                # Every third piece shrinks, so that a codec has work; none equals another.
                if start // PIECE % 3 == 2:
                    unit = rng.randbytes(4099)
                    out.write((unit * (n // len(unit) + 1))[:n])
                else:
                    out.write(rng.randbytes(n))
            out.flush()
            os.fsync(out.fileno())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def compare(landed: Path, tensors: dict[str, Tensor]) -> list[str]:
    """What is wrong in a landed checkpoint."""
    manifest = json.loads((landed / "manifest.json").read_text())
    rows = {row["name"]: row for row in manifest["tensors"]}
    wrong = [f"not in the manifest: {name}" for name in tensors.keys() - rows.keys()]
    wrong += [f"not in the source: {name}" for name in rows.keys() - tensors.keys()]
    ours, theirs = bytearray(PIECE), bytearray(PIECE)
    for name in sorted(tensors.keys() & rows.keys()):
        want, row = tensors[name], rows[name]
        path = landed / row["file"]
        if row["shape"] != want.shape or row["nbytes"] != want.length:
            wrong.append(f"{name}: shape {row['shape']}, {row['nbytes']} bytes")
        elif path.stat().st_size != row["data_offset"] + want.length:
            wrong.append(f"{name}: file of {path.stat().st_size} bytes")
        else:
            with want.path.open("rb") as source, path.open("rb") as copy:
                source.seek(want.offset)
                copy.seek(row["data_offset"])
                for start in range(0, want.length, PIECE):
                    n = min(PIECE, want.length - start)
                    a, b = memoryview(ours)[:n], memoryview(theirs)[:n]
                    if source.readinto(a) != n or copy.readinto(b) != n:
                        wrong.append(f"{name}: short read at {start}")
                    elif ours != theirs if n == PIECE else bytes(a) != bytes(b):
                        at = next(i for i in range(n) if a[i] != b[i])
                        wrong.append(f"{name}: byte {start + at} differs")
                        break
    return wrong


# --------------------------------------------------------------- the processes


class Child:
    """A process of ours, its output in files (a pipe nobody reads would stall it)."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        self.started = time.monotonic()

    def lines(self) -> list[str]:
        """Whole lines of stdout so far."""
        return self._out.read_text(errors="replace").rpartition("\n")[0].splitlines()

    def tail(self) -> str:
        """The end of stderr, for a person."""
        return self._err.read_text(errors="replace")[-2000:].strip()

    def wait(self, timeout: float) -> int | None:
        """Exit status, or None when it still runs after `timeout` seconds."""
        try:
            return self.process.wait(max(0.0, timeout))
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """kill -9, and reap."""
        self.process.kill()
        self.process.wait()


def free_port(rng: random.Random) -> int:
    """A port below the range from which outgoing connections draw theirs, so that
    none of those takes it while the server is dead."""
    for _ in range(1000):
        port = rng.randrange(15_000, 30_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise SystemExit("no free port")


# --------------------------------------------------------------- one iteration


@dataclass
class Outcome:
    """What one iteration did."""

    number: int
    kills: list[tuple[str, float, float]] = field(default_factory=list)  # victim, fraction, s
    in_flight: int = 0  # kills while a session was moving chunks
    missed: int = 0
    client_runs: int = 0
    seconds: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def line(self, seed: int) -> str:
        """One line for a person."""
        kills = " ".join(f"{v}@{s:.2f}s({f:.0%})" for v, f, s in self.kills) or "no kill"
        get = self.report.get
        broken = sum(get("violations", {}).values())
        return (
            f"#{self.number:<4} seed {seed} {kills:<40} runs {self.client_runs}"
            f" sessions {get('sessions', 0)} re-sent {get('bytes_resent', 0)}"
            f" violations {broken} {self.seconds:.1f}s {'FAILED' if self.failures else 'ok'}"
        )


class Iteration:
    """Server, relay and client of one push, with the kills in between."""

    def __init__(self, campaign: Campaign, number: int, victims: list[str], rng: random.Random):
        self.campaign, self.victims, self.rng = campaign, victims, rng
        self.outcome = Outcome(number)
        self.base = campaign.workdir / f"root-{number}"
        self.logs = campaign.workdir / "logs" / str(number)
        self.port = free_port(rng)
        self.children: list[Child] = []
        self.server: Child | None = None
        self.client: Child | None = None

    def run(self) -> Outcome:
        """All of it; processes are gone and the root is deleted afterwards."""
        started = time.monotonic()
        self.base.mkdir(parents=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            with Relay(("127.0.0.1", self.port)) as relay:
                self.relay = relay
                try:
                    self._push()
                    self._check_landed()
                except Failure as failure:
                    self.outcome.failures.append(str(failure))
                finally:
                    for child in self.children:
                        child.kill()
            self._check_wire()
        finally:
            for child in self.children:
                child.kill()
            self.outcome.seconds = time.monotonic() - started
            if not (self.outcome.failures and self.campaign.keep):
                shutil.rmtree(self.base, ignore_errors=True)
            if not self.outcome.failures:
                shutil.rmtree(self.logs, ignore_errors=True)
        return self.outcome

    # ------------------------------------------------------------ doing things

    def _start(self, *args: str) -> Child:
        log = self.logs / f"{len(self.children):02}-{args[0]}"
        child = Child([str(self.campaign.binary), *args, "--format", "json"], log)
        self.children.append(child)
        return child

    def _start_server(self) -> None:
        self.server = self._start("serve", str(self.base), "--listen", f"127.0.0.1:{self.port}")
        until = time.monotonic() + 30
        while not (lines := self.server.lines()):
            status = self.server.wait(0.01)
            if status is not None or time.monotonic() > until:
                raise Failure(f"the server did not start, exit {status}: {self.server.tail()}")
        first = json.loads(lines[0])
        if first.get("address") != f"127.0.0.1:{self.port}":
            raise Failure(f"the server's first line is {lines[0]}")

    def _start_client(self) -> None:
        self.outcome.client_runs += 1
        if self.outcome.client_runs > MAX_RUNS:
            raise Failure(f"not done after {MAX_RUNS} runs of the client")
        address = f"ferry://127.0.0.1:{self.relay.port}/{NAME}"
        more = ["--chunk", self.campaign.chunk] if self.campaign.chunk else []
        self.client = self._start("push", str(self.campaign.source), address, *more)

    def _push(self) -> None:
        """Until the client says done; every kill is drawn anew from what is left."""
        self._start_server()
        self._start_client()
        for victim in self.victims:
            fraction = self.rng.random()
            delay = fraction * self._expected()
            if self._wait_client(delay):
                self.outcome.missed += 1
                return
            self._kill(victim, fraction, delay)
        assert self.client
        if not self._wait_client(self.campaign.timeout):
            raise Failure(
                f"not done {self.campaign.timeout:.0f} s after the last kill; stdout ends with"
                f" {self.client.lines()[-1:]}, stderr with {self.client.tail()!r}"
            )

    def _expected(self) -> float:
        """Seconds that the rest of this push should take."""
        durable = sum(judge.durable_bytes() for judge in self.relay.judges.values())
        rest = max(0.05, 1 - durable / self.campaign.total)
        return self.campaign.clean_seconds * rest

    def _wait_client(self, seconds: float) -> bool:
        """True: done. A client that found the network gone is run again."""
        assert self.client and self.server
        until = time.monotonic() + seconds
        while (status := self.client.wait(until - time.monotonic())) is not None:
            if status == 0:
                return self._done_line(self.client)
            if status != NETWORK:
                raise Failure(f"the client ended with exit {status}: {self.client.tail()}")
            self._start_client()
        if (status := self.server.wait(0)) is not None:
            raise Failure(f"the server ended with exit {status}: {self.server.tail()}")
        return False

    def _done_line(self, client: Child) -> bool:
        lines = client.lines()
        last = json.loads(lines[-1]) if lines else {}
        if last.get("event") != "done" or last.get("checkpoint") != NAME:
            raise Failure(f"exit 0, but the last line is {lines[-1:]}")
        if not self.outcome.kills and self.outcome.client_runs == 1:
            self.campaign.clean_times.append(time.monotonic() - client.started)
        return True

    def _kill(self, victim: str, fraction: float, delay: float) -> None:
        assert self.client and self.server
        sessions = self.relay.sessions
        self.outcome.in_flight += any(s.chunks and not s.ended and not s.done for s in sessions)
        (self.server if victim == "server" else self.client).kill()
        self.outcome.kills.append((victim, fraction, delay))
        if self.rng.random() < 0.3:  # Else it is back at once.
            time.sleep(self.rng.uniform(0.0, 0.5))
        if victim == "server":
            self._start_server()
        else:
            self._start_client()

    # --------------------------------------------------------- judging the end

    def _check_landed(self) -> None:
        self.outcome.failures += compare(self.base / NAME, self.campaign.tensors)
        transfers = self.base / ".tensorferry" / "transfers"
        until = time.monotonic() + 5  # The journal goes after Done was said.
        while transfers.exists() and (left := sorted(p.name for p in transfers.iterdir())):
            if time.monotonic() > until:
                raise Failure(f"left in transfers: {left}")
            time.sleep(0.02)

    def _check_wire(self) -> None:
        self.outcome.failures += [f"unreadable {what}" for what in self.relay.unreadable]
        judges = list(self.relay.judges.values())
        if len(judges) != 1:
            self.outcome.failures.append(f"{len(judges)} transfer ids on the wire instead of 1")
        if judges:
            self.outcome.report = judges[0].report()
        for judge in judges:
            self.outcome.failures += [f"wire: {note}" for note in judge.notes]


# ----------------------------------------------------------------- the campaign


class Campaign:
    """The source, the plan and the sums."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.binary = args.binary.resolve()
        self.workdir = args.workdir.resolve() / f"campaign-{os.getpid()}"
        self.chunk, self.timeout, self.keep = args.chunk, args.timeout, args.keep
        self.seed = args.seed
        self.source = self.workdir / "source"
        self.left = Counter(server=args.server_kills, client=args.client_kills)
        self.planned = Counter(self.left)
        self.clean_times: list[float] = []
        self.outcomes: list[Outcome] = []
        self.tensors = make_source(self.source, args.bytes, random.Random(f"{self.seed}/source"))
        self.total = sum(t.length for t in self.tensors.values())

    @property
    def clean_seconds(self) -> float:
        """Median of the newest undisturbed pushes."""
        return statistics.median(self.clean_times[-9:]) if self.clean_times else 1.0

    def run(self) -> None:
        """Iterates until every planned kill has hit a running process."""
        started, self.seconds = time.monotonic(), 0.0
        try:
            time.sleep(3.5)  # So that the source counts as settled.
            most = 3 * sum(self.left.values()) + 20
            self._iterate(0, [])
            for number in range(1, most):
                if not sum(self.left.values()) or not self.clean_times:
                    break
                rng = random.Random(f"{self.seed}/{number}")
                self._iterate(number, self._victims(rng), rng)
        finally:
            self.seconds = time.monotonic() - started
            if not self.keep:
                shutil.rmtree(self.source, ignore_errors=True)
                for empty in (self.workdir / "logs", self.workdir):
                    try:
                        empty.rmdir()  # Stays when it holds logs of a failure.
                    except OSError:
                        pass

    def _victims(self, rng: random.Random) -> list[str]:
        """1 to 3 victims; both kinds run out at about the same time."""
        left, victims = Counter(self.left), []
        for _ in range(rng.choices((1, 2, 3), (6, 3, 1))[0]):
            if not sum(left.values()):
                break
            victims.append(rng.choices(("server", "client"), (left["server"], left["client"]))[0])
            left[victims[-1]] -= 1
        return victims

    def _iterate(self, number: int, victims: list[str], rng: random.Random | None = None) -> None:
        outcome = Iteration(self, number, victims, rng or random.Random(self.seed)).run()
        self.left.subtract(victim for victim, _, _ in outcome.kills)
        self.outcomes.append(outcome)
        print(outcome.line(self.seed), flush=True)
        for failure in outcome.failures[:20]:
            print(f"      {failure}", flush=True)

    def summary(self) -> dict[str, Any]:
        """The figures that a reader wants."""
        kills = Counter(victim for o in self.outcomes for victim, _, _ in o.kills)
        failed = [o for o in self.outcomes if o.failures]
        broken: Counter[str] = Counter()
        for outcome in self.outcomes:
            broken.update(outcome.report.get("violations", {}))
        resent = [o.report.get("bytes_resent", 0) for o in self.outcomes]
        return {
            "seed": self.seed,
            "bytes": self.total,
            "iterations": len(self.outcomes),
            "completed": len(self.outcomes) - len(failed),
            "server_kills": kills["server"],
            "client_kills": kills["client"],
            "kills_planned_not_done": sum(self.left.values()),
            "kills_in_mid_transfer": sum(o.in_flight for o in self.outcomes),
            "kills_too_late": sum(o.missed for o in self.outcomes),
            "sessions": sum(o.report.get("sessions", 0) for o in self.outcomes),
            "tensors_wrong": sum("differs" in f for o in failed for f in o.failures),
            "durable_acked_sent_again": sum(
                n for kind, n in broken.items() if kind.startswith("durable-sent-again")
            ),
            "violations": dict(broken),
            "max_resent_bytes": max(resent, default=0),
            "mean_resent_bytes": round(statistics.mean(resent or [0])),
            "clean_push_seconds": round(self.clean_seconds, 3),
            "seconds": round(self.seconds, 1),
            "failed_iterations": [o.number for o in failed],
        }


def size(text: str) -> int:
    """1G, 256M, 64K or plain bytes."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return int(float(text[:-1]) * factor) if factor else int(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--binary", type=Path, required=True, help="the tensorferry to test")
    add("--server-kills", type=int, default=100, metavar="N")
    add("--client-kills", type=int, default=100, metavar="N")
    add("--bytes", type=size, default=1 << 30, help="size of the checkpoint, e.g. 1G (default)")
    add("--seed", type=int, help="drawn and printed if absent")
    add("--workdir", type=Path, required=True, help="on the file system to test; needs 2x bytes")
    add("--chunk", help="passed on to push, e.g. 256K")
    add("--timeout", type=float, default=120, help="seconds for a push after its last kill")
    add("--json", type=Path, metavar="OUT", help="summary and every iteration as JSON")
    add("--keep", action="store_true", help="keep the source, and the roots of failed iterations")
    args = parser.parse_args()
    if args.bytes < 1 << 20:
        parser.error("--bytes must be at least 1M")
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(1 << 32)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that `finally` cleans up.
    print(f"seed {args.seed}", flush=True)
    campaign = Campaign(args)
    try:
        campaign.run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    summary = campaign.summary()
    for key, value in summary.items():
        print(f"{key:<26} {value}")
    if args.json:
        every = [vars(outcome) for outcome in campaign.outcomes]
        args.json.write_text(json.dumps({"summary": summary, "iterations": every}, indent=1))
    if summary["failed_iterations"] or summary["kills_planned_not_done"]:
        print(f"FAILED; run again with --seed {args.seed}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
