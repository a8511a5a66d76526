#!/usr/bin/env python3
"""Sends the `.npy` files of a folder with Arrow Flight's DoPut, without copying them in Python.

    flight_client.py FOLDER PORT --batch-bytes N --streams N

The files are mapped; record batches are slices of the maps. With several streams each file is cut
into as many stretches, each of which goes through the next free connection. Prints what the DoPuts alone cost, as JSON: the start of Python and
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


class Array:
    """A mapped file as one Arrow column."""

    def __init__(self, path: Path):
        values = np.load(path, mmap_mode="r")
        self.name, self.shape, self.value_bytes = path.stem, values.shape, values.itemsize
        self.flat = pa.array(np.asarray(values).reshape(-1))
        self.schema = pa.schema([("values", self.flat.type)])

    def stretches(self, count: int) -> list[tuple[int, int]]:
        """First value and end of each."""
        edges = [len(self.flat) * index // count for index in range(count + 1)]
        return list(zip(edges, edges[1:]))


def put(client: flight.FlightClient, array: Array, first: int, end: int, batch_bytes: int) -> int:
    """Ends when the server has answered that all of the stretch is in its map."""
    command = json.dumps({"name": array.name, "shape": array.shape, "first": first}).encode()
    writer, answer = client.do_put(flight.FlightDescriptor.for_command(command), array.schema)
    step = max(1, batch_bytes // array.value_bytes)
    for start in range(first, end, step):
        values = array.flat.slice(start, min(step, end - start))
        writer.write_batch(pa.record_batch([values], schema=array.schema))
    writer.done_writing()
    # Nothing but the end of the server's side: it comes after its last copy.
    if answer.read() is not None:
        raise RuntimeError("an answer that nobody asked for")
    writer.close()
    return (end - first) * array.value_bytes


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
    free: queue.Queue[flight.FlightClient] = queue.Queue()
    for _ in range(args.streams):
        client = flight.FlightClient(f"grpc+tcp://127.0.0.1:{args.port}")
        client.wait_for_available(timeout=30)
        free.put(client)

    def one(stretch: tuple[Array, int, int]) -> int:
        client = free.get()
        try:
            return put(client, *stretch, args.batch_bytes)
        finally:
            free.put(client)

    arrays = [Array(path) for path in sorted(args.folder.glob("*.npy"))]
    stretches = [(array, *stretch) for array in arrays for stretch in array.stretches(args.streams)]
    begun, before = time.monotonic(), cpu_seconds()
    with concurrent.futures.ThreadPoolExecutor(args.streams) as pool:
        sent = sum(pool.map(one, stretches))
    seconds, cpu = time.monotonic() - begun, cpu_seconds() - before
    print(json.dumps({"bytes": sent, "seconds": seconds, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main()
