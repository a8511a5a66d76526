#!/usr/bin/env python3
"""Runs the criterion benches and keeps what they found in benches/record/DATE.json.

A record holds, for each bench, criterion's median and mean with their 95 % bounds, the bytes of one
iteration and the speed that follows from the median; and the machine, without which none of it means
anything. Records of different machines, or of different hours of a shared one, cannot be compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from figures import GIB, machine  # noqa: E402


def said(*command: str) -> str:
    """What a program prints."""
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def estimate(found: dict, what: str) -> dict[str, float]:
    """One of criterion's estimates, in nanoseconds."""
    bounds = found[what]["confidence_interval"]
    return {"ns": found[what]["point_estimate"], "low_ns": bounds["lower_bound"], "high_ns": bounds["upper_bound"]}


def read_bench(folder: Path) -> dict[str, object]:
    """One bench from the folder in which criterion keeps its newest result."""
    bench = json.loads((folder / "benchmark.json").read_text())
    found = json.loads((folder / "estimates.json").read_text())
    throughput = bench.get("throughput") or {}
    if "Bytes" not in throughput:
        raise ValueError(f"{bench['full_id']} does not say how many bytes it moves")
    nbytes = throughput["Bytes"]
    median = estimate(found, "median")
    speed = nbytes / GIB / (median["ns"] / 1e9)
    return {
        "id": bench["full_id"],
        "bytes": nbytes,
        "gib_per_s": speed,
        "median": median,
        "mean": estimate(found, "mean"),
    }


def read_all(home: Path) -> list[dict[str, object]]:
    """Every bench that ran."""
    folders = (path.parent for path in home.rglob("new/estimates.json"))
    return sorted((read_bench(folder) for folder in folders), key=lambda bench: str(bench["id"]))


def fresh_path(folder: Path, date: str) -> Path:
    """DATE.json, or the first free of DATE.2.json, DATE.3.json, ..."""
    path, number = folder / f"{date}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{date}.{number}.json"
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", action="append", default=[], help="only this one; may be given more than once")
    parser.add_argument("--quick", action="store_true", help="criterion's short form: shows that it works")
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "record", help="default: %(default)s")
    args = parser.parse_args()
    which = [word for name in args.bench for word in ("--bench", name)]
    command = ["cargo", "bench", "--locked", "--features", "__internals", *which, "--", *["--quick"] * args.quick]
    with tempfile.TemporaryDirectory() as home:
        # A home of its own: results of earlier runs are not this run's.
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"CRITERION_HOME": home})
        benches = read_all(Path(home))
    if not benches:
        sys.exit("no bench left a result")
    now = datetime.datetime.now(datetime.timezone.utc)
    record = {
        "date": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "machine": machine(),
        "kernel": platform.release(),
        "compiler": said("rustc", "--version"),
        "commit": said("git", "describe", "--always", "--dirty"),
        "quick": args.quick,
        "benches": benches,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = fresh_path(args.out, f"{now:%Y-%m-%d}")
    path.write_text(json.dumps(record, indent=1) + "\n")
    for bench in benches:
        print(f"{bench['id']:<40} {bench['gib_per_s']:8.2f} GiB/s")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
