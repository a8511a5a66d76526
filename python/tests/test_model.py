"""Models that serve their weights, and checkpoints that go back into models."""

import logging
import os
import socket
import sys
import threading
import time
import weakref

import ml_dtypes
import numpy as np
import pytest
from conftest import same_bytes

import tensorferry as ferry


def test_each_pull_gets_what_is_there_at_that_moment(tmp_path, noise):
    model = {"layer": {"w": noise((512, 512), np.int32), "b": np.zeros(3, np.float32)}}
    with ferry.serve_model(model) as server:
        assert ferry.pull(server.url, tmp_path / "1").tensors == 2
        before = model["layer"]["w"].copy()
        model["layer"]["w"] += 1
        model["layer"]["new"] = np.ones(2)
        assert ferry.pull(server.url, tmp_path / "2", include=["*/w"]).tensors == 1
        assert ferry.pull(server.url, tmp_path / "3", exclude=["*/w"]).tensors == 2
        # Nothing is taken in.
        with pytest.raises(ferry.FerryError):
            ferry.save_file({"w": noise(9)}, f"ferry://{server.address}/other")
    assert same_bytes(ferry.open(tmp_path / "1")["layer/w"], before)
    assert same_bytes(ferry.open(tmp_path / "2")["layer/w"], model["layer"]["w"])


def test_a_function_gives_the_model_and_its_errors_are_kept(tmp_path, caplog):
    def model():
        if broken:
            raise ZeroDivisionError("not yet")
        return {"w": np.ones(3)}

    broken = True
    with ferry.serve_model(model, name="run/now") as server:
        with caplog.at_level(logging.ERROR, "tensorferry"), pytest.raises(ferry.FerryError) as caught:
            ferry.pull(server.url, tmp_path / "here")
        assert isinstance(server.last_error, ZeroDivisionError)
        assert "not yet" in caplog.text and "not yet" not in str(caught.value)
        broken = False
        ferry.pull(server.url, tmp_path / "here")


def test_a_model_without_weights_is_not_offered_as_an_empty_checkpoint(tmp_path):
    model = {}
    with ferry.serve_model(model) as server:
        with pytest.raises(ferry.FerryError):
            ferry.pull(server.url, tmp_path / "here")
        assert "no tensor was found" in str(server.last_error)
        assert not (tmp_path / "here").exists()
        model["w"] = np.ones(3)
        assert ferry.pull(server.url, tmp_path / "here").tensors == 1


def test_under_the_lock_no_half_step_is_seen(tmp_path):
    model = {f"w{i}": np.zeros(1000, np.int64) for i in range(50)}
    stop = threading.Event()
    with ferry.serve_model(model) as server:
        def train():
            while not stop.is_set():
                with server.lock:
                    for array in model.values():
                        array += 1

        thread = threading.Thread(target=train)
        thread.start()
        try:
            for attempt in range(3):
                ferry.pull(server.url, tmp_path / str(attempt))
        finally:
            stop.set()
            thread.join()
    for attempt in range(3):
        landed = ferry.open(tmp_path / str(attempt))
        assert len({int(value) for array in landed.values() for value in array[:1]}) == 1


def test_the_function_may_take_the_lock_itself(tmp_path):
    def model():
        with server.lock:
            return {"w": np.ones(3)}

    with ferry.serve_model(model) as server:
        assert ferry.pull(server.url, tmp_path / "here").tensors == 1
        # And it is free again, for whoever trains.
        assert server.lock.acquire(timeout=5)
        server.lock.release()


def test_a_server_that_nobody_has_ends(tmp_path):
    model = {"w": np.ones(3)}
    server = ferry.serve_model(model)
    ferry.pull(server.url, tmp_path / "here")
    alive, root, address = weakref.ref(server), server.root, server.address
    del server
    assert alive() is None and not os.path.exists(root)
    host, _, port = address.rpartition(":")
    for _ in range(100):
        try:
            socket.create_connection((host, int(port)), 1).close()
        except ConnectionRefusedError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("it still listens")
    assert sys.getrefcount(model) <= 2


