"""Saves in the background, and asyncio."""

import asyncio
import gc
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from conftest import same_bytes

import tensorferry as ferry
from tensorferry import aio

MIB = 1 << 20
SLOW = {"bwlimit": "4M", "codec": "none"}


def test_a_snapshot_is_what_was_there_at_the_call(server, tmp_path, noise):
    array = noise(8 * MIB, np.uint8)
    before = array.copy()
    called = threading.Event()
    begun = time.monotonic()
    handle = ferry.save_async({"w": array}, server.url("a"), bwlimit="8M", codec="none")
    assert time.monotonic() - begun < 0.5
    array[:] = 0
    assert not handle.done()
    with pytest.raises(TimeoutError):
        handle.result(0.05)
    handle.add_done_callback(lambda h: called.set() if h is handle else None)
    report = handle.result(60)
    assert called.wait(5) and handle.done() and handle.exception() is None
    assert report.copied_bytes == 0
    assert same_bytes(ferry.open(tmp_path / "root/a")["w"], before)


class Gives:
    """What another library has; numpy cannot take it by DLPack."""

    def __init__(self, array, give):
        self.array, self.give = array, give
        self.shape, self.dtype = array.shape, array.dtype

    def __array__(self, dtype=None, copy=None):
        return self.give(self.array)


class GivesByDlpack(Gives):
    def __dlpack__(self, **_):
        raise BufferError("no such type")

    def __dlpack_device__(self):
        return 1, 0


def read_only(array):
    view = array.view()
    view.flags.writeable = False
    return view


GIVERS = {
    "itself": lambda array: array,
    "view": np.ndarray.view,
    "read_only": read_only,
    "copy": np.copy,
    "other": np.asfortranarray,
}


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, ml_dtypes.bfloat16])
def test_a_snapshot_is_one_of_whatever_can_be_saved(server, tmp_path, dtype):
    array = np.ones((64, 64), dtype)
    given = {"first": np.ones(2 * MIB, np.uint8)}
    for kind in (Gives, GivesByDlpack):
        for name, give in GIVERS.items():
            given[f"{kind.__name__}/{name}"] = kind(array, give)
            given[f"{kind.__name__}/{name}/gaps"] = kind(array[:, ::2], give)
    # The first keeps the others back.
    handle = ferry.save_async(given, server.url("a"), bwlimit="4M", codec="none")
    array[...] = 0
    assert handle.result(60).copied_bytes == 0
    landed = ferry.open(tmp_path / "root/a")
    assert [name for name, tensor in landed.items() if not tensor.astype(np.float32).all()] == []


@pytest.mark.parametrize("kind", [Gives, GivesByDlpack])
def test_copies_that_others_make_are_told_of(server, kind):
    array = np.ones((8, 4), np.float32)
    given = {name: kind(array, give) for name, give in GIVERS.items()}
    report = ferry.save({**given, "number": 3.0, "scalar": np.float32(3)}, server.url("a"))
    assert (report.copied, report.copied_bytes) == (("copy", "other"), 2 * array.nbytes)


def test_without_a_snapshot_a_change_is_noticed(server, noise):
    array = noise(16 * MIB, np.uint8)
    handle = ferry.save_async({"w": array}, server.url("a"), snapshot=False, bwlimit="8M", codec="none")
    # At once: all is summed by now, also what goes out last.
    array[-1] ^= 255
    with pytest.raises(ferry.SourceChangedError):
        handle.result(60)


def test_a_cancelled_save_keeps_what_arrived(server, tmp_path, noise):
    array = noise(16 * MIB, np.uint8)
    handle = ferry.save_async({"w": array}, server.url("a"), **SLOW)
    time.sleep(1)
    handle.cancel()
    with pytest.raises(ferry.FerryError) as caught:
        handle.result(10)
    assert caught.value.code == "interrupted"
    assert not (tmp_path / "root/a").exists()
    report = ferry.save({"w": array}, server.url("a"))
    assert 0 < report.resumed_bytes < array.nbytes


def test_twins_for_asyncio(server, tmp_path, noise):
    told = []

    async def all_of_it():
        report = await aio.save({"w": noise(9)}, server.url("a"))
        assert report.tensors == 1
        assert await ferry.save_async({"w": noise(9)}, server.url("b"))
        await aio.save_file({"w": noise(9)}, server.url("c"), progress=told.append)
        await aio.pull(server.url("a"), tmp_path / "here")
        await aio.push(tmp_path / "here", server.url("d"))
        with pytest.raises(ferry.ExistsError):
            await aio.save({"w": noise(8)}, server.url("a"))
        # Several at a time, and the loop goes on.
        await asyncio.gather(*(aio.save({"w": noise(9)}, server.url(f"e{i}")) for i in range(5)))

    asyncio.run(all_of_it())
    assert told[-1].stage == "done"


def test_cancelling_the_task_cancels_the_transfer(server, noise):
    array = noise(16 * MIB, np.uint8)

    async def cancelled():
        task = asyncio.create_task(aio.save({"w": array}, server.url("a"), **SLOW))
        await asyncio.sleep(1)
        begun = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - begun

    assert asyncio.run(cancelled()) < 3
    status = ferry.Client(server.address).status("a")
    assert not status["published"] and not status["transfer"]["active"]
    assert status["transfer"]["durable_bytes"] > 0


def test_other_threads_run_while_one_waits(server, noise):
    """The GIL is released: a thread that only counts goes on counting."""
    counted = 0
    stop = threading.Event()

    def count():
        nonlocal counted
        while not stop.wait(0.001):
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    ferry.save_file({"w": noise(4 * MIB, np.uint8)}, server.url("a"), **SLOW)
    stop.set()
    thread.join()
    assert counted > 200


def test_a_handle_says_what_it_is_and_why_it_was_stopped(server, noise):
    handle = ferry.save_async({"w": noise(16 * MIB, np.uint8)}, server.url("a"), **SLOW)
    assert repr(handle) == f"<tensorferry.Handle 'save_async to {server.url('a')}' runs>"
    handle.cancel()
    with pytest.raises(ferry.FerryError, match="cancelled.*same call"):
        handle.result(10)
    assert "failed: interrupted" in repr(handle)
    done = ferry.save_async({"w": noise(9)}, server.url("b"))
    done.result(60)
    assert repr(done).endswith("is done>")


def test_a_failure_that_nobody_asked_for_is_logged(server, noise, caplog):
    ferry.save({"w": noise(9)}, server.url("a"))

    def failed(ask):
        handle = ferry.save_async({"w": noise(8)}, server.url("a"))
        assert wait_until(handle.done)
        if ask:
            assert isinstance(handle.exception(), ferry.ExistsError)

    def wait_until(done):
        until = time.monotonic() + 30
        while not done() and time.monotonic() < until:
            time.sleep(0.01)
        return done()

    failed(ask=True)
    gc.collect()
    assert caplog.records == []
    failed(ask=False)
    gc.collect()
    assert wait_until(lambda: bool(caplog.records))
    assert server.url("a") in caplog.text and "nobody asked" in caplog.text
