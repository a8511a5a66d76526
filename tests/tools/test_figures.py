"""The instruments of the figures find what they must find."""

from __future__ import annotations

import random
import struct
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))

from count_copies import PREAD, WRITE, Ranges, read_trace  # noqa: E402
from figures import Floats  # noqa: E402


def trace(folder: str, *calls: tuple[int, int, int]) -> Path:
    """A file as buffer_trace.c writes it."""
    path = Path(folder) / "trace"
    records = b"".join(struct.pack("<4Q", *call, 0) for call in calls)
    path.write_bytes(struct.pack("<3Q", len(calls), 0, 0).ljust(4096, b"\0") + records)
    return path


class Addresses(unittest.TestCase):
    def test_ranges_hold_what_a_set_of_addresses_would_hold(self) -> None:
        for seed in range(200):
            rng, ranges, addresses = random.Random(seed), Ranges(), set()
            for _ in range(60):
                start = rng.randrange(100)
                wanted = set(range(start, start + rng.randrange(1, 30)))
                if rng.random() < 0.5:
                    ranges.add(start, start + len(wanted))
                    addresses |= wanted
                else:
                    self.assertEqual(ranges.take(start, start + len(wanted)), len(wanted & addresses), seed)
                    addresses -= wanted

    def test_bytes_from_where_they_were_read_to_are_counted_once(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = trace(folder, (PREAD, 1000, 100), (WRITE, 1000, 60), (WRITE, 1050, 50), (WRITE, 1000, 100))
            found = read_trace(path, PREAD, WRITE)
        self.assertEqual((found.same_bytes, found.written_bytes), (100, 210))

    def test_a_copy_in_between_is_noticed(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            found = read_trace(trace(folder, (PREAD, 1000, 100), (WRITE, 5000, 100)), PREAD, WRITE)
        self.assertEqual((found.same_bytes, found.written_bytes), (0, 100))


class Sources(unittest.TestCase):
    def test_values_are_finite_and_a_sparse_piece_is_half_zeros(self) -> None:
        for sparse in (False, True):
            piece = Floats(3, sparse=sparse).piece()
            values = struct.unpack("<2048f", piece[:8192])
            self.assertTrue(all(abs(value) < 2 for value in values))
            self.assertEqual(sum(value == 0 for value in values), 1024 if sparse else 0)


if __name__ == "__main__":
    unittest.main()
