"""The client that docs/wire.md points at, run as a user would run it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from peer import HANG_S, ServerTest, Tensor, chunk

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "minimal_client.py"
MOST_LINES = 80


class Example(ServerTest):
    def run_client(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLE), self.server.address, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=2 * HANG_S, check=False)

    def saved(self, arrays: dict[str, np.ndarray]) -> str:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = Path(folder.name) / "arrays.npz"
        np.savez(path, **arrays)
        return str(path)

    def test_it_is_short_enough_to_read(self) -> None:
        self.assertLess(len(EXAMPLE.read_text().splitlines()), MOST_LINES)

    def test_it_publishes_its_own_arrays(self) -> None:
        client = self.run_client("demo")
        self.assertEqual((client.returncode, client.stderr), (0, ""))
        self.assertEqual(client.stdout, f"2 tensors, {(4 << 20) + 8} bytes, unchanged: False\n")
        weight = np.arange(1 << 20, dtype="f4").reshape(1024, 1024)
        self.assert_landed("demo", [Tensor.of("weight", weight), Tensor.of("step", np.array(7, "i8"))])

    def test_it_publishes_an_npz_once(self) -> None:
        rng = np.random.default_rng(3)
        arrays = {
            "b/ä": rng.standard_normal((1000, 700)),
            "a": np.asfortranarray(rng.standard_normal((3, 4)).astype("f4")),
            "swapped": np.arange(5, dtype=">i2"),
            "none": np.zeros((0, 3), bool),
            "scalar": np.array(1 + 2j, "c8"),
        }
        path = self.saved(arrays)
        for unchanged in (False, True):
            client = self.run_client("from/npz", path)
            self.assertEqual((client.returncode, client.stderr), (0, ""))
            total_bytes = sum(a.nbytes for a in arrays.values())
            self.assertEqual(client.stdout, f"5 tensors, {total_bytes} bytes, unchanged: {unchanged}\n")
        native = {k: a.astype(a.dtype.newbyteorder("<")) for k, a in arrays.items()}
        self.assert_landed("from/npz", [Tensor.of(name, array) for name, array in native.items()])

    def test_it_ends_with_the_reason_of_a_refusal(self) -> None:
        client = self.run_client("../up")
        self.assertNotEqual(client.returncode, 0)
        self.assertIn("INVALID_ARGUMENT", client.stderr)

    def test_it_carries_on_what_was_cut(self) -> None:
        arrays = {"w": np.random.default_rng(4).standard_normal(3 << 17)}  # 3 MiB
        path = self.saved(arrays)
        tensors = [Tensor.of("w", arrays["w"])]
        # Another owner's half: the example sends what is held again.
        push = self.push().opened("carry-on", tensors, transfer=9)
        push.send(chunk(0, 2, tensors[0].cell(2)))
        push.settled().close()
        self.assertEqual(push.ending()[0], "CANCELLED")
        client = self.run_client("carry-on", path)
        self.assertEqual((client.returncode, client.stderr), (0, ""))
        self.assert_landed("carry-on", tensors)
