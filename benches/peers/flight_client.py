#!/usr/bin/env python3
"""Sends the `.npy` files of a folder with Arrow Flight's DoPut, without copying them in Python.

    flight_client.py FOLDER PORT --batch-bytes N --streams N

The files are mapped; record batches are slices of the maps. With several streams each file goes
through the next free connection. Prints what the DoPuts alone cost, as JSON: the start of Python and
the imports are not Flight's fault.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import queue
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight


def put(client: flight.FlightClient, path: Path, batch_bytes: int) -> int:
    """Ends when the server has answered that all of it is in its map."""
    values = np.load(path, mmap_mode="r")
    flat = pa.array(np.asarray(values).reshape(-1))
    schema = pa.schema([("values", flat.type)])
    command = json.dumps({"name": path.stem, "shape": values.shape}).encode()
    writer, answer = client.do_put(flight.FlightDescriptor.for_command(command), schema)
    step = max(1, batch_bytes // values.itemsize)
    for start in range(0, len(flat), step):
        writer.write_batch(pa.record_batch([flat.slice(start, step)], schema=schema))
    writer.done_writing()
    # Nothing but the end of the server's side: it comes after its last copy.
    if answer.read() is not None:
        raise RuntimeError("an answer that nobody asked for")
    writer.close()
    return values.nbytes


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--batch-bytes", type=int, default=1 << 20)
    parser.add_argument("--streams", type=int, default=1)
    args = parser.parse_args()
    paths = sorted(args.folder.glob("*.npy"))
    free: queue.Queue[flight.FlightClient] = queue.Queue()
    for _ in range(args.streams):
        client = flight.FlightClient(f"grpc+tcp://127.0.0.1:{args.port}")
        client.wait_for_available(timeout=30)
        free.put(client)

    def one(path: Path) -> int:
        client = free.get()
        try:
            return put(client, path, args.batch_bytes)
        finally:
            free.put(client)

    begun, before = time.monotonic(), cpu_seconds()
    with concurrent.futures.ThreadPoolExecutor(args.streams) as pool:
        sent = sum(pool.map(one, paths))
    seconds, cpu = time.monotonic() - begun, cpu_seconds() - before
    print(json.dumps({"bytes": sent, "seconds": seconds, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main()
