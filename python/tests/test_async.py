"""Saves in the background, and asyncio."""

import asyncio
import threading
import time

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
