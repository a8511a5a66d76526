"""A manifest from anybody leads to no file outside its folder."""

import json
import os
import socket

import numpy as np
import pytest
from conftest import same_bytes

import tensorferry as ferry


@pytest.fixture
def folder(tmp_path, noise):
    """A landed folder, beside a file that is nobody's business."""
    (tmp_path / "secret").write_bytes(bytes(4096))
    source = tmp_path / "source"
    source.mkdir()
    np.save(source / "w.npy", noise((8, 8)))
    (source / "config.json").write_text("{}")
    ferry.push(source, tmp_path / "landed")
    return tmp_path / "landed"


def rewrite(folder, kind, file):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[kind][0]["file"] = file
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["tensors", "files"])
@pytest.mark.parametrize(
    "file", ["{}", "../secret", "x/../../secret", "", ".", "./w.npy", "a//w.npy", "w.npy/", "a\\b", "a\0b"]
)
def test_paths_that_lead_out_are_refused_at_once(folder, tmp_path, kind, file):
    rewrite(folder, kind, file.format(tmp_path / "secret"))
    with pytest.raises(ferry.IntegrityError, match="is no plain path in the folder") as caught:
        ferry.open(folder)
    assert (caught.value.code, caught.value.exit_code) == ("integrity", 6)
    assert caught.value.tensor and caught.value.hint


def put_link(place, tmp_path):
    place.symlink_to(tmp_path / "secret")


def put_pipe(place, tmp_path):
    os.mkfifo(place)


def put_folder(place, tmp_path):
    place.mkdir()


def put_socket(place, tmp_path):
    with socket.socket(socket.AF_UNIX) as bound:
        # The path of a socket is short.
        here = os.open(place.parent, os.O_RDONLY)
        try:
            bound.bind(f"/proc/self/fd/{here}/{place.name}")
        finally:
            os.close(here)


@pytest.mark.parametrize("put", [put_link, put_pipe, put_folder, put_socket])
def test_only_regular_files_are_opened(folder, tmp_path, put):
    checkpoint = ferry.open(folder)
    for entry in checkpoint.manifest["tensors"] + checkpoint.manifest["files"]:
        (folder / entry["file"]).unlink()
        put(folder / entry["file"], tmp_path)
    with pytest.raises(ferry.IntegrityError, match="'w'.*regular file"):
        checkpoint["w"]
    with pytest.raises(ferry.IntegrityError, match=r"config\.json.*regular file"):
        checkpoint.files


def test_no_folder_on_the_way_is_a_link(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / "w.npy").rename(outside / "w.npy")
    (folder / "inner").symlink_to(outside)
    rewrite(folder, "tensors", "inner/w.npy")
    with pytest.raises(ferry.IntegrityError, match="goes through one"):
        ferry.open(folder)["w"]
    # A true folder there is as good as ever, and so is a link to the whole.
    (folder / "inner").unlink()
    outside.rename(folder / "inner")
    (tmp_path / "link").symlink_to(folder)
    there = ferry.open(tmp_path / "link")["w"]
    assert same_bytes(there, np.load(folder / "inner/w.npy"))
    assert there.filename == (folder / "inner/w.npy").resolve()


def test_what_is_gone_is_told_as_ever(folder):
    checkpoint = ferry.open(folder)
    (folder / "w.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"w\.npy"):
        checkpoint["w"]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with pytest.raises(FileNotFoundError):
            checkpoint["w"]
        assert checkpoint.files.keys() == {"config.json"}
    assert len(os.listdir("/proc/self/fd")) == before
