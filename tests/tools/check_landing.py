#!/usr/bin/env python3
"""Pushes each source through a server in another process, with defaults and with `--chunk 256K`, and
into a local folder, and compares what landed with what Python's own libraries read."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Server, free_port

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Exit status 0 when everything is equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True, type=Path)
    parser.add_argument("--python", default=sys.executable, help="an interpreter with numpy and safetensors")
    parser.add_argument("--brief", action="store_true", help="one push of each source, with small chunks")
    parser.add_argument("sources", nargs="+", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        root = Path(temp) / "root"
        root.mkdir()
        with Server(args.binary, root, free_port()) as server:
            for number, source in enumerate(args.sources):
                for chunk in ([["--chunk", "256K"]] if args.brief else ([], ["--chunk", "256K"])):
                    name = f"case-{number}{'-'.join(chunk)}".replace("--", "-")
                    dest = f"ferry://127.0.0.1:{server.port}/{name}"
                    push(args.binary, [str(source), dest, *chunk])
                    compare(args.python, source, root / name)
        for number, source in enumerate([] if args.brief else args.sources):
            folder = Path(temp) / f"local {number}"
            push(args.binary, [str(source), str(folder)])
            compare(args.python, source, folder)
            leftovers = [p.name for p in folder.parent.iterdir() if p.name == ".tensorferry"]
            assert not leftovers, "a finished local push left its service folder"
    return 0


def push(binary: Path, words: list[str]) -> None:
    """Must succeed."""
    subprocess.run([binary, "push", *words, "--format", "quiet"], check=True)


def compare(python: str, source: Path, landed: Path) -> None:
    """Must be equal."""
    subprocess.run([python, HERE / "compare_landed.py", source, "--", landed], check=True)


if __name__ == "__main__":
    sys.exit(main())
