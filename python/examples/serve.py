#!/usr/bin/env python3
"""A server in a process of its own; the other examples start this one.

    python serve.py ROOT [--listen 127.0.0.1:7744]

Prints the address that it listens on and serves until its standard input ends, so that it never
outlives who started it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def started(root: str | Path, listen: str = "127.0.0.1:0") -> tuple[subprocess.Popen[str], str]:
    """Starts this script. Gives the process and ``HOST:PORT``."""
    command = [sys.executable, __file__, str(root), "--listen", listen]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    if not address:
        raise RuntimeError(f"the server ended with {process.wait()}")
    return process, address


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder for the checkpoints; made if need be")
    parser.add_argument("--listen", default="127.0.0.1:7744", metavar="HOST:PORT", help="port 0 picks a free one")
    args = parser.parse_args()

    import tensorferry

    with tensorferry.Server(args.root, listen=args.listen) as server:
        print(server.address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
