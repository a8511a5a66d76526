"""Pushes and pulls of files, what they report, and what is open to look at."""

import json
import os

import numpy as np
import pytest
from conftest import same_bytes
from safetensors.numpy import save_file as save_safetensors

import tensorferry as ferry


@pytest.fixture
def model(tmp_path, noise):
    tensors = {"a/w": noise((64, 64)), "a/b": noise(64), "c": noise((), np.int64)}
    folder = tmp_path / "model"
    folder.mkdir()
    save_safetensors(tensors, folder / "model.safetensors", {"who": "test"})
    (folder / "config.json").write_text("{}")
    return folder, tensors


def test_push_and_pull_and_open(server, tmp_path, model):
    folder, tensors = model
    report = ferry.push(folder, server.url("run"))
    assert (report.tensors, report.files, report.unchanged) == (3, 1, False)
    assert report.bytes == sum(t.nbytes for t in tensors.values()) + 2
    pulled = ferry.pull(server.url("run"), tmp_path / "here", include=["a/*"], exclude=["*/b"])
    assert pulled.tensors == 1
    assert list(ferry.open(tmp_path / "here")) == ["a/w"]
    with ferry.open(tmp_path / "root/run") as landed:
        assert set(landed) == set(tensors) and len(landed) == 3 and "a/w" in landed and "x" not in landed
        assert all(same_bytes(landed[name], array) for name, array in tensors.items())
        assert landed.files["config.json"].read_text() == "{}"
        assert landed.metadata == {"who": "test"}
        with pytest.raises(KeyError):
            landed["x"]


def test_a_local_folder_takes_and_renames(tmp_path, model):
    folder, _ = model
    ferry.push([folder / "model.safetensors"], tmp_path / "out", rename={"a/*": "model.*"}, first="c")
    assert set(ferry.open(tmp_path / "out")) == {"model.w", "model.b", "c"}
    with pytest.raises(ferry.FerryError, match="no tensor"):
        ferry.push(folder, tmp_path / "other", first="x")
    assert os.listdir(tmp_path / "out" / "..").count(".tensorferry") == 0


def test_one_safetensors_file_opens_the_same(tmp_path, model):
    folder, tensors = model
    ferry.push(folder, tmp_path / "out", out_format="safetensors")
    landed = ferry.open(tmp_path / "out")
    assert all(same_bytes(landed[name], array) for name, array in tensors.items())


def test_inspect_reads_any_format_and_servers(server, tmp_path, model):
    folder, tensors = model
    found = ferry.inspect(folder)
    assert found["format"] == "safetensors" and found["metadata"] == {"who": "test"}
    assert {t["name"]: tuple(t["shape"]) for t in found["tensors"]} == {n: t.shape for n, t in tensors.items()}
    ferry.push(folder, server.url("run"))
    assert ferry.inspect(tmp_path / "root/run")["format"] == "tensorferry"
    assert ferry.inspect(server.url("run"))["checkpoint"] == "run"


def test_verify_finds_a_flipped_bit(tmp_path, model):
    folder, _ = model
    ferry.push(folder, tmp_path / "out")
    assert ferry.verify(tmp_path / "out").ok
    file = tmp_path / "out" / ferry.open(tmp_path / "out").info("a/w")["file"]
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    report = ferry.verify(tmp_path / "out")
    assert [name for name, _, _ in report.damages] == ["a/w"]
    with pytest.raises(ferry.IntegrityError) as caught:
        report.raise_for_damage()
    assert caught.value.tensor == "a/w"
    file.write_bytes(data[:-1])
    with pytest.raises(ferry.IntegrityError):
        ferry.open(tmp_path / "out")["a/w"]


def test_progress_is_told_to_every_kind_of_listener(server, noise):
    tensors = {"w": noise(4 << 20, np.uint8)}
    told = []
    ferry.save_file(tensors, server.url("a"), progress=told.append, bwlimit="8M", codec="none")
    assert 2 < len(told) < 20
    assert told[-1].stage == "done" and told[-1]["settled_bytes"] == 4 << 20
    with pytest.raises(AttributeError):
        _ = told[-1].nothing

    class Callback:
        size = value = None

        def set_size(self, size):
            self.size = size

        def absolute_update(self, value):
            self.value = value

    callback = Callback()
    ferry.save_file(tensors, server.url("b"), progress=callback)
    assert (callback.size, callback.value) == (4 << 20, 4 << 20)
    ferry.save_file(tensors, server.url("c"), progress=True)
    with pytest.raises(TypeError):
        ferry.save_file(tensors, server.url("d"), progress=7)


