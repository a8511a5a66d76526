#!/usr/bin/env python3
"""Kills the client or the server of a pull at random moments, again and again, and judges what lands.

    pull_kills.py --binary PATH [--kills N] [--seed N] [--bytes N] [--workdir DIR] [--quick]

A pull is killed (`kill -9` of the client, which is the receiver, or of the server) and made again by the same command until
it is done. What the client had said to be durable must not travel again, the folder must not have its name before it is
complete, and what lands is compared with what was published, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

RATE = 150 << 20


class Failed(Exception):
    """A promise was broken."""


class Server:
    """A server that can be killed and comes back under its address."""

    def __init__(self, binary: Path, root: Path) -> None:
        self.binary, self.root, self.listen = binary, root, "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        words = [self.binary, "serve", self.root, "--listen", self.listen, "--format", "json"]
        for _ in range(100):
            self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert self.process.stdout
            line = self.process.stdout.readline()
            if line:
                self.listen = json.loads(line)["address"]
                return
            time.sleep(0.05)
        raise Failed("the server does not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Pull:
    """One run of the client."""

    def __init__(self, binary: Path, source: str, folder: Path) -> None:
        words = [binary, "pull", source, folder, "--format", "json", "--durability", "strict", "--bwlimit", str(RATE)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.durable_bytes = 0
        self.done: dict[str, int] | None = None
        self.thread = threading.Thread(target=self.listen)
        self.thread.start()

    def listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if not line.endswith("}\n"):
                continue  # cut off by the kill
            event = json.loads(line)
            if event["event"] == "progress":
                self.durable_bytes = max(self.durable_bytes, event["durable_bytes"])
            if event["event"] == "done":
                self.done = event

    def wait(self) -> int:
        code = self.process.wait()
        self.thread.join()
        return code


def make_source(folder: Path, size: int, rng: np.random.Generator) -> None:
    folder.mkdir()
    np.save(folder / "large.npy", rng.integers(0, 256, size * 3 // 4, np.uint8))
    for i in range(40):
        np.save(folder / f"small.{i}.npy", rng.integers(0, 256, size // 160, np.uint8))
    (folder / "config.json").write_text("{}")


def compare(source: Path, landed: Path) -> None:
    if not (landed / "manifest.json").is_file():
        raise Failed(f"{landed} has a name and no manifest")
    for path in source.iterdir():
        there = landed / path.name if path.suffix == ".npy" else landed / "files" / path.name
        if not there.is_file() or there.read_bytes() != path.read_bytes():
            raise Failed(f"{there} differs")


def campaign(args: argparse.Namespace, work: Path) -> None:
    rng = random.Random(args.seed)
    source, root = work / "source", work / "root"
    make_source(source, args.bytes, np.random.default_rng(args.seed))
    server = Server(args.binary, root)
    address = f"ferry://{server.listen}/run"
    subprocess.run([args.binary, "push", source, address, "--format", "quiet"], check=True)
    kills = {"client": 0, "server": 0}
    pulls = moving = 0
    begun = time.monotonic()
    try:
        while sum(kills.values()) < args.kills:
            folder = work / "here" / f"pull{pulls}"
            known = 0
            while True:
                pull = Pull(args.binary, address, folder)
                victim = rng.choice(["client", "server", "nobody"] if known else ["client", "server"])
                time.sleep(rng.uniform(0.02, args.bytes / RATE))
                if victim != "nobody" and pull.process.poll() is None:
                    moving += pull.durable_bytes > 0
                    kills[victim] += 1
                    if victim == "client":
                        pull.process.kill()
                    else:
                        server.kill()
                        server.start()
                code = pull.wait()
                if pull.done:
                    if pull.done["resumed_bytes"] < known:
                        raise Failed(f"{known} bytes were durable, {pull.done['resumed_bytes']} were resumed")
                    break
                if code >= 0 and victim == "nobody":
                    raise Failed(f"nothing was hurt, and the pull ended with {code}")
                if folder.exists():
                    # Killed between the name and the last word.
                    compare(source, folder)
                known = max(known, pull.durable_bytes)
            compare(source, folder)
            shutil.rmtree(folder)
            if (work / "here" / ".tensorferry").exists():
                raise Failed("the service folder is left after a pull that succeeded")
            pulls += 1
    finally:
        server.kill()
    print(
        f"pull: {kills['client']} kills of the client, {kills['server']} of the server, {moving} of them while bytes were "
        f"moving; {pulls} pulls complete, 0 wrong, nothing durable asked for again; "
        f"{time.monotonic() - begun:.0f} s, seed {args.seed}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True, type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("TENSORFERRY_SEED", "1")))
    parser.add_argument("--bytes", type=int, default=192 << 20)
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--quick", action="store_true", help="12 kills of a small checkpoint")
    args = parser.parse_args()
    args.binary = args.binary.resolve()
    if args.quick:
        args.kills, args.bytes = 12, 64 << 20
    with tempfile.TemporaryDirectory(dir=args.workdir) as work:
        try:
            campaign(args, Path(work))
        except Failed as failure:
            print(f"FAILED: {failure} (seed {args.seed})", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
