#!/usr/bin/env python3
"""Shows that the ordinary checks notice deliberately broken programs.

A build with the cargo feature `__mutants` leaves out the one safeguard that TENSORFERRY_MUTANT names.
The detectors below are the checks that every build runs; they do not know the mutants. The ordinary
build must pass all of them, and each mutant must be failed by at least one. Otherwise a check is blind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

DETECTORS: dict[str, list[str]] = {
    "sync order": ["scripts/check_sync_order.py"],
    "sync order, group": ["scripts/check_sync_order.py", "--durability", "group", "--small", "80"],
    "corruption": ["tests/tools/corruption_check.py"],
    "source change": ["tests/tools/source_change_check.py"],
    "kills": ["faults", "kills", "--points", "20"],
    "power cuts": ["faults", "power-ext4", "--points", "20"],
    "failed syncs": ["faults", "eio", "--points", "60"],
    "again": ["faults", "eio", "--points", "60", "--seed", "3"],
    "ranges": ["faults", "ranges"],
    "flips": ["faults", "flips", "--points", "48"],
}
"""Title -> command; `--binary PATH` is added. `faults` is the program of `tests/faults`."""

MUTANTS = {
    "ack_before_sync": "acks before the journal is synced",
    "journal_first": "writes the journal record before the data is synced",
    "no_dir_fsync": "never syncs a directory",
    "no_crc": "does not compare checksums of chunks",
    "no_ctime": "leaves ctime out of fingerprints",
    "size_resume": "trusts the length of a staged file instead of the journal",
    "retry_sync": "tries a failed sync again and goes on",
    "no_range_check": "takes chunks outside their cell",
}
"""Name of a safeguard (`src/mutant.rs`) -> what a program without it does."""

FEATURE = "__mutants"

FAULTS = ["cargo", "test", "--no-run", "--locked", "--test", "faults"]

TIMEOUT_S = 900


def build(feature: str | None) -> Path:
    """Builds one binary in the dev profile and copies it aside, so that the next build leaves it alone."""
    more = ["--features", feature] if feature else []
    return make(["cargo", "build", "--locked", "--bin", "tensorferry", *more], "mutants" if feature else "unmutated")


def make(command: list[str], name: str) -> Path:
    """What cargo makes, under this name."""
    command = [*command, "--message-format", "json-render-diagnostics"]
    built = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if built.returncode != 0:
        sys.exit(f"failed: {' '.join(command)}")
    made = [m for m in map(json.loads, built.stdout.splitlines()) if m.get("executable")]
    binary = REPOSITORY / "target" / "mutants" / name
    binary.parent.mkdir(parents=True, exist_ok=True)
    # Not in place: a binary that runs cannot be written.
    binary.unlink(missing_ok=True)
    shutil.copy2(made[-1]["executable"], binary)
    return binary


def detect(binary: Path, mutant: str | None, command: list[str], faults: Path) -> tuple[str, str]:
    """`pass`, `FAIL` or `n/a` (the detector could not run), and the end of what it printed."""
    program = [str(faults), *command[1:]] if command[0] == "faults" else [sys.executable, *command]
    full = [*program, "--binary", str(binary)]
    # CI=true: a detector that cannot run must not look like one that passed.
    try:
        run = subprocess.run(
            full,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            env=os.environ | {"CI": "true"} | ({"TENSORFERRY_MUTANT": mutant} if mutant else {}),
        )
    except subprocess.TimeoutExpired:
        return "FAIL", f"still running after {TIMEOUT_S} s"
    last = " | ".join(run.stdout.strip().splitlines()[-2:])
    if "not run:" in run.stdout:
        return "n/a", last
    return ("pass" if run.returncode == 0 else "FAIL"), last


def main() -> int:
    """Exit status 0 when the unmutated build passes everything and every mutant is noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--build", action="store_true", help="build both programs with cargo")
    how.add_argument(
        "--binaries",
        type=lambda text: Path(text).resolve(),
        metavar="DIR",
        help="take the programs from here: `unmutated`, `mutants` and `faults`",
    )
    parser.add_argument(
        "--all", action="store_true", help="run every detector on every mutant, not only until one notices it"
    )
    args = parser.parse_args()
    width = max(map(len, MUTANTS)) + 2
    print(" " * width + "".join(f"{title:>{len(title) + 2}}" for title in DETECTORS) + "  result", flush=True)
    ok = True
    details: list[str] = []
    # Made once, without any feature: it must not know which build it has.
    faults = args.binaries / "faults" if args.binaries else make(FAULTS, "faults")
    folder = args.binaries
    plain = folder / "unmutated" if folder else build(None)
    mutated = folder / "mutants" if folder else build(FEATURE)
    for mutant in (None, *MUTANTS):
        started = time.monotonic()
        binary = mutated if mutant else plain
        print(f"{mutant or 'unmutated':<{width}}", end="", flush=True)
        seen: list[str] = []
        for title, command in DETECTORS.items():
            noticed = mutant and not args.all and "FAIL" in seen
            outcome, output = ("-", "") if noticed else detect(binary, mutant, command, faults)
            seen.append(outcome)
            print(f"{outcome:>{len(title) + 2}}", end="", flush=True)
            if outcome in ("n/a", "FAIL"):
                details.append(f"{mutant or 'unmutated'}, {title}: {output}")
        good = "FAIL" in seen if mutant else set(seen) == {"pass"}
        if mutant and not good:
            details.append(f"{mutant} ({MUTANTS[mutant]}) was not noticed")
        ok = ok and good
        print(f"  {'ok' if good else 'BAD'} ({time.monotonic() - started:.0f} s)", flush=True)
    print("", *details, sep="\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
