#!/usr/bin/env python3
"""Speaks to a real server with a stock gRPC library (grpcio), as a user of another language would.

    python tests/interop/run.py --binary target/debug/tensorferry [-k PATTERN] [-v]

The stubs are generated from the schema into a temporary folder, never kept. Needs numpy, google-crc32c,
blake3, lz4, grpcio, grpcio-tools, grpcio-status, grpcio-health-checking and grpcio-reflection.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROTO = HERE.parent.parent / "proto"


def generate_stubs(folder: str) -> None:
    """Compiles ferry.proto for Python and makes it importable."""
    from grpc_tools import protoc

    arguments = ["protoc", f"-I{PROTO}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main([*arguments, str(PROTO / "tensorferry/v1/ferry.proto")]) != 0:
        raise SystemExit("ferry.proto does not compile")
    sys.path.insert(0, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, required=True, help="the program under test")
    parser.add_argument("-k", action="append", dest="patterns", help="only tests whose name contains this")
    parser.add_argument("-v", action="store_true", help="name every test")
    args = parser.parse_args()
    os.environ["TENSORFERRY_BINARY"] = str(args.binary.resolve(strict=True))
    with tempfile.TemporaryDirectory() as folder:
        generate_stubs(folder)
        sys.path.insert(0, str(HERE))
        loader = unittest.TestLoader()
        if args.patterns:
            loader.testNamePatterns = [p if "*" in p else f"*{p}*" for p in args.patterns]
        suite = loader.discover(str(HERE), pattern="test_*.py")
        result = unittest.TextTestRunner(verbosity=2 if args.v else 1).run(suite)
    if result.testsRun == 0:
        print("no test has such a name", file=sys.stderr)
        return 1
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    raise SystemExit(main())
