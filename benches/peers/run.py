#!/usr/bin/env python3
"""Compares a push with other ways to move the same files, interleaved in one run.

Contenders: the ceiling (the plain TCP program of `tensorferry bench`, without and with crc32c),
tensorferry with so many lanes, rsync's daemon, rclone, scp, Arrow Flight and a stock tonic server.
Each moves the same `.npy` files of random f32 over loopback into an empty folder of the same file
system; its server, started afresh for each turn, listens before the clock starts. A first round warms
up and picks the best variant where a contender has several; what landed in the first round that
counts is compared with the source. See README.md beside this file.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))
import figures  # noqa: E402
from figures import GIB, MIB, Figure, harness  # noqa: E402

import source as sources  # noqa: E402
import supply  # noqa: E402
from contenders import Ceiling, Contender, Flight, Rclone, Rsync, Scp, Stock, Tensorferry  # noqa: E402
from observe import Failed, drain  # noqa: E402
from source import Source  # noqa: E402
from tally import NotMeasured, Run, Tally, rotated, table  # noqa: E402

KEYS = ("ceiling", "tensorferry", "rsync", "rclone", "scp", "flight", "stock")
PAUSE_S = 0.3
FAILURES = (Failed, harness.Failed, OSError)


def arguments() -> figures.argparse.ArgumentParser:
    """The options."""
    parser = figures.arguments(__doc__, workdir=figures.TMPFS)
    parser.add_argument("--bytes", type=harness.parse_size, default=4 * GIB, help="default: 4G")
    parser.add_argument("--files", type=int, default=1, help="that hold them; default: 1")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5, and one to warm up")
    parser.add_argument("--only", help=f"some of {','.join(KEYS)}")
    parser.add_argument(
        "--durable", action="store_true",
        help="nothing but tensorferry against plain TCP + pwrite + fdatasync; for a --workdir on a disk",
    )  # fmt: skip
    common(parser)
    return parser


def common(parser: figures.argparse.ArgumentParser) -> None:
    """What small.py has too."""
    parser.add_argument("--lanes", default="1,2", help="each a contender; default: 1,2")
    parser.add_argument("--install", action="store_true", help="get absent peers with apt-get and pip")
    parser.add_argument("--serve-flags", default="", help="more flags for `tensorferry serve`")
    parser.add_argument("--push-flags", default="", help="more flags for `tensorferry push`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of everything there")


# ---------------------------------------------------------------- who takes part


@dataclasses.dataclass
class Field:
    """Those who take part, and those who cannot."""

    contenders: dict[str, Contender] = dataclasses.field(default_factory=dict)
    absent: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str, make: Callable[[], Contender]) -> None:
        try:
            contender = make()
        except supply.Absent as why:
            print(f"not run: {name} ({why})", flush=True)
            self.absent.append(name)
        else:
            self.contenders[contender.name] = contender


def field(args: figures.argparse.Namespace, wanted: Sequence[str], ceilings: Sequence[str] = ()) -> Field:
    """All that were asked for."""
    found = Field()
    for kind in ceilings if "ceiling" in wanted else ():
        found.add(f"ceiling {kind}", lambda kind=kind: Ceiling(args.binary, kind))
    for lanes in args.lanes.split(",") if "tensorferry" in wanted else ():
        found.add("tensorferry", lambda lanes=lanes: ferry(args, lanes))
    peers = {
        "rsync": lambda: Rsync(install=args.install),
        "rclone": lambda: Rclone(install=args.install),
        "scp": lambda: Scp(install=args.install),
        "flight": lambda: Flight(install=args.install),
        "stock": Stock,
    }
    for key, make in peers.items():
        if key in wanted:
            found.add(key, make)
    for name, contender in found.contenders.items():
        print(f"{name}: {contender.version}")
    return found


def ferry(args: figures.argparse.Namespace, lanes: str) -> Tensorferry:
    """One number of lanes."""
    return Tensorferry(args.binary, lanes, shlex.split(args.serve_flags), shlex.split(args.push_flags))


# ---------------------------------------------------------------- rounds


class Course:
    """Where turns take place."""

    def __init__(self, folder: Path, source: Source, *, keep: bool = False):
        """With `keep`, what a turn leaves stays to the end."""
        self.source = source
        self.folder = folder
        self.keep = keep
        self.turns = 0
        self.on_disk = figures.file_system(folder) != "tmpfs"

    def turn(self, contender: Contender, variant: str, *, check: bool) -> Run:
        """One run into an empty folder."""
        self.turns += 1
        target = self.folder / f"turn{self.turns}" / "target"
        target.mkdir(parents=True)
        try:
            if self.on_disk:
                drain(self.folder)
            time.sleep(PAUSE_S)
            run = contender.run(self.source, target.parent, target, variant)
            if check and (landed := contender.landed(target)):
                sources.check_landed(self.source, landed)
            return run
        finally:
            if not self.keep:
                shutil.rmtree(target.parent)


def say(name: str, run: Run) -> None:
    """One line about a turn."""
    cpu = f"{run.cpu_s_per_gib:.2f} core-s/GiB" if run.cpu_s_per_gib is not None else ""
    print(f"  {name}: {run.seconds:.3f} s, {run.gib_per_s:.2f} GiB/s, {cpu}, {run.note}", flush=True)


def race(course: Course, contenders: dict[str, Contender], rounds: int, *, warm_up: bool) -> tuple[Tally, list[str]]:
    """All rounds; also who failed. Whoever fails is out."""
    tally, failed = Tally(), []
    best = {name: contender.variants[0] for name, contender in contenders.items()}

    def attempt(name: str, variant: str, *, check: bool = False) -> Run | None:
        try:
            run = course.turn(contenders[name], variant, check=check)
        except FAILURES as error:
            print(f"FAIL: {name}: {error}", flush=True)
            return None
        say(name, run)
        return run

    if warm_up:
        print("warm-up and choice of variants", flush=True)
        for name, contender in contenders.items():
            runs = {variant: run for variant in contender.variants if (run := attempt(name, variant))}
            if runs:
                best[name] = max(runs, key=lambda variant: runs[variant].gib_per_s)
            else:
                failed.append(name)
    for index in range(rounds):
        print(f"round {index + 1}", flush=True)
        found = {}
        for name in rotated(list(contenders), index):
            if name in failed:
                continue
            if run := attempt(name, best[name], check=index == 0):
                found[name] = run
            else:
                failed.append(name)
        tally.rounds.append(found)
    return tally, failed


# ---------------------------------------------------------------- what it says


def judge(figure: Figure, tally: Tally, names: Sequence[str]) -> None:
    """The goals."""
    ferries = [name for name in names if name.startswith("tensorferry")]
    try:
        best = tally.fastest(ferries)
    except NotMeasured:
        return
    print(f"best: {best}")
    speeds = {
        "ceiling tcp_file": ("the ceiling", 0.80),
        "ceiling tcp_file_crc": ("the ceiling with crc32c on both sides", 0.90),
        "Arrow Flight": ("Arrow Flight DoPut into a memmap", 4.0),
        "rsync": ("rsync -W --inplace", 3.0),
        "stock tonic": ("a stock tonic server", 4.0),
        "ceiling tcp_file_sync": ("plain TCP + pwrite + fdatasync", 0.95),
    }
    for name, (words, goal) in speeds.items():
        try:
            figure.judge(f"speed against {words}, median of ratios", tally.ratio(best, name), ">=", goal)
        except NotMeasured:
            continue
    try:
        ratio = tally.cpu_ratio(best, "ceiling tcp_file_crc")
    except NotMeasured:
        return
    figure.judge("core-seconds per GiB against the ceiling with crc, median of ratios", ratio, "<=", 1.35)


def record(figure: Figure, source: Source, field: Field, tally: Tally, failed: Sequence[str]) -> dict[str, object]:
    """Everything that was measured, and where."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "title": figure.title,
        "date": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "machine": figures.machine(),
        "kernel": platform.release(),
        "file_system": figures.file_system(figure.folder),
        "seed": figure.args.seed,
        "quick": figure.args.quick,
        "bytes": source.nbytes,
        "files": len(source.paths),
        "push_flags": figure.args.push_flags,
        "serve_flags": figure.args.serve_flags,
        "versions": {name: contender.version for name, contender in field.contenders.items()},
        "not_run": field.absent,
        "failed": list(failed),
        "rounds": [
            {name: dataclasses.asdict(run) | {"gib_per_s": run.gib_per_s} for name, run in found.items()}
            for found in tally.rounds
        ],
        "verdicts": figure.rows,
    }


