#!/usr/bin/env python3
"""Changes a source between and during pushes in a way that only ctime shows.

Between: a push is killed half way, one byte that is already durable is rewritten in place and mtime
put back. Running the push again must land the new source, byte for byte, and still resume.
During: a byte that was already sent is rewritten while the push runs. The push must end with 24
(source changed) and publish nothing; running it again must land the new source.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness  # noqa: E402

SOURCE_CHANGED = 24
NAME = "changed"


class Case:
    """A source, a server of its own and a slow way between them."""

    def __init__(self, binary: Path, folder: Path, size: int, seconds: float):
        folder.mkdir()
        self.binary, self.size = binary, size
        self.root, self.source = folder / "root", folder / "model.safetensors"
        self.root.mkdir()
        self.first = "a"
        self.tensors = harness.random_tensors({"a": size // 2, "b": size - size // 2 - 4321, "c": 4321}, seed=4)
        self.offset = harness.write_safetensors(self.source, self.tensors)
        harness.wait_settled(self.source)
        self.server = harness.Server(binary, self.root, harness.free_port())
        self.proxy = harness.Proxy(self.server.port, rate=size / seconds)

    def push(self) -> harness.Push:
        """The same command every time."""
        return harness.Push(self.binary, [self.source], self.proxy.port, NAME)

    def change(self) -> None:
        """Rewrites the very first byte of tensor data: the first cell to be sent and durable."""
        harness.rewrite_byte(self.source, self.offset)
        data = self.tensors[self.first]
        self.tensors[self.first] = bytes([data[0] ^ 0xFF]) + data[1:]

    def expect_new(self) -> harness.Push:
        """Runs the push at full speed: what lands must be the source as it is now."""
        self.proxy.rate = None
        push = self.push().expect(0)
        if difference := harness.first_difference(harness.landed(self.root / NAME), self.tensors):
            raise harness.Failed(f"what landed is not the changed source: {difference}")
        return push

    def expect_absent(self) -> None:
        """Nothing may lie under the name before a push succeeded."""
        if (self.root / NAME).exists():
            raise harness.Failed("published although the source changed")

    def __enter__(self) -> Case:
        self.server.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.close()
        self.server.stop()


def between(case: Case) -> None:
    """The change comes between two runs."""
    push = case.push()
    case.proxy.wait_passed(case.size // 2, push)
    time.sleep(1.5)  # two group commits: what was sent first is durable whatever the disk does
    push.kill()
    case.expect_absent()
    case.change()
    done = case.expect_new().done()
    resumed = done.get("resumed_bytes")
    if not isinstance(resumed, int) or resumed <= 0:
        raise harness.Failed(f"the second run did not resume (resumed_bytes {resumed}), so nothing was proven")
    print(f"between: the changed source landed, {resumed} bytes resumed")


def during(case: Case) -> None:
    """The change comes while the push runs."""
    push = case.push()
    case.proxy.wait_passed(case.size // 2, push)
    case.change()
    case.proxy.rate = None
    push.expect(SOURCE_CHANGED)
    case.expect_absent()
    case.expect_new()
    print("during: refused, then the changed source landed")


def main() -> int:
    """Exit status 0 when only what the source held at the end ever landed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--binary", type=lambda text: Path(text).resolve(), required=True, help="the tensorferry to test"
    )
    parser.add_argument("--bytes", type=harness.parse_size, default="64M", help="size of the checkpoint (default 64M)")
    parser.add_argument("--seconds", type=float, default=8.0, help="time that a whole push would take (default 8)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="source-change-")).resolve()
    status = 0
    try:
        for part in (between, during):
            try:
                with Case(args.binary, folder / part.__name__, args.bytes, args.seconds) as case:
                    part(case)
            except (harness.Failed, harness.Broken) as error:
                print(f"failed: {part.__name__}: {error}")
                status = 1
    finally:
        shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
