#!/usr/bin/env python3
"""How soon Ctrl-C is heard in `save_file`, how much is safe by then, and how much travels again.

    python interrupt.py [--bytes 256M] [--rounds 5]

In every round a process saves arrays of random bytes at a limited rate. In the middle it gets SIGINT; the
clock stops in the first line of its `except KeyboardInterrupt`. Then it saves the same arrays again.

Figures: `seconds` from the signal to the handler; `safe_mib` that is durable on the server when the handler runs;
`resumed_mib` of which the second call found there, and `again_mib` that travelled in it. A second call that resumes
less than what was safe ends the bench with an error.
"""

from __future__ import annotations

import json
import signal
import time

import harness
from harness import MIB, Child

SENDER = r"""
import json, signal, sys, time
import numpy as np
import tensorferry

# Whoever is started in the background may be told to ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
nbytes, count, seed = map(int, sys.argv[1:])
rng = np.random.default_rng(seed)
arrays = {f"layer.{i}": rng.integers(0, 256, nbytes // count, np.uint8) for i in range(count)}
print("{}", flush=True)
for line in sys.stdin:
    url, slow, options = json.loads(line)
    try:
        print('"saving"', flush=True)
        tensorferry.save_file(arrays, url, **slow, **options)
        print(json.dumps({"error": "it was done before it was interrupted"}), flush=True)
    except KeyboardInterrupt:
        heard = time.monotonic()
        print(json.dumps({"heard": heard}), flush=True)
    sys.stdin.readline()
    report = tensorferry.save_file(arrays, url, **options)
    found = {key: getattr(report, key) for key in ("bytes", "wire_bytes", "resumed_bytes")}
    print(json.dumps(found), flush=True)
"""


def main() -> None:
    parser = harness.arguments(__doc__, size="256M", rounds=5)
    parser.add_argument("--count", type=int, default=8, help="arrays")
    parser.add_argument("--seconds", type=float, default=4.0, help="that an undisturbed save takes at its limited rate")
    args = harness.checked(parser.parse_args())
    with harness.work_folder(args) as folder, harness.Server(folder / "root", args.binary) as server:
        runs = iter(range(1 << 30))
        arms = {"interrupt": lambda: interrupted(args, server, f"run{next(runs)}")}
        found = harness.interleaved(arms, args.rounds, args.seed)["interrupt"]
    column = {key: [run[key] for run in found] for key in found[0]}
    harness.figure(
        "Ctrl-C in save_file",
        args,
        seconds=harness.median(column["seconds"]),
        seconds_max=max(column["seconds"]),
        seconds_each=column["seconds"],
        safe_mib=column["safe"],
        resumed_mib=column["resumed"],
        again_mib=column["again"],
        total_mib=found[0]["total"],
    )


def interrupted(args, server: harness.Server, name: str) -> dict[str, float]:
    import tensorferry

    client = tensorferry.Client(server.address)
    options = harness.options_of(args)
    slow = {"bwlimit": max(256 << 10, int(args.bytes / args.seconds))}
    with Child(SENDER, str(args.bytes), str(args.count), str(args.seed)) as sender:
        sender.answer()
        sender.tell([server.url(name), slow, options])
        sender.answer()
        until = time.monotonic() + 60
        while safe_bytes(client, name) == 0:
            if time.monotonic() > until:
                raise RuntimeError("nothing became durable in a minute")
            time.sleep(0.02)
        sent = time.monotonic()
        sender.process.send_signal(signal.SIGINT)
        heard = sender.answer()
        if "error" in heard:
            raise RuntimeError(heard["error"])
        safe = safe_bytes(client, name)
        # The clock of all processes of a machine is the same one.
        report = sender.ask(None)
    if report["resumed_bytes"] < safe:
        raise RuntimeError(
            f"{safe} bytes were safe and only {report['resumed_bytes']} were resumed: {json.dumps(report)}"
        )
    return {
        "seconds": heard["heard"] - sent,
        "safe": safe / MIB,
        "resumed": report["resumed_bytes"] / MIB,
        "again": report["wire_bytes"] / MIB,
        "total": report["bytes"] / MIB,
    }


def safe_bytes(client, name: str) -> int:
    """Bytes of the unfinished transfer that survive a crash."""
    rows = [row for row in client.list(name) if row["name"] == name and not row["published"]]
    return rows[0]["durable_bytes"] if rows else 0


if __name__ == "__main__":
    main()
