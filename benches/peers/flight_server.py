#!/usr/bin/env python3
"""An Arrow Flight server that copies every batch into a memory-mapped `.npy` file.

The first line on stdout is `listening on PORT`. A DoPut is one array; its descriptor's command is
JSON: `name`, `shape`. The column is the array's values in C order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.flight as flight


class Receiver(flight.FlightServerBase):
    def __init__(self, folder: Path):
        super().__init__("grpc+tcp://127.0.0.1:0")
        self.folder = folder

    def do_put(self, context, descriptor, reader, writer):
        wanted = json.loads(descriptor.command)
        name = Path(wanted["name"]).name
        dtype = reader.schema.field(0).type.to_pandas_dtype()
        target = np.lib.format.open_memmap(
            self.folder / f"{name}.npy", mode="w+", dtype=dtype, shape=tuple(wanted["shape"])
        )
        flat = target.reshape(-1)
        at = 0
        while True:
            try:
                batch = reader.read_chunk().data
            except StopIteration:
                break
            values = batch.column(0).to_numpy(zero_copy_only=True)
            flat[at : at + len(values)] = values
            at += len(values)
        if at != flat.size:
            raise flight.FlightServerError(f"{name}: {at} values of {flat.size}")


def main() -> None:
    server = Receiver(Path(sys.argv[1]))
    print(f"listening on {server.port}", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
