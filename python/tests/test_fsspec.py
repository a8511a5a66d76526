"""Files on a server through fsspec, against a server of its own."""

from __future__ import annotations

import gzip
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

fsspec = pytest.importorskip("fsspec")

import tensorferry  # noqa: E402
from tensorferry.fsspec import FerryFileSystem, checkpoint_name, path_of  # noqa: E402


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tensorferry.Server]:
    with tensorferry.Server(tmp_path / "root") as server:
        yield server


@pytest.fixture
def fs(server: tensorferry.Server) -> FerryFileSystem:
    return FerryFileSystem(host=server.address, skip_instance_cache=True)


@pytest.fixture
def run7(server: tensorferry.Server) -> dict[str, np.ndarray]:
    """A checkpoint of two tensors on the server."""
    arrays = {"norm.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "step": np.array(900)}
    tensorferry.save_file(arrays, server.url("run7"), metadata={"note": "of a test"})
    return arrays


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/run7/step-1000/__0_0.distcp", "run7/step-1000/__0_0.distcp"),
        ("/run7/.metadata", "run7/-.2emetadata"),
        ("/a b/ä", "a-.20b/-.c3-.a4"),
        ("/a-.20b", "a-.2d.20b"),
        ("/a-.b", "a-.b"),
        ("/-", "-"),
        ("/100%", "100-.25"),
    ],
)
def test_paths_and_names_are_inverse(path: str, name: str) -> None:
    assert checkpoint_name(path) == name
    assert path_of(name) == path


@pytest.mark.parametrize("path", ["", "/", "/a/../b", "/./a"])
def test_a_path_without_a_file_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="names no file"):
        checkpoint_name(path)


def test_the_address_is_taken_from_the_url(server: tensorferry.Server) -> None:
    fs, path = fsspec.core.url_to_fs(f"ferry://{server.address}/a/b", skip_instance_cache=True)
    assert (type(fs), fs.authority, path) == (FerryFileSystem, server.address, "/a/b")
    assert fs.unstrip_protocol(path) == f"ferry://{server.address}/a/b"
    assert FerryFileSystem(host="lab", skip_instance_cache=True).authority == "lab:7744"
    assert FerryFileSystem(host="::1", port=5, skip_instance_cache=True).authority == "[::1]:5"


# ---------------------------------------------------------------- writing