def test_load_into_arrays(server, tmp_path, noise):
    saved = {"a": {"w": noise((3, 4)), "b": noise(4, np.int16)}, "c": [noise(2, np.float64)]}
    ferry.save(saved, server.url("m"))
    model = {"a": {"w": np.zeros((3, 4), np.float32), "b": np.zeros(4, np.int16)}, "c": [np.zeros(2)]}
    loaded = ferry.load_into(model, server.url("m"))
    assert (loaded.tensors, loaded.missing, loaded.unused) == (3, (), ())
    assert same_bytes(model["a"]["w"], saved["a"]["w"]) and same_bytes(model["c"][0], saved["c"][0])
    ferry.load_into(model, server.url("m"), folder=tmp_path / "kept")
    ferry.load_into(model, tmp_path / "kept")
    del model["a"]["b"]
    assert ferry.load_into(model, tmp_path / "root/m").unused == ("a/b",)


def test_load_into_says_what_does_not_fit_and_assigns_nothing(tmp_path, noise):
    ferry.save({"a": noise((2, 3)), "b": noise(4)}, tmp_path / "m")
    a = np.zeros((2, 3), np.float32)
    for wrong, words in [
        ({"a": a, "x": np.zeros(1)}, "lacks 1 of 2 tensors: x"),
        ({"a": a, "b": np.zeros(5, np.float32)}, r"'b' has shape \[4\] in the checkpoint and \[5\] here"),
        ({"a": a, "b": np.zeros(4, np.float64)}, "'b' has type float32 in the checkpoint and float64 here"),
    ]:
        with pytest.raises(ferry.FerryError, match=words):
            ferry.load_into(wrong, tmp_path / "m")
        assert not a.any()
    loaded = ferry.load_into({"a": a, "x": np.zeros(1)}, tmp_path / "m", strict=False)
    assert loaded.missing == ("x",) and a.any()
    wide = np.zeros(4, np.float64)
    ferry.load_into({"b": wide}, tmp_path / "m", cast=True)
    assert wide.any()
    with pytest.raises(ferry.FerryError, match="no tensors"):
        ferry.load_into({}, tmp_path / "m")


def test_raw_bytes_are_never_taken_for_numbers(tmp_path, monkeypatch):
    bits = np.ones(4, np.int16)
    saved = {
        "a": np.ones(4, np.float32),
        "bf16": bits.astype(ml_dtypes.bfloat16),
        "f8": bits.astype(ml_dtypes.float8_e5m2),
        "raw": bits.astype(np.int32).view("V4"),
    }
    ferry.save(saved, tmp_path / "m")
    header = b'{"packed": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}'
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    ferry.push(tmp_path / "m.safetensors", tmp_path / "packed")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    a = np.zeros(4, np.float32)
    for model, folder, words in [
        ({"a": a, "bf16": np.zeros(4, np.float32)}, "m", "'bf16' has type bfloat16 .* and float32 here .*ml_dtypes"),
        ({"a": a, "f8": np.zeros(4, np.float32)}, "m", "'f8' has type float8_e5m2 .* and float32 here .*ml_dtypes"),
        ({"a": a, "raw": np.zeros(4, np.float32)}, "m", "'raw' has type V4 .* and float32 here .*no conversion"),
        ({"a": np.zeros(4, "V4")}, "m", "'a' has type float32 .* and void32 here .*no conversion"),
        ({"packed": a}, "packed", "'packed' has type float4_e2m1fn .* and float32 here .*no conversion"),
    ]:
        for cast in (True, False):
            with pytest.raises(ferry.FerryError, match=words):
                ferry.load_into(model, tmp_path / folder, cast=cast)
            assert not a.any()
    # Raw bytes into raw bytes are what they are.
    model = {"bf16": np.zeros(4, "V2"), "raw": np.zeros(4, "V4"), "f8": np.zeros(4, "V1")}
    ferry.load_into(model, tmp_path / "m")
    assert model["bf16"].view(np.uint16).tolist() == [0x3F80] * 4 and same_bytes(model["raw"], saved["raw"])
