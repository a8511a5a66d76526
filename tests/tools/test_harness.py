"""The harness itself: a reader that overlooks damage would make every check above it blind."""

from __future__ import annotations

import json
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from harness import Broken, PayloadFlipper, first_difference, landed  # noqa: E402


class Landed(unittest.TestCase):
    """Only a folder that is exactly what its manifest says is whole."""

    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        (self.folder / "files").mkdir()
        (self.folder / "w.npy").write_bytes(b"header--data")
        (self.folder / "files" / "config.json").write_bytes(b"{}")
        manifest = {
            "tensors": [{"name": "w", "file": "w.npy", "data_offset": 8, "nbytes": 4}],
            "files": [{"name": "config.json", "file": "files/config.json", "nbytes": 2}],
        }
        (self.folder / "manifest.json").write_text(json.dumps(manifest))

    def test_whole(self) -> None:
        self.assertEqual(landed(self.folder), {"w": b"data", "config.json": b"{}"})

    def test_broken(self) -> None:
        for file in ("w.npy", "files/config.json", "manifest.json"):
            with self.subTest(file):
                path = self.folder / file
                before = path.read_bytes()
                path.write_bytes(before[:-1])
                self.assertRaises(Broken, landed, self.folder)
                path.unlink()
                self.assertRaises(Broken, landed, self.folder)
                path.write_bytes(before)
        (self.folder / "stray").touch()
        self.assertRaises(Broken, landed, self.folder)

    def test_difference(self) -> None:
        self.assertIsNone(first_difference({"a": b"xy"}, {"a": b"xy"}))
        self.assertEqual(first_difference({"a": b"xy"}, {"a": b"xz"}), "a differs at byte 1")
        self.assertIn("names differ", first_difference({"a": b""}, {"b": b""}) or "")


class Flipper(unittest.TestCase):
    """One bit of each message asked for, wherever the stream is cut."""

    def test_flips_payload_only(self) -> None:
        body = b"\0" + (100_000).to_bytes(4, "big") + bytes(100_000)
        small = b"\0" + (10).to_bytes(4, "big") + bytes(10)
        stream = bytearray(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        messages = small + body + body
        for start in range(0, len(messages), 16_384):
            part = messages[start : start + 16_384]
            stream += len(part).to_bytes(3, "big") + b"\0\0" + (1).to_bytes(4, "big") + part
        for step in (1, 7, 65_536, len(stream)):
            answers = iter((True, False))
            flip = PayloadFlipper(lambda answers=answers: next(answers))  # type: ignore[misc]
            out = b"".join(flip(bytes(stream[at : at + step])) for at in range(0, len(stream), step))
            changed = [at for at, (a, b) in enumerate(zip(stream, out, strict=True)) if a != b]
            self.assertEqual(len(changed), 1, f"cut every {step} bytes")
            self.assertEqual(stream[changed[0]] ^ out[changed[0]], 0x10)


if __name__ == "__main__":
    unittest.main()
