"""A record of benches holds what criterion found."""

from __future__ import annotations

import json
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benches"))

import record  # noqa: E402


def result(home: Path, name: str, throughput: object) -> None:
    """As criterion leaves it."""
    folder = home / name / "new"
    folder.mkdir(parents=True)
    (folder / "benchmark.json").write_text(json.dumps({"full_id": name, "throughput": throughput}))
    one = {"point_estimate": 5e8, "confidence_interval": {"lower_bound": 4e8, "upper_bound": 6e8}}
    (folder / "estimates.json").write_text(json.dumps({"mean": one, "median": one}))


class Record(unittest.TestCase):
    def test_speed_follows_from_bytes_and_median(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            result(Path(name), "b/two", {"Bytes": 1 << 30})
            result(Path(name), "a/one", {"Bytes": 1 << 29})
            found = record.read_all(Path(name))
        self.assertEqual([(bench["id"], bench["gib_per_s"]) for bench in found], [("a/one", 1.0), ("b/two", 2.0)])
        self.assertEqual(found[0]["median"], {"ns": 5e8, "low_ns": 4e8, "high_ns": 6e8})

    def test_a_bench_without_bytes_is_refused(self) -> None:
        for throughput in (None, {"Elements": 3}):
            with tempfile.TemporaryDirectory() as name:
                result(Path(name), "bare", throughput)
                with self.assertRaisesRegex(ValueError, "bare"):
                    record.read_all(Path(name))

    def test_a_record_never_replaces_another(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            paths = []
            for _ in range(3):
                paths.append(record.fresh_path(Path(name), "2000-01-01"))
                paths[-1].touch()
        self.assertEqual([path.name for path in paths], ["2000-01-01.json", "2000-01-01.2.json", "2000-01-01.3.json"])


if __name__ == "__main__":
    unittest.main()
