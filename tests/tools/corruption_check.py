#!/usr/bin/env python3
"""Damages payload on the wire and looks at what lands.

A proxy flips single bits of the payload that a client sends. Damage now and then: the receiver must
refuse those chunks, the sender send them again, and the push end with 0 and the right bytes. Damage
of every large message: the push must end with 6 (integrity) and publish nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness  # noqa: E402

INTEGRITY = 6
NAME = "damaged"


class Damage:
    """Decides which large messages are damaged: numbers `first`, `first + every`, ... up to `most`."""

    def __init__(self, first: int, every: int, most: int | None):
        self.first, self.every, self.most = first, every, most
        self.seen = self.flips = 0
        self._lock = threading.Lock()

    def __call__(self) -> bool:
        with self._lock:
            number, self.seen = self.seen, self.seen + 1
            hit = number >= self.first and (number - self.first) % self.every == 0
            hit = hit and (self.most is None or self.flips < self.most)
            self.flips += hit
            return hit

    def filter(self) -> harness.PayloadFlipper:
        """A filter for one more connection."""
        return harness.PayloadFlipper(self)


def check(binary: Path, folder: Path, source: Path, tensors: dict[str, bytes], damage: Damage, status: int) -> None:
    """One push through a damaging proxy to a server of its own."""
    root, port = folder / f"root-{status}", harness.free_port()
    root.mkdir()
    with harness.Server(binary, root, port), harness.Proxy(port, tap=damage.filter) as proxy:
        push = harness.Push(binary, [source], proxy.port, NAME)
        push.expect(status)
    if not damage.flips:
        raise harness.Failed("the proxy found no large message to damage")
    if status != 0:
        if (root / NAME).exists():
            raise harness.Failed("a push that failed published something")
    elif difference := harness.first_difference(harness.landed(root / NAME), tensors):
        raise harness.Failed(f"damage reached the disk: {difference}")
    print(f"exit {status} after {damage.flips} of {damage.seen} large messages were damaged")


def main() -> int:
    """Exit status 0 when no damage got through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--binary", type=lambda text: Path(text).resolve(), required=True, help="the tensorferry to test"
    )
    parser.add_argument("--bytes", type=harness.parse_size, default="32M", help="size of the checkpoint (default 32M)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="corruption-")).resolve()
    try:
        third = args.bytes // 3
        tensors = harness.random_tensors({"a": third, "b": third + 12_345, "c": third - 12_345, "small": 999}, seed=3)
        source = folder / "model.safetensors"
        harness.write_safetensors(source, tensors)
        check(args.binary, folder, source, tensors, Damage(first=2, every=5, most=6), 0)
        check(args.binary, folder, source, tensors, Damage(first=0, every=1, most=None), INTEGRITY)
    except (harness.Failed, harness.Broken) as error:
        print(f"failed: {error}")
        return 1
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
