#!/usr/bin/env python3
"""Kills the server at every system call of a publish and looks at what lies under the final name.

For a fresh name and for the replacement of an older version, strace kills the server on entry of a
system call. After each kill the name must be absent, the whole old checkpoint or the whole new one;
never a mixture. Then a server without strace is started on the same folder and the same push must
end with 0, the new checkpoint whole under its name and no staging left. A push that rides out the
restart by itself is fine, one that gave up is run again.

Which calls: a first run without kills lists them. Every call of the publish (from where the
manifest is made) is struck by name, path and count, so it does not matter which thread makes it.
Then, for each call S, the k-th S of any thread for k = 1, 2, ... until pushes survive: strace
counts for each thread by itself, so such a kill falls now here, now there, also before the publish.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "tools"))
import harness  # noqa: E402

ALL_CALLS = (
    "fsync", "fdatasync", "syncfs", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir",
    "fchmod", "fchmodat", "pwrite64", "pwritev2", "write", "mkdir", "mkdirat", "ftruncate", "fallocate", "openat2",
)  # fmt: skip
QUICK_CALLS = ("fsync", "fdatasync", "syncfs", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir")
QUICK_SECONDS = 50.0
NAME = "check/model"


@dataclass(frozen=True)
class Strike:
    """Kill at the k-th `call` of a thread; with a path, only calls on it count."""

    call: str
    k: int
    path: str = ""  # below the served folder

    def __str__(self) -> str:
        return f"{self.call} {self.k} {self.path}".strip()


@dataclass
class Row:
    """What the kills at one system call showed; `missed`: the server came through without that call."""

    kills: int = 0
    missed: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@dataclass
class Scenario:
    """One kind of publish. `before` is a served folder that is copied for every run."""

    title: str
    before: Path
    source: Path
    old: dict[str, bytes] | None
    new: dict[str, bytes]
    extra: tuple[str, ...]


class PublishCrash:
    """Runs one scenario again and again, each time with another kill."""

    def __init__(self, binary: Path, folder: Path, scenario: Scenario):
        self.binary, self.folder, self.scenario = binary, folder, scenario
        self.rows: dict[str, Row] = defaultdict(Row)
        self._runs = 0

    def _fresh_root(self) -> Path:
        self._runs += 1
        root = self.folder / f"{self.scenario.title}-{self._runs}"
        shutil.copytree(self.scenario.before, root, symlinks=True)
        return root

    def _push(self, port: int) -> harness.Push:
        return harness.Push(self.binary, [self.scenario.source], port, NAME, *self.scenario.extra)

    def state(self, root: Path) -> str:
        """absent, old or new; Broken for anything else."""
        target = root / NAME
        if not target.exists():
            return "absent"
        found = harness.landed(target)
        for title, wanted in (("new", self.scenario.new), ("old", self.scenario.old)):
            if wanted is not None and harness.first_difference(found, wanted) is None:
                return title
        raise harness.Broken(f"a mixture: {harness.first_difference(found, self.scenario.new)}")

    def plan(self, calls: tuple[str, ...], limit: int) -> tuple[list[Strike], list[Strike]]:
        """What a clean run calls: the strikes within the publish, and all others."""
        root, port, trace = self._fresh_root(), harness.free_port(), self.folder / "trace"
        names = ",".join(sorted({*calls, "open", "openat", "openat2"}))
        wrapper = ["strace", "-f", "-qq", "-y", "-I", "2", "-o", str(trace), "-e", f"trace={names}"]
        with harness.Server(self.binary, root, port, wrapper=wrapper):
            self._push(port).expect(0)
            self._expect_published(root)
        made: Counter[tuple[str, ...]] = Counter()
        publish: dict[Strike, None] = {}  # in the order of the calls, each once
        most: Counter[str] = Counter()
        publishing = False
        for line in trace.read_text(errors="replace").splitlines():
            # A call that strace printed in two halves counts where it began.
            if not (match := re.match(r"(\d+) +(\w+)\((.*)", line)):
                continue
            pid, call, args = match.groups()
            publishing = publishing or ("manifest" in args and "O_CREAT" in args)
            found = re.match(rf'(?:\w+<|")({re.escape(str(root))}[^>"]*)', args)
            path = found[1].removeprefix(str(root)) or "/" if found else ""
            made[pid, call] += 1
            made[pid, call, path] += 1
            most[call] = max(most[call], made[pid, call])
            if publishing and path and call in calls:
                publish[Strike(call, made[pid, call, path], path)] = None
        if not publish:
            raise harness.Failed("the trace of a clean run shows no file with `manifest` in its name being made")
        shutil.rmtree(root)
        # One more than was counted: threads share their work differently each time.
        others = [Strike(call, k) for k in range(1, limit + 1) for call in calls if k <= most[call] + 1 and most[call]]
        # In turn over the calls: when time runs out, each kind has had its share.
        rank: Counter[str] = Counter()
        turns: list[tuple[int, int, Strike]] = []
        for strike in publish:
            turns.append((rank[strike.call], len(turns), strike))
            rank[strike.call] += 1
        return [strike for _, _, strike in sorted(turns, key=lambda turn: turn[:2])], others

    def _expect_published(self, root: Path) -> None:
        """The journal goes after Done is said, so staging is given a moment to disappear."""
        if (state := self.state(root)) != "new":
            raise harness.Failed(f"after a push that ended with 0 the name is {state}")
        deadline = time.monotonic() + 5
        while left := harness.staging(root):
            if time.monotonic() > deadline:
                raise harness.Failed(f"staging is left: {left}")
            time.sleep(0.02)

    def strike(self, strike: Strike) -> None:
        """One run with one kill; the same again without one when the server survived."""
        row = self.rows[strike.call]
        root, port = self._fresh_root(), harness.free_port()
        wrapper = ["strace", "-f", "-qq", "-I", "2", "-o", "/dev/null", "-e", f"trace={strike.call}"]
        wrapper += ["-e", f"inject={strike.call}:signal=SIGKILL:when={strike.k}"]
        if strike.path:
            wrapper += ["-P", str(root) + strike.path.rstrip("/")]
        server = harness.Server(self.binary, root, port, wrapper=wrapper)
        push: harness.Push | None = None
        try:
            if server.wait_listening():
                push = self._push(port)
                while server.alive() and push.process.poll() is None:
                    time.sleep(0.01)
                if server.alive():
                    push.expect(0)
                    self._wait_cleanup(root, server)
            killed = not server.alive()
            server.stop()
            if not killed:
                self._expect_published(root)
                row.missed += 1
                shutil.rmtree(root)
                return
            row.kills += 1
            row.seen[self.state(root)] += 1
            with harness.Server(self.binary, root, port):
                if push is None or push.wait() != 0:
                    push = self._push(port).expect(0)
                self._expect_published(root)
        except (harness.Failed, harness.Broken) as error:
            row.failures.append(f"{self.scenario.title}, {strike}: {error} (left in {root})")
            return
        finally:
            server.stop()
            if push is not None and push.process.poll() is None:
                push.kill()
        shutil.rmtree(root)

    def _wait_cleanup(self, root: Path, server: harness.Server) -> None:
        """A kill may still come after Done, while staging is removed."""
        deadline = time.monotonic() + 5
        while server.alive() and harness.staging(root) and time.monotonic() < deadline:
            time.sleep(0.02)

    def run(self, calls: tuple[str, ...], limit: int, deadline: float) -> None:
        """All strikes until the deadline, those within the publish first."""
        publish, others = self.plan(calls, limit)
        for strike in publish:
            if time.monotonic() < deadline:
                self.strike(strike)
        survived: Counter[str] = Counter()
        for strike in others:
            # Nobody makes a k-th call: nobody makes one more either, give or take a thread's luck.
            if survived[strike.call] < 2 and time.monotonic() < deadline:
                before = self.rows[strike.call].missed
                self.strike(strike)
                survived[strike.call] += self.rows[strike.call].missed - before


def scenarios(binary: Path, folder: Path) -> list[Scenario]:
    """A fresh publish and a replacement, of the same few tensors and a side file."""
    lengths = {"a": 300_000, "b": 70_001, "c": 17, "empty": 0}
    versions = []
    for title, seed in (("old", 1), ("new", 2)):
        source = folder / title
        source.mkdir()
        tensors = harness.random_tensors(lengths | {f"only_{title}": 5000}, seed)
        harness.write_safetensors(source / "model.safetensors", tensors)
        config = f'{{"version": "{title}"}}'.encode()
        (source / "config.json").write_bytes(config)
        versions.append((source, tensors | {"config.json": config}))
    (old_source, old), (new_source, new) = versions
    harness.wait_settled(folder)
    empty, older = folder / "empty-root", folder / "older-root"
    empty.mkdir()
    older.mkdir()
    port = harness.free_port()
    with harness.Server(binary, older, port):
        harness.Push(binary, [old_source], port, NAME).expect(0)
    if difference := harness.first_difference(harness.landed(older / NAME), old):
        raise harness.Failed(f"the older version did not land as it is: {difference}")
    return [
        Scenario("fresh", empty, new_source, None, new, ()),
        Scenario("overwrite", older, new_source, old, new, ("--overwrite",)),
    ]


def print_table(title: str, rows: dict[str, Row]) -> None:
    """One line for each system call."""
    print(f"{title:<12}{'kills':>6}{'missed':>8}{'absent':>8}{'old':>6}{'new':>6}{'failures':>10}")
    for call, row in rows.items():
        states = f"{row.seen['absent']:>8}{row.seen['old']:>6}{row.seen['new']:>6}"
        print(f"  {call:<10}{row.kills:>6}{row.missed:>8}{states}{len(row.failures):>10}")


def main() -> int:
    """Exit status 0 when no kill broke the promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--binary", type=lambda text: Path(text).resolve(), required=True, help="the tensorferry to test"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"only syncs, renames and removals, as many kills as fit into {QUICK_SECONDS:.0f} s",
    )
    parser.add_argument(
        "--seconds", type=float, help="stop after this time (default: no limit, with --quick as said there)"
    )
    parser.add_argument("--limit", type=int, default=64, help="most kills for each call and plan (default 64)")
    parser.add_argument("--dir", type=Path, help="folder for the runs (default: the temporary folder)")
    args = parser.parse_args()
    harness.require_strace()
    folder = Path(tempfile.mkdtemp(dir=args.dir, prefix="publish-crash-")).resolve()
    seconds = args.seconds or (QUICK_SECONDS if args.quick else float("inf"))
    calls = QUICK_CALLS if args.quick else ALL_CALLS
    started = time.monotonic()
    failures: list[str] = []
    kills = 0
    try:
        cases = [PublishCrash(args.binary, folder, scenario) for scenario in scenarios(args.binary, folder)]
        for index, case in enumerate(cases, 1):
            # Each scenario gets its share of the time.
            case.run(calls, args.limit, started + seconds * index / len(cases))
            print_table(case.scenario.title, case.rows)
            failures += [text for row in case.rows.values() for text in row.failures]
            kills += sum(row.kills for row in case.rows.values())
    except (harness.Failed, harness.Broken) as error:
        failures.append(str(error))
    for text in failures:
        print(f"failed: {text}")
    if not failures:
        shutil.rmtree(folder)
    if not kills:
        failures.append("no kill")
        print("failed: no kill struck, nothing was proven")
    print(f"kills {kills}, failures {len(failures)}, {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