def test_a_listener_that_raises_stops_the_transfer(server, noise):
    def tell(_state):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ferry.save_file({"w": noise(4 << 20, np.uint8)}, server.url("a"), progress=tell, bwlimit="2M", codec="none")
    assert not ferry.Client(server.address).status("a")["published"]


def test_a_client_asks_and_discards(server, tmp_path, noise):
    client = ferry.Client(server.url())
    assert client.authority == server.address
    client.save({"w": noise(9)}, "runs/1")
    client.save_file({"w": noise(9)}, "runs/2", metadata={"step": "2"})
    client.save_async({"w": noise(9)}, "other").result(60)
    assert sorted(row["name"] for row in client.list("runs/")) == ["runs/1", "runs/2"]
    assert client.status("other") == {"published": True, "transfer": None}
    assert client.describe("runs/2")["source"]["metadata"] == {"step": "2"}
    assert client.discard("nothing") is None
    assert client.pull("runs/1", tmp_path / "here").tensors == 1
    assert client.push(tmp_path / "here", "again").tensors == 1


def test_exports_lie_elsewhere(tmp_path, model):
    folder, tensors = model
    with ferry.Server(tmp_path / "root", exports={"base": folder}) as server:
        ferry.pull(server.url("base"), tmp_path / "here")
    assert set(ferry.open(tmp_path / "here")) == set(tensors)
    server.stop()


def test_the_manifest_of_a_folder_must_be_one(tmp_path):
    with pytest.raises(ferry.FerryError) as caught:
        ferry.open(tmp_path)
    assert caught.value.code == "source-missing"
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ferry.IntegrityError):
        ferry.open(tmp_path)


def test_types_that_share_bytes_are_the_bytes_of_the_file(tmp_path):
    header = json.dumps({
        "f4": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]},
        "empty": {"dtype": "F4", "shape": [0, 4], "data_offsets": [4, 4]},
        "half": {"dtype": "BF16", "shape": [2], "data_offsets": [4, 8]},
    }).encode()
    file = tmp_path / "m.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(8)))
    ferry.push(file, tmp_path / "npy", npy_dtype="named")
    ferry.push(file, tmp_path / "one", out_format="safetensors")
    for folder in ("npy", "one"):
        landed = ferry.open(tmp_path / folder)
        assert landed["f4"].dtype == np.uint8 and landed["f4"].tobytes() == bytes(range(4))
        assert landed["empty"].size == 0
        assert landed["half"].dtype.name == "bfloat16" and landed["half"].tobytes() == bytes(range(4, 8))
        assert landed.info("f4")["dtype"] == "float4_e2m1fn"
    assert np.array_equal(ferry.open(tmp_path / "npy")["f4"], np.load(tmp_path / "npy/f4.npy"))


def test_without_ml_dtypes_its_types_are_raw_bytes(tmp_path, monkeypatch):
    import ml_dtypes

    ferry.save_file({"b": np.ones(3, ml_dtypes.bfloat16), "f": np.ones(3, ml_dtypes.float8_e5m2)}, tmp_path / "m")
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    landed = ferry.open(tmp_path / "m")
    assert (landed["b"].dtype, landed["f"].dtype) == (np.dtype("V2"), np.dtype("V1"))
    assert landed["b"].view(np.uint16)[0] == 0x3F80


def test_a_pull_of_too_much_says_what_to_raise(server, tmp_path, noise):
    ferry.save_file({"w": noise(1 << 20, np.uint8)}, server.url("x"))
    for limit in (1000, "1K", "0.5MiB"):
        with pytest.raises(ferry.FerryError, match="raise max_bytes=") as caught:
            ferry.pull(server.url("x"), tmp_path / "here", max_bytes=limit)
        assert caught.value.code == "no-space"
    for wrong in (-1, "much", "1X", True):
        with pytest.raises(ValueError, match="max_bytes is a number of bytes"):
            ferry.pull(server.url("x"), tmp_path / "here", max_bytes=wrong)
    assert ferry.pull(server.url("x"), tmp_path / "here", max_bytes="1M").bytes == 1 << 20
