#!/usr/bin/env python3
"""An Arrow Flight server that copies every batch into a memory-mapped `.npy` file.

The first line on stdout is `listening on PORT`. A DoPut is a stretch of one array; its descriptor's
command is JSON: `name` and `shape` of the array, `first` value of the stretch. The column is the
values in C order.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.flight as flight


class Receiver(flight.FlightServerBase):
    def __init__(self, folder: Path):
        super().__init__("grpc+tcp://127.0.0.1:0")
        self.folder = folder
        self.maps: dict[str, np.memmap] = {}
        self.lock = threading.Lock()

    def flat_map(self, name: str, dtype: type, shape: list[int]) -> np.ndarray:
        """The array in its file, which the first to ask for it creates."""
        with self.lock:
            if name not in self.maps:
                path = self.folder / f"{Path(name).name}.npy"
                self.maps[name] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=tuple(shape))
            return self.maps[name].reshape(-1)

    def do_put(self, context, descriptor, reader, writer):
        wanted = json.loads(descriptor.command)
        dtype = reader.schema.field(0).type.to_pandas_dtype()
        target = self.flat_map(wanted["name"], dtype, wanted["shape"])
        at = wanted["first"]
        while True:
            try:
                batch = reader.read_chunk().data
            except StopIteration:
                return
            values = batch.column(0).to_numpy(zero_copy_only=True)
            target[at : at + len(values)] = values
            at += len(values)


def main() -> None:
    server = Receiver(Path(sys.argv[1]))
    print(f"listening on {server.port}", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
