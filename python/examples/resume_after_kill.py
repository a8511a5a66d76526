#!/usr/bin/env python3
"""Kills the server in the middle of a save, starts it again, saves again: only the rest travels.

    python resume_after_kill.py [--mib 64] [--seed 0]

The server is killed as by a power cut of its process (SIGKILL): nothing is told to finish. What it had
acknowledged as durable is on its disk, and the second save finds it there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import serve
import tensorferry

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="size of the checkpoint in MiB, at least 16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.mib < 16:
        parser.error("there is no middle in less than 16 MiB")

    # Four tensors of random bytes: nothing shrinks, so wire bytes are the bytes that travel.
    rng = np.random.default_rng(args.seed)
    arrays = {f"layer.{i}": rng.integers(0, 256, args.mib * MIB // 4, np.uint8) for i in range(4)}
    total = sum(array.nbytes for array in arrays.values())

    with tempfile.TemporaryDirectory() as folder:
        server, address = serve.started(folder)
        try:
            client = tensorferry.Client(address)
            # Slow, so that there is a middle; durable every 8 MiB, so that something is safe in it.
            # Without retries: they would go on by themselves once the server is back.
            saving = client.save_async(
                arrays, "run7", snapshot=False, bwlimit=total // 4, durability="strict", retries=0
            )
            until = time.monotonic() + 60
            while safe_bytes(client) < total // 4:
                assert not saving.done() and time.monotonic() < until, "it was not caught in the middle"
                time.sleep(0.01)
            server.kill()
            server.wait()
            try:
                saving.result(timeout=60)
                raise AssertionError("the save survived its server")
            except tensorferry.RetryableError as error:
                print(f"cut off: {error}")

            server, address = serve.started(folder, listen=address)
            safe = safe_bytes(client)
            print(f"{safe / MIB:.0f} of {total / MIB:.0f} MiB are safe")
            report = client.save_file(arrays, "run7")
        finally:
            server.kill()
            server.wait()
        print(f"{report.resumed_bytes / MIB:.0f} MiB were there, {report.wire_bytes / MIB:.0f} MiB travelled")
        assert report.resumed_bytes > 0, "nothing was resumed"
        assert report.resumed_bytes >= safe, "what was safe travelled again"
        assert report.wire_bytes < total, "everything travelled again"

        landed = tensorferry.open(Path(folder) / "run7")
        for name, array in arrays.items():
            assert np.array_equal(landed[name], array), f"{name} differs"
        print("all bytes are equal")


def safe_bytes(client: tensorferry.Client) -> int:
    """Bytes of the unfinished transfer that survive a crash of the server."""
    rows = [row for row in client.list("run7") if row["name"] == "run7" and not row["published"]]
    return rows[0]["durable_bytes"] if rows else 0


if __name__ == "__main__":
    main()