def finish(figure: Figure, source: Source, field: Field, tally: Tally, failed: Sequence[str]) -> int:
    """Record and exit status."""
    if figure.args.json:
        text = json.dumps(record(figure, source, field, tally, failed), indent=1)
        figure.args.json.write_text(text + "\n")
    if failed:
        figure.invalid(f"did not get through: {', '.join(failed)}")
    if field.absent and os.environ.get("CI") == "true":
        figure.invalid(f"not run: {', '.join(field.absent)}")
    return figure.end()


def main() -> int:
    args = arguments().parse_args()
    if args.quick:
        args.bytes, args.rounds = min(args.bytes, 64 * MIB), 1
    args.binary = args.binary.resolve()
    wanted = args.only.split(",") if args.only else KEYS
    if strange := set(wanted) - set(KEYS):
        sys.exit(f"--only {','.join(sorted(strange))}: not among {','.join(KEYS)}")
    ceilings = ["tcp_file", "tcp_file_crc"]
    if args.durable:
        wanted, ceilings = ("ceiling", "tensorferry"), ["tcp_file_sync"]
        if figures.file_system(args.workdir) == "tmpfs":
            sys.exit("--durable needs a --workdir on a disk")
    with figures.figure("tensorferry and its peers", args) as figure:
        taking_part = field(args, wanted, ceilings)
        folder = figure.folder / "source"
        folder.mkdir()
        whole = figure.folder / "whole" if args.files > 1 else None
        source = sources.write(folder, args.files, args.bytes, args.seed, whole=whole)
        print(f"{source.nbytes / GIB:.2f} GiB of random f32 in {args.files} .npy files", flush=True)
        time.sleep(figures.SETTLE_S)
        course = Course(figure.folder, source)
        tally, failed = race(course, taking_part.contenders, args.rounds, warm_up=not args.quick)
        print(f"\n{table(tally, list(taking_part.contenders), f'ceiling {ceilings[0]}', 'the ceiling')}\n")
        judge(figure, tally, list(taking_part.contenders))
        return finish(figure, source, taking_part, tally, failed)


if __name__ == "__main__":
    sys.exit(main())
