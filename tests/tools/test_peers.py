"""The arithmetic of the comparison with peers, and its instruments."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benches" / "peers"))

import contenders  # noqa: E402
import observe  # noqa: E402
import source  # noqa: E402
from tally import GIB, NotMeasured, Run, Tally, rotated, table  # noqa: E402


class Order(unittest.TestCase):
    def test_every_contender_comes_first_and_last_equally_often(self) -> None:
        names = ["a", "b", "c", "d"]
        orders = [rotated(names, index) for index in range(8)]
        self.assertTrue(all(sorted(order) == names for order in orders))
        for place in (0, -1):
            self.assertEqual({name: [order[place] for order in orders].count(name) for name in names},
                             dict.fromkeys(names, 2))  # fmt: skip
        self.assertEqual(rotated([], 3), [])


class Figures(unittest.TestCase):
    # The machine is twice as slow in the second round and four times in the third.
    tally = Tally([
        {"ceiling": Run(1.0, GIB, 0.5, 0.5), "push": Run(2.0, GIB, 1.5, 0.5), "gone": Run(9.0, GIB)},
        {"ceiling": Run(2.0, GIB, 1.0, 1.0), "push": Run(2.5, GIB, 1.0, 1.0)},
        {"ceiling": Run(4.0, GIB, None, 4.0), "push": Run(8.0, GIB, 5.0, 5.0)},
    ])  # fmt: skip

    def test_a_ratio_is_the_median_of_what_each_round_says(self) -> None:
        # 0.5, 0.8, 0.5; the ratio of the medians would be 0.8.
        self.assertAlmostEqual(self.tally.ratio("push", "ceiling"), 0.5)
        self.assertAlmostEqual(self.tally.speed("push"), 0.4)

    def test_processor_time_of_both_sides_counts(self) -> None:
        # 2, 1, 2.5.
        self.assertAlmostEqual(self.tally.cpu_ratio("push", "ceiling"), 2.0)

    def test_rounds_that_lack_one_of_a_pair_are_left_out(self) -> None:
        self.assertAlmostEqual(self.tally.ratio("gone", "ceiling"), 1 / 9)
        with self.assertRaises(NotMeasured):
            self.tally.ratio("push", "never")
        with self.assertRaises(NotMeasured):
            self.tally.cpu_ratio("gone", "ceiling")

    def test_the_fastest_is_chosen_among_those_that_ran(self) -> None:
        self.assertEqual(self.tally.fastest(["never", "gone", "push"]), "push")
        with self.assertRaises(NotMeasured):
            self.tally.fastest(["never"])

    def test_the_table_says_what_is_unknown(self) -> None:
        lines = table(self.tally, ["ceiling", "push", "never", "gone"], "ceiling", "the ceiling").splitlines()
        self.assertEqual(len(lines), 5)
        self.assertEqual(len({len(line) for line in lines}), 1)
        cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
        self.assertEqual(cells[:5], ["push", "0.40 (0.12–0.50)", "2.50", "0.50", "1.50 + 1.00"])
        self.assertIn("– + –", lines[4])


class Parsing(unittest.TestCase):
    def test_events_are_found_between_other_lines(self) -> None:
        text = 'hello\n{"event":"a","n":1}\n{broken\n\n{"event":"done"}\n'
        self.assertEqual(contenders.events(text), [{"event": "a", "n": 1}, {"event": "done"}])

    def test_dirty_pages_are_those_that_wait_and_those_on_their_way(self) -> None:
        meminfo = "MemTotal: 100 kB\nDirty:      12 kB\nWriteback:   3 kB\nWritebackTmp: 9 kB\nHugePages_Free: 7\n"
        self.assertEqual(observe.dirty_bytes(meminfo), 15 * 1024)


class Processes(unittest.TestCase):
    def test_time_and_memory_of_children_count(self) -> None:
        child = "b = b'x' * (80 << 20); t = __import__('time').process_time\nwhile t() < 0.5: pass"
        parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
        seen = observe.observe([sys.executable, "-c", parent], None, timeout=60)
        self.assertGreaterEqual(seen.client_cpu_s, 0.5)
        self.assertGreater(seen.client.anon_bytes or 0, 64 << 20)
        self.assertGreaterEqual(seen.client.rss_bytes or 0, seen.client.anon_bytes or 0)
        self.assertIsNone(seen.server_cpu_s)

    def test_what_a_server_did_before_is_not_counted(self) -> None:
        busy = "import time\nwhile time.process_time() < 0.3: pass\nprint('x', flush=True)\ntime.sleep(60)"
        server = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None
            server.stdout.readline()
            seen = observe.observe([sys.executable, "-c", "pass"], server.pid, timeout=60)
        finally:
            server.kill()
            server.communicate()
        self.assertLess(seen.server_cpu_s or 0.0, 0.2)
        self.assertGreater(seen.server.rss_bytes or 0, 1 << 20)

    def test_a_client_that_fails_is_an_error(self) -> None:
        with self.assertRaisesRegex(observe.Failed, "ended with 3: why"):
            observe.observe([sys.executable, "-c", "import sys; sys.stderr.write('why'); sys.exit(3)"], None)

    def test_a_client_that_hangs_is_ended(self) -> None:
        begun = time.monotonic()
        with self.assertRaises(observe.Failed):
            observe.observe([sys.executable, "-c", "import time; time.sleep(60)"], None, timeout=0.2)
        self.assertLess(time.monotonic() - begun, 30)


class Landing(unittest.TestCase):
    def test_a_changed_byte_a_short_file_and_a_missing_file_are_noticed(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder, landed = Path(name) / "source", Path(name) / "landed"
            folder.mkdir()
            landed.mkdir()
            made = source.write(folder, 3, 3 * 5000, seed=7, whole=Path(name) / "whole")
            self.assertEqual(made.nbytes, 15_000)
            self.assertEqual(made.whole.stat().st_size, made.nbytes)
            for path in made.paths:
                # Another header length is no difference.
                data = path.read_bytes()[128:]
                header = source.npy_header(1250)
                padded = header[:8] + (len(header) - 10 + 64).to_bytes(2, "little") + header[10:-1] + b" " * 64 + b"\n"
                (landed / path.name).write_bytes(padded + data)
            source.check_landed(made, landed)
            last = landed / made.paths[-1].name
            whole = last.read_bytes()
            for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-4], whole + b"\0"):
                last.write_bytes(damaged)
                with self.assertRaises(observe.Failed):
                    source.check_landed(made, landed)
            last.unlink()
            with self.assertRaisesRegex(observe.Failed, "did not arrive"):
                source.check_landed(made, landed)


if __name__ == "__main__":
    unittest.main()
