"""What is saved lands as it was: every type, order and nesting."""

import collections
import dataclasses
import warnings

import ml_dtypes
import numpy as np
import pytest
from conftest import same_bytes

import tensorferry as ferry

NUMPY = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()
ML_DTYPES = """bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e4m3b11fnuz float8_e4m3
    float8_e3m4 float8_e8m0fnu int4 uint4 int2 uint2""".split()


def every_dtype(noise):
    for name in NUMPY + ML_DTYPES:
        dtype = np.dtype(name) if name in NUMPY else np.dtype(getattr(ml_dtypes, name))
        array = noise((3, 5), np.uint8).astype(np.uint8)
        if name == "bool":
            yield name, (array % 2).astype(bool)
        elif name in ("int4", "uint4", "int2", "uint2"):
            yield name, (array % 2).astype(dtype)
        else:
            yield name, noise((3, 5), dtype)


@pytest.mark.parametrize("place", ["server", "folder"])
@pytest.mark.parametrize("layout", ["named", "indexed"])
def test_every_dtype_lands_as_it_was(server, tmp_path, noise, place, layout):
    tensors = dict(every_dtype(noise))
    dest = server.url("all") if place == "server" else tmp_path / "all"
    report = ferry.save_file(tensors, dest, layout=layout)
    assert (report.tensors, report.copied_bytes) == (len(tensors), 0)
    landed = ferry.open(tmp_path / "root/all" if place == "server" else dest)
    assert list(landed) == list(tensors)
    for name, array in tensors.items():
        assert isinstance(landed[name], np.memmap)
        assert not landed[name].flags.writeable
        assert same_bytes(landed[name], array), name


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (4, 3, 2)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_shapes_and_orders_land_without_a_copy(server, tmp_path, noise, shape, order):
    array = np.asarray(noise(shape, np.int32), order=order)
    report = ferry.save_file({"w": array}, server.url("w"))
    assert report.copied_bytes == 0
    landed = ferry.open(tmp_path / "root/w")["w"]
    assert same_bytes(landed, array)
    assert landed.flags.f_contiguous == array.flags.f_contiguous
    assert same_bytes(np.load(tmp_path / "root/w/w.npy"), array)


def test_big_endian_stays_so(server, tmp_path, noise):
    array = noise((5, 2), ">f8")
    assert ferry.save_file({"w": array}, server.url("w")).copied_bytes == 0
    landed = ferry.open(tmp_path / "root/w")["w"]
    assert landed.dtype == np.dtype(">f8")
    assert same_bytes(landed, array)


def test_gaps_are_copied_and_told_of(server, tmp_path, noise):
    array = noise((1024, 1024), np.float32)
    with pytest.warns(ferry.CopyWarning, match="w"):
        report = ferry.save_file({"w": array[:, ::2], "b": array[0]}, server.url("w"))
    assert (report.copied_bytes, report.copied) == (array.nbytes // 2, ("w",))
    assert same_bytes(ferry.open(tmp_path / "root/w")["w"], array[:, ::2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ferry.save_file({"w": array[:4, ::2]}, server.url("few")).copied_bytes == 8192


def test_nested_objects_have_their_keys_as_names(server, tmp_path):
    pair = collections.namedtuple("Pair", "left right")

    @dataclasses.dataclass
    class State:
        step: int
        moments: list

    one = np.ones(2, np.float32)
    obj = {
        "a": {"b": one, 7: one},
        "c": [one, (one, None)],
        "d": pair(one, 3),
        "e": State(9, [one]),
    }
    ferry.save(obj, server.url("tree"))
    landed = ferry.open(tmp_path / "root/tree")
    assert list(landed) == "a/b a/7 c/0 c/1/0 d/left d/right e/step e/moments/0".split()
    assert landed["e/step"] == 9
    ferry.save(one, server.url("single"), name="kernel")
    assert list(ferry.open(tmp_path / "root/single")) == ["kernel"]


def test_what_is_no_tensor_is_refused_by_name(server):
    for wrong in ({"a": {"b": "text"}}, {"a": {"b": object()}}, {"a": {"b": np.array(["x"])}}):
        with pytest.raises(ferry.FerryError, match="a/b") as caught:
            ferry.save(wrong, server.url("x"))
        assert caught.value.code == "usage"
    with pytest.raises(ferry.FerryError, match="float4"):
        ferry.save({"a": np.zeros(2, ml_dtypes.float4_e2m1fn)}, server.url("x"))
    with pytest.raises(TypeError):
        ferry.save_file([1], server.url("x"))
    cycle = []
    cycle.append(cycle)
    with pytest.raises(ferry.FerryError, match="nested"):
        ferry.save(cycle, server.url("x"))
    assert ferry.Client(server.address).list() == []


def test_metadata_and_flags_land_in_the_manifest(server, tmp_path):
    class Variable(np.ndarray):
        trainable = True

    tensors = {"w": np.ones(2).view(Variable), "b": np.ones(2)}
    ferry.save_file(tensors, server.url("m"), metadata={"step": "900"})
    landed = ferry.open(tmp_path / "root/m")
    assert landed.metadata == {"step": "900"}
    assert landed.trainable == ("w",)
    assert (landed.name, landed.manifest["source"]["format"]) == ("m", "memory")


def test_memory_written_on_the_way_is_noticed_by_name(server, tmp_path, noise):
    """The array changes once it is summed, before all of it has gone out."""
    array = noise(32 << 20, np.uint8)
    told = []

    def disturb(state):
        if not told:
            array[-1] ^= 255
        told.append(state)

    with pytest.raises(ferry.SourceChangedError) as caught:
        # So slow that the last byte goes out long after the first call.
        slow = {"bwlimit": "24M", "codec": "none"}
        ferry.save_file({"calm": noise(8), "busy": array}, server.url("m"), progress=disturb, **slow)
    assert told[0].settled_bytes < array.nbytes
    assert (caught.value.tensor, caught.value.code) == ("busy", "source-changed")
    assert not (tmp_path / "root/m").exists()
    report = ferry.save_file({"calm": noise(8), "busy": array}, server.url("m"))
    assert report.resumed_bytes > 0
    assert same_bytes(ferry.open(tmp_path / "root/m")["busy"], array)


def test_a_hundred_small_tensors_and_names_of_all_kinds(server, tmp_path):
    names = ["a b", "ä/ö", "x.y", "A", "a", "../up", "con", "%2F"] + [f"t{i}" for i in range(100)]
    tensors = {name: np.full(3, index) for index, name in enumerate(names)}
    ferry.save_file(tensors, server.url("names"))
    landed = ferry.open(tmp_path / "root/names")
    assert list(landed) == names
    assert all(same_bytes(landed[name], tensors[name]) for name in names)


def test_numpy_does_not_resize_what_is_lent(server, tmp_path):
    array = np.ones(4 << 20, np.uint8)
    handle = ferry.save_async({"w": array}, server.url("w"), snapshot=False, bwlimit="4M", codec="none")
    with pytest.raises(ValueError, match="resize"):
        array.resize(8 << 20)
    handle.result(60)
    assert ferry.open(tmp_path / "root/w")["w"].all()
