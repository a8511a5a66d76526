"""Ctrl-C, killed servers, memory, and the program: what needs a process of its own."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tensorferry as ferry

MIB = 1 << 20

SAVE = """
    import sys, time, signal
    import numpy as np
    import tensorferry as ferry

    array = np.random.default_rng(0).integers(0, 256, 64 << 20, np.uint8)
    heard = []
    def handler(number, frame):
        heard.append(time.monotonic())
        signal.default_int_handler(number, frame)
    signal.signal(signal.SIGINT, handler)
    def tell(state):
        if state.durable_bytes > 1 << 20:
            print("sending", flush=True)
    try:
        ferry.{call}
    except KeyboardInterrupt:
        print("heard", heard[0], time.monotonic(), flush=True)
"""


@pytest.mark.parametrize("call", [
    'save_file({"w": array}, sys.argv[1], bwlimit="8M", codec="none", progress=tell)',
    'push(sys.argv[2], sys.argv[1], bwlimit="8M", codec="none", progress=tell)',
    'pull(sys.argv[3], sys.argv[4], bwlimit="8M", progress=tell)',
])
def test_ctrl_c_is_heard_at_once_and_what_arrived_stays(server, tmp_path, noise, script, call):
    source = tmp_path / "w.npy"
    np.save(source, noise(64 * MIB, np.uint8))
    ferry.push(source, server.url("there"))
    process = script(SAVE.replace("{call}", call), server.url("x"), source, server.url("there"), tmp_path / "here")
    assert process.stdout.readline() == "sending\n"
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    line = [line for line in out.splitlines() if line.startswith("heard")]
    assert line, err
    heard, ended = map(float, line[0].split()[1:])
    # Python's handler ran soon, and the transfer ended in good order.
    assert heard - sent < 0.2, heard - sent
    assert ended - heard < 3
    if call.startswith("pull"):
        report = ferry.pull(server.url("there"), tmp_path / "here")
    else:
        transfer = ferry.Client(server.address).status("x")["transfer"]
        assert transfer["durable_bytes"] > MIB and not transfer["active"]
        return
    assert 0 < report.resumed_bytes < report.bytes


def test_a_killed_server_loses_nothing_that_was_durable(tmp_path, noise, script):
    serve = """
        import sys, time
        import tensorferry as ferry
        server = ferry.Server(sys.argv[1], sys.argv[2])
        print(server.address, flush=True)
        time.sleep(600)
    """
    first = script(serve, tmp_path / "root", "127.0.0.1:0")
    address = first.stdout.readline().strip()
    array = noise(32 * MIB, np.uint8)

    class Killed(Exception):
        pass

    durable = 0

    def kill(state):
        nonlocal durable
        if state.durable_bytes > 4 * MIB and first.poll() is None:
            durable = state.durable_bytes
            os.kill(first.pid, signal.SIGKILL)
            first.wait()

    with pytest.raises(ferry.RetryableError):
        ferry.save_file({"w": array}, f"ferry://{address}/x", bwlimit="8M", codec="none", retries=0, progress=kill)
    again = script(serve, tmp_path / "root", address)
    assert again.stdout.readline().strip() == address
    report = ferry.save_file({"w": array}, f"ferry://{address}/x")
    assert report.resumed_bytes >= durable > 4 * MIB
    # Only the rest went over the wire.
    assert report.bytes - report.resumed_bytes < array.nbytes - 4 * MIB
    assert (ferry.open(tmp_path / "root/x")["w"] == array).all()


def test_memory_is_lent_not_copied(tmp_path, script):
    """512 MiB are sent by a process whose anonymous memory grows by less than half of that."""
    with ferry.Server(tmp_path / "root") as server:
        process = script("""
            import sys, threading, time
            import numpy as np
            import tensorferry as ferry

            def anonymous():
                for line in open("/proc/self/status"):
                    if line.startswith("RssAnon"):
                        return int(line.split()[1]) << 10

            tensors = {f"w{i}": np.full(16 << 20, i + 1.5, np.float32) for i in range(8)}
            ferry.save_file({"small": tensors["w0"][:9]}, sys.argv[1] + "warm")
            before = most = anonymous()
            done = threading.Event()
            def watch():
                global most
                while not done.wait(0.005):
                    most = max(most, anonymous())
            thread = threading.Thread(target=watch)
            thread.start()
            report = ferry.save_file(tensors, sys.argv[1] + "x", codec="none")
            grown = most - before
            # What is copied shows, so that the figure means something.
            halves = {name: array[::2] for name, array in tensors.items()}
            import warnings
            warnings.simplefilter("ignore")
            copied = ferry.save_file(halves, sys.argv[1] + "y", codec="none").copied_bytes
            done.set()
            thread.join()
            assert most - before > 3 * copied // 4, (most - before, copied)
            print(report.bytes, grown, report.copied_bytes)
        """, server.url())
        out, err = process.communicate(timeout=300)
    size, grown, copied = map(int, out.split())
    assert (size, copied) == (512 * MIB, 0), err
    assert grown < 192 * MIB, f"{grown / MIB} MiB"
    print(f"anonymous memory grew by {grown / MIB:.0f} MiB for 512 MiB")


def test_arrays_are_let_go_of(server, noise):
    import gc
    import weakref

    class Watched(np.ndarray):
        pass

    array = noise(MIB, np.uint8).view(Watched)
    gone = weakref.ref(array)
    ferry.save_file({"w": array}, server.url("a"))
    del array
    gc.collect()
    deadline = time.monotonic() + 5
    while gone() is not None and time.monotonic() < deadline:
        # What Rust dropped elsewhere is given back by the next call.
        ferry.Client(server.address).list()
    assert gone() is None


def test_a_process_waits_for_its_saves(server, tmp_path, script):
    process = script("""
        import sys
        import numpy as np
        import tensorferry as ferry
        ferry.save_async({"w": np.ones(1 << 20)}, sys.argv[1], bwlimit="8M", codec="none")
    """, server.url("a"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "", err
    assert ferry.open(tmp_path / "root/a")["w"].sum() == 1 << 20


@pytest.mark.parametrize("call", ["result()", "exception()", "result(60)"])
def test_ctrl_c_while_one_waits_for_a_handle_cancels_it(server, tmp_path, script, call):
    process = script(SAVE.replace("{call}", f"""save_async(
            {{"w": array}}, sys.argv[1], bwlimit="8M", codec="none", progress=tell).{call}"""), server.url("x"))
    assert process.stdout.readline() == "sending\n"
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - sent < 4, err
    assert process.returncode == 0 and err == "", err
    transfer = ferry.Client(server.address).status("x")["transfer"]
    assert transfer["durable_bytes"] > MIB and not transfer["active"]


def test_a_failed_save_that_nobody_asked_for_is_told_of_at_the_end(server, script):
    ferry.save_file({"w": np.zeros(3)}, server.url("a"))
    process = script("""
        import sys
        import numpy as np
        import tensorferry as ferry
        handle = ferry.save_async({"w": np.ones(3)}, sys.argv[1])
    """, server.url("a"))
    _, err = process.communicate(timeout=60)
    assert err.count(f"save_async to {server.url('a')} failed and nobody asked") == 1, err
    assert "overwrite=True" in err and "Traceback" not in err


def test_a_forked_child_is_told_what_to_do(script):
    process = script("""
        import os, tensorferry as ferry
        with ferry.Server("/nonexistent" if False else __file__ + ".root") as server:
            child = os.fork()
            if child == 0:
                try:
                    ferry.Client(server.address).list()
                except RuntimeError as error:
                    os._exit(7 if "spawn" in str(error) else 1)
                os._exit(2)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    out, err = process.communicate(timeout=30)
    assert out.strip() == "7", err


def test_the_wheel_has_the_program(server, tmp_path, noise):
    beside = os.path.join(os.path.dirname(sys.executable), "tensorferry")
    program = beside if os.path.exists(beside) else shutil.which("tensorferry")
    if program is None:
        pytest.skip("the package is not installed")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert re.match(r"tensorferry \d", said)
    np.save(tmp_path / "w.npy", noise(9))
    subprocess.run([program, "push", tmp_path / "w.npy", server.url("x")], check=True, capture_output=True)
    assert ferry.Client(server.address).status("x")["published"]