def test_a_written_file_is_published_at_close_and_not_before(fs: FerryFileSystem, tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(3_000_000)
    file = fs.open("/logs/run 7/.a", "wb")
    file.write(data[:1000])
    file.flush()
    os.fsync(file.fileno())
    file.write(data[1000:])
    assert not fs.exists("/logs/run 7/.a")
    file.close()
    assert fs.cat("/logs/run 7/.a") == data
    assert (tmp_path / "root/logs/run-.207/-.2ea/manifest.json").is_file()
    assert fs.info("/logs/run 7/.a")["size"] == len(data)
    assert fs.ls("/logs", detail=False) == ["/logs/run 7"]
    assert fs.ls("/logs/run 7", detail=False) == ["/logs/run 7/.a"]
    assert fs.find("/") == ["/logs/run 7/.a"]


def test_another_process_sees_it(fs: FerryFileSystem) -> None:
    with fs.open("/a/b.txt", "w", encoding="utf-16") as file:
        file.write("ä\n")
    program = f"import fsspec; print(fsspec.open('ferry://{fs.authority}/a/b.txt').open().read())"
    # The entry point makes the protocol known: nothing of tensorferry is imported there.
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == repr("ä\n".encode("utf-16"))


def test_leaving_by_an_exception_publishes_nothing(fs: FerryFileSystem) -> None:
    for mode in ("wb", "w"):
        with pytest.raises(ZeroDivisionError), fs.open("/half", mode) as file:
            file.write(b"half" if mode == "wb" else "half")
            raise ZeroDivisionError
        assert not fs.exists("/half")


def test_forgetting_to_close_publishes_nothing(fs: FerryFileSystem) -> None:
    for mode in ("wb", "w"):
        file = fs.open("/half", mode)
        file.write(b"half" if mode == "wb" else "half")
        del file
        assert not fs.exists("/half")


def test_a_file_is_replaced_unless_told_otherwise(fs: FerryFileSystem, server: tensorferry.Server) -> None:
    fs.pipe("/note", b"first")
    fs.pipe("/note", b"again")
    assert fs.cat("/note") == b"again"
    with pytest.raises(FileExistsError):
        fs.open("/note", "xb")
    careful = FerryFileSystem(host=server.address, overwrite=False, skip_instance_cache=True)
    with pytest.raises(FileExistsError):
        careful.open("/note", "wb")
    assert fs.cat("/note") == b"again"


def test_an_empty_file_is_a_file(fs: FerryFileSystem) -> None:
    fs.pipe("/empty", b"")
    assert fs.info("/empty")["size"] == 0
    assert fs.cat("/empty") == b""


def test_appending_is_refused(fs: FerryFileSystem) -> None:
    with pytest.raises(ValueError, match="ab"):
        fs.open("/note", "ab")


def test_a_zip_archive_can_be_written_and_read(fs: FerryFileSystem) -> None:
    # numpy goes back in the file to fill in what it could not know before.
    with fs.open("/arrays.npz", "wb") as file:
        np.savez(file, a=np.arange(5), b=np.eye(2))
    with fs.open("/arrays.npz", "rb") as file, np.load(file) as landed:
        assert landed["a"].tolist() == [0, 1, 2, 3, 4]


def test_a_transaction_publishes_at_its_end(fs: FerryFileSystem) -> None:
    with fs.transaction:
        with fs.open("/t/a", "wb") as file:
            file.write(b"a")
        with fs.open("/t/b", "w") as file:
            file.write("b")
        assert not fs.exists("/t")
    assert fs.cat(["/t/a", "/t/b"]) == {"/t/a": b"a", "/t/b": b"b"}
    with pytest.raises(ZeroDivisionError), fs.transaction:
        with fs.open("/t/c", "wb") as file:
            file.write(b"c")
        raise ZeroDivisionError
    assert not fs.exists("/t/c")


# ---------------------------------------------------------------- removing


def test_a_removed_file_is_gone_and_can_be_written_again(fs: FerryFileSystem, tmp_path: Path) -> None:
    fs.pipe({"/d/a": b"x" * 1_000_000, "/d/b": b"b"})
    fs.rm("/d/a")
    assert not fs.exists("/d/a")
    assert fs.ls("/d", detail=False) == ["/d/b"]
    with pytest.raises(FileNotFoundError):
        fs.cat("/d/a")
    left = sum(path.stat().st_size for path in (tmp_path / "root/d/a").rglob("*") if path.is_file())
    assert left < 4096
    with fs.open("/d/a", "xb") as file:
        file.write(b"new")
    assert fs.cat("/d/a") == b"new"
    fs.rm("/d", recursive=True)
    assert not fs.exists("/d")


def test_a_file_can_be_renamed(fs: FerryFileSystem) -> None:
    # What torch.distributed.checkpoint does at its end.
    fs.makedirs("/step", exist_ok=True)
    fs.pipe("/step/.metadata.tmp", b"all")
    fs.rename("/step/.metadata.tmp", "/step/.metadata")
    assert fs.ls("/step", detail=False) == ["/step/.metadata"]
    assert fs.cat("/step/.metadata") == b"all"


def test_a_checkpoint_cannot_be_removed(fs: FerryFileSystem, run7: dict[str, np.ndarray]) -> None:
    for path in ("/run7", "/run7/norm.weight.npy"):
        with pytest.raises(NotImplementedError, match="deletes"):
            fs.rm(path)
    with pytest.raises(NotImplementedError):
        fs.rm("/", recursive=True)
    assert fs.exists("/run7/norm.weight.npy")


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_a_folder(fs: FerryFileSystem, run7: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert fs.isdir("/run7")
    landed = tmp_path / "root/run7"
    names = {row["name"]: row["size"] for row in fs.ls("/run7")}
    assert sorted(names) == ["/run7/manifest.json", "/run7/norm.weight.npy", "/run7/step.npy"]
    for file in ("norm.weight.npy", "step.npy"):
        assert names[f"/run7/{file}"] == (landed / file).stat().st_size
        assert fs.cat(f"/run7/{file}") == (landed / file).read_bytes()
    with fs.open("/run7/norm.weight.npy") as file:
        assert np.array_equal(np.load(file), run7["norm.weight"])
    assert b'"norm.weight"' in fs.cat("/run7/manifest.json")
    assert fs.info("/run7/manifest.json")["size"] == len(fs.cat("/run7/manifest.json"))


def test_only_the_tensor_asked_for_is_fetched(server: tensorferry.Server, tmp_path: Path) -> None:
    arrays = {"small": np.arange(3), "big": np.zeros(1 << 18), "large": np.ones(1 << 18)}
    tensorferry.save_file(arrays, server.url("run8"))
    cache = tmp_path / "cache"
    fs = FerryFileSystem(host=server.address, cache_dir=cache, skip_instance_cache=True)
    fs.cat("/run8/small.npy")
    assert [path.name for path in cache.rglob("*.npy")] == ["small.npy"]


def test_threads_fetch_a_file_once(fs: FerryFileSystem, run7: dict[str, np.ndarray]) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(fs.cat_file, ["/run7/norm.weight.npy"] * 8))
    assert len(found) == 1


def test_a_file_system_survives_its_pickle(fs: FerryFileSystem, run7: dict[str, np.ndarray]) -> None:
    # As torch's and dask's workers get it.
    again = pickle.loads(pickle.dumps(fs))
    assert again.cat("/run7/step.npy") == fs.cat("/run7/step.npy")


@pytest.mark.parametrize("mode", ["wb", "wt", "xb"])
def test_what_is_compressed_is_published_once_it_is_closed(fs: FerryFileSystem, mode: str) -> None:
    line = b"line\n" if "b" in mode else "line\n"
    with fs.open("/log.gz", mode, compression="infer") as file:
        file.write(line)
    assert gzip.decompress(fs.cat("/log.gz")) == b"line\n"
    with fs.open("/log.gz", "rt", compression="gzip") as file:
        assert file.read() == "line\n"
    with pytest.raises(ZeroDivisionError), fs.open("/half.gz", mode, compression="gzip") as file:
        file.write(line)
        raise ZeroDivisionError
    file = fs.open("/half.gz", mode, compression="gzip")
    file.write(line)
    del file
    assert not fs.exists("/half.gz")


def test_side_files_are_in_files(fs: FerryFileSystem, server: tensorferry.Server, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    np.save(model / "w.npy", np.arange(10))
    (model / "config.json").write_text('{"layers": 3}')
    tensorferry.push(model, server.url("runs/9"))
    assert fs.ls("/runs/9", detail=False) == ["/runs/9/files", "/runs/9/manifest.json", "/runs/9/w.npy"]
    assert fs.cat("/runs/9/files/config.json") == b'{"layers": 3}'
    assert sorted(fs.find("/")) == ["/runs/9/files/config.json", "/runs/9/manifest.json", "/runs/9/w.npy"]
    fs.get("/runs/9", str(tmp_path / "got"), recursive=True)
    assert np.load(tmp_path / "got/w.npy").tolist() == list(range(10))


def test_a_checkpoint_cannot_be_written_into(fs: FerryFileSystem, run7: dict[str, np.ndarray]) -> None:
    with pytest.raises(IsADirectoryError):
        fs.open("/run7", "wb")
    with pytest.raises(PermissionError, match="never changes"):
        fs.open("/run7/step.npy", "wb")
    with pytest.raises((tensorferry.FerryError, PermissionError)), fs.open("/run7/new", "wb") as file:
        file.write(b"x")
    assert fs.isdir("/run7")


def test_what_is_not_there_is_not_found(fs: FerryFileSystem, run7: dict[str, np.ndarray]) -> None:
    for path in ("/no", "/run", "/run70", "/run7/no.npy", "/run7/files"):
        assert not fs.exists(path)
        with pytest.raises(FileNotFoundError):
            fs.ls(path)
    assert fs.ls("/") != []


def test_a_server_that_is_gone_is_no_missing_file(fs: FerryFileSystem, server: tensorferry.Server) -> None:
    fs.pipe("/note", b"x")
    server.stop()
    with pytest.raises(Exception) as caught:
        fs.exists("/note")
    assert not isinstance(caught.value, FileNotFoundError)
