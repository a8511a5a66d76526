"""What every test has: a server, and arrays that differ in every byte that matters."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

import tensorferry as ferry


@pytest.fixture
def server(tmp_path):
    with ferry.Server(tmp_path / "root") as server:
        yield server


@pytest.fixture
def noise():
    def make(shape, dtype=np.float32, seed=0):
        generator = np.random.default_rng(seed)
        count = int(np.prod(shape, dtype=np.int64))
        return generator.integers(0, 256, count * np.dtype(dtype).itemsize, np.uint8).view(dtype).reshape(shape)

    return make


@pytest.fixture
def script(tmp_path):
    """Begins a script in a process of its own."""
    running = []

    def begin(text, *arguments, **options):
        path = tmp_path / f"script{len(running)}.py"
        path.write_text(textwrap.dedent(text))
        command = [sys.executable, str(path), *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def same_bytes(a, b):
    """Whether two arrays are the same, NaNs by their bits."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
