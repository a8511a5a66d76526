"""Storage for torch.distributed.checkpoint against stand-ins for torch.

torch is not on this project's test machines. What stands in for it here has the names, the fields
and the calls of torch's documented interfaces and nothing else, and is used only where the real
one is not installed; so these tests show that the adapter keeps to what it was written against,
not that it works with torch.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.util
import io
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorferry

if importlib.util.find_spec("torch") is not None:
    pytest.skip("torch is installed: these stand-ins would hide it", allow_module_level=True)


# ---------------------------------------------------------------- stand-ins


class Dtype:
    """torch.float32 and so on: pickled by name, as torch does."""

    def __init__(self, name: str, numpy: Any) -> None:
        self.name, self.numpy = name, np.dtype(numpy)

    def __reduce__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return f"torch.{self.name}"


@dataclasses.dataclass(frozen=True)
class Device:
    """torch.device."""

    type: str


class Tensor:
    """As much of torch.Tensor as storage and the core need, over numpy."""

    def __init__(self, array: np.ndarray, device: str = "cpu") -> None:
        self.array, self.device = array, Device(device)

    @property
    def dtype(self) -> Dtype:
        return DTYPES[self.array.dtype.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return Tensor(self.array)

    def contiguous(self) -> Tensor:
        return Tensor(np.ascontiguousarray(self.array).reshape(self.array.shape), self.device.type)

    def is_conj(self) -> bool:
        return False

    def is_neg(self) -> bool:
        return False

    def numpy(self) -> np.ndarray:
        if self.device.type != "cpu":
            raise TypeError("memory of another device has no address here")
        if self.dtype.name == "bfloat16":
            raise TypeError("numpy has no such type")
        return self.array

    def numel(self) -> int:
        return self.array.size

    def element_size(self) -> int:
        return self.array.itemsize

    def view(self, dtype: Dtype) -> Tensor:
        return Tensor(self.array.view(dtype.numpy))

    def reshape(self, shape: tuple[int, ...]) -> Tensor:
        return Tensor(self.array.reshape(shape))

    def copy_(self, other: Tensor) -> None:
        # Without a cast: bytes that came as another type must not pass.
        np.copyto(self.array, other.array, casting="no")


class Size(tuple):
    """torch.Size."""


class Future:
    """torch.futures.Future."""

    def __class_getitem__(cls, _: Any) -> type:
        return cls

    def set_result(self, value: Any) -> None:
        self.value = value

    def wait(self) -> Any:
        return self.value


class WriteItemType(enum.Enum):
    TENSOR = 1
    SHARD = 2
    BYTE_IO = 3


class LoadItemType(enum.Enum):
    TENSOR = 1
    BYTE_IO = 2


@dataclasses.dataclass(frozen=True)
class MetadataIndex:
    fqn: str
    offset: Size | None = None
    index: int | None = dataclasses.field(hash=False, compare=False, default=None)


@dataclasses.dataclass
class ChunkStorageMetadata:
    offsets: Size
    sizes: Size


@dataclasses.dataclass
class TensorProperties:
    dtype: Dtype


@dataclasses.dataclass
class TensorStorageMetadata:
    properties: TensorProperties
    size: Size
    chunks: list


@dataclasses.dataclass
class BytesStorageMetadata:
    pass


@dataclasses.dataclass
class Metadata:
    state_dict_metadata: dict
    planner_data: Any = None
    storage_data: Any = None


@dataclasses.dataclass(frozen=True)
class TensorWriteData:
    chunk: ChunkStorageMetadata
    properties: TensorProperties
    size: Size


@dataclasses.dataclass(frozen=True)
class WriteItem:
    index: MetadataIndex
    type: WriteItemType
    tensor_data: TensorWriteData | None = None


@dataclasses.dataclass(frozen=True)
class ReadItem:
    type: LoadItemType
    dest_index: MetadataIndex
    dest_offsets: Size
    storage_index: MetadataIndex
    storage_offsets: Size
    lengths: Size


@dataclasses.dataclass(frozen=True)
class SavePlan:
    items: list
    storage_data: Any = None
    planner_data: Any = None


@dataclasses.dataclass
class LoadPlan:
    items: list
    storage_data: Any = None
    planner_data: Any = None


@dataclasses.dataclass(frozen=True)
class WriteResult:
    index: MetadataIndex
    size_in_bytes: int
    storage_data: Any


class StorageWriter:
    """An abstract class in torch."""


class StorageReader:
    """An abstract class in torch."""


class SavePlanner:
    pass


class LoadPlanner:
    pass


def load_values(file: io.BytesIO, map_location: str, weights_only: bool) -> Any:
    """torch.load, of which only what it refuses matters here."""
    assert (map_location, weights_only) == ("cpu", True)
    if file.read() == b"hostile":
        raise pickle.UnpicklingError("Weights only load failed")


DTYPES = {
    "float32": Dtype("float32", "f4"),
    "int64": Dtype("int64", "i8"),
    "int16": Dtype("int16", "i2"),
    "uint8": Dtype("uint8", "u1"),
    "bfloat16": Dtype("bfloat16", ml_dtypes.bfloat16),
}

MODULES: dict[str, dict[str, Any]] = {
    "torch": {
        **DTYPES,
        "Size": Size,
        "dtype": Dtype,
        "layout": type("layout", (), {}),
        "memory_format": type("memory_format", (), {}),
        "Tensor": Tensor,
        "from_numpy": lambda array: Tensor(array),
        "load": load_values,
    },
    "torch.futures": {"Future": Future},
    "torch.distributed": {},
    "torch.distributed.checkpoint": {},
    "torch.distributed.checkpoint.metadata": {
        one.__name__: one
        for one in (
            MetadataIndex,
            ChunkStorageMetadata,
            TensorProperties,
            TensorStorageMetadata,
            BytesStorageMetadata,
            Metadata,
        )
    }
    | {"os": __import__("os")},
    "torch.distributed.checkpoint.planner": {
        one.__name__: one
        for one in (
            LoadItemType,
            LoadPlan,
            LoadPlanner,
            ReadItem,
            SavePlan,
            SavePlanner,
            TensorWriteData,
            WriteItem,
            WriteItemType,
        )
    },
    "torch.distributed.checkpoint.storage": {one.__name__: one for one in (StorageReader, StorageWriter, WriteResult)},
}


@pytest.fixture
def ferry_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """tensorferry.torch, imported with the stand-ins in the place of torch."""
    for name, members in MODULES.items():
        module = types.ModuleType(name)
        for key, member in members.items():
            setattr(module, key, member)
            if isinstance(member, (type, Dtype)):
                # Pickles name the module that torch has it in.
                monkeypatch.setattr(member, "__module__", name, raising=False)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tensorferry.torch", raising=False)
    yield importlib.import_module("tensorferry.torch")
    sys.modules.pop("tensorferry.torch", None)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tensorferry.Server]:
    with tensorferry.Server(tmp_path / "root") as server:
        yield server


# ---------------------------------------------------------------- a save and a load as torch does them


class Saving(SavePlanner):
    """The items of one rank."""

    def __init__(self, state: dict[MetadataIndex, Any]) -> None:
        self.state = state

    def resolve_data(self, item: WriteItem) -> Any:
        return self.state[item.index]


class Loading(LoadPlanner):
    """Where one rank loads to."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.bytes: dict[str, bytes] = {}
        self.committed: list[str] = []

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        region = tuple(slice(o, o + n) for o, n in zip(item.dest_offsets, item.lengths))
        whole = self.tensors[item.dest_index.fqn].array
        return Tensor(whole[region] if region else whole)

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        self.committed.append(item.dest_index.fqn)

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        self.bytes[item.dest_index.fqn] = value.read()


def dtype_of(array: np.ndarray) -> Dtype:
    return DTYPES[array.dtype.name]


def shards_of(name: str, whole: np.ndarray, rank: int, count: int) -> tuple[WriteItem, Tensor]:
    """A rank's rows of a tensor."""
    rows = whole.shape[0] // count
    offsets = Size((rank * rows, *[0] * (whole.ndim - 1)))
    part = whole[rank * rows : (rank + 1) * rows]
    chunk = ChunkStorageMetadata(offsets, Size(part.shape))
    data = TensorWriteData(chunk, TensorProperties(dtype_of(whole)), Size(whole.shape))
    return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, data), Tensor(part, device="gpu")


def whole_of(name: str, array: np.ndarray) -> tuple[WriteItem, Tensor]:
    zero = Size([0] * array.ndim)
    chunk = ChunkStorageMetadata(zero, Size(array.shape))
    data = TensorWriteData(chunk, TensorProperties(dtype_of(array)), Size(array.shape))
    return WriteItem(MetadataIndex(name, zero), WriteItemType.TENSOR, data), Tensor(array)


def save(
    module: types.ModuleType,
    path: str,
    seed: int = 1,
    ranks: int = 2,
    finish: bool = True,
    extra: bytes = b"pickled",
) -> dict[str, Any]:
    """Saves in as many ranks; gives what was saved."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((6, 5)).astype("f4")
    half = rng.standard_normal((4, 3)).astype(ml_dtypes.bfloat16)
    step = np.array(seed)
    state: list[dict[MetadataIndex, Any]] = []
    plans = []
    for rank in range(ranks):
        pairs = [shards_of("layer.weight", weight, rank, ranks), shards_of("half", half, rank, ranks)]
        if rank == 0:
            pairs.append(whole_of("step", step))
            pairs.append((WriteItem(MetadataIndex("extra/state"), WriteItemType.BYTE_IO), io.BytesIO(extra)))
        state.append({item.index: data for item, data in pairs})
        plans.append(SavePlan([item for item, _ in pairs]))
    writers = [module.FerryStorageWriter(path) for _ in range(ranks)]
    for rank, writer in enumerate(writers):
        writer.reset(None)
        writer.set_up_storage_writer(rank == 0)
    plans = writers[0].prepare_global_plan([w.prepare_local_plan(p) for w, p in zip(writers, plans)])
    # Plans travel from rank to rank as pickles.
    plans = [dataclasses.replace(p, storage_data=pickle.loads(pickle.dumps(p.storage_data))) for p in plans]
    results = [w.write_data(p, Saving(s)).wait() for w, p, s in zip(writers, plans, state)]
    sizes = {result.index.fqn: 0 for rank in results for result in rank}
    for result in (result for rank in results for result in rank):
        sizes[result.index.fqn] += result.size_in_bytes
    assert sizes == {"layer.weight": 120, "half": 24, "step": 8, "extra/state": 7}
    chunks: dict[str, Any] = {"extra/state": BytesStorageMetadata()}
    for plan in plans:
        for item in plan.items:
            if item.tensor_data is not None:
                row = TensorStorageMetadata(item.tensor_data.properties, item.tensor_data.size, [])
                chunks.setdefault(item.index.fqn, row).chunks.append(item.tensor_data.chunk)
    if finish:
        writers[0].finish(Metadata(chunks, planner_data={"step": ("step",)}), results)
    return {"layer.weight": weight, "half": half, "step": step, "extra/state": extra}


def load(
    module: types.ModuleType, path: str, saved: dict[str, Any], planner: Loading | None = None, **options: Any
) -> Loading:
    """Loads everything into one rank."""
    reader = module.FerryStorageReader(path, **options)
    reader.reset(None)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    items = []
    for name, row in metadata.state_dict_metadata.items():
        if isinstance(row, BytesStorageMetadata):
            index = MetadataIndex(name)
            items.append(ReadItem(LoadItemType.BYTE_IO, index, Size(), index, Size(), Size()))
        else:
            for chunk in row.chunks:
                zero = Size([0] * len(chunk.sizes))
                stored = MetadataIndex(name, chunk.offsets)
                place = (MetadataIndex(name), chunk.offsets, stored, zero, chunk.sizes)
                items.append(ReadItem(LoadItemType.TENSOR, *place))
    planner = planner or Loading()
    planner.tensors = {k: Tensor(np.zeros_like(v)) for k, v in saved.items() if isinstance(v, np.ndarray)}
    plan = reader.prepare_global_plan([reader.prepare_local_plan(LoadPlan(items))])[0]
    assert reader.read_data(plan, planner).wait() is None
    return planner


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("is_remote", [True, False])
def test_what_is_saved_is_loaded(
    ferry_torch: types.ModuleType, server: tensorferry.Server, tmp_path: Path, ranks: int, is_remote: bool
) -> None:
    path = server.url("run7/step-1000") if is_remote else str(tmp_path / "local")
    saved = save(ferry_torch, path, ranks=ranks)
    loaded = load(ferry_torch, path, saved)
    for name, expected in saved.items():
        if isinstance(expected, bytes):
            assert loaded.bytes[name] == expected
        else:
            assert loaded.tensors[name].array.tobytes() == expected.tobytes(), name
    assert sorted(set(loaded.committed)) == ["half", "layer.weight", "step"]


def test_one_file_lands_for_each_shard(
    ferry_torch: types.ModuleType, server: tensorferry.Server, tmp_path: Path
) -> None:
    saved = save(ferry_torch, server.url("run7/1"))
    landed = tensorferry.open(tmp_path / "root/run7/1/rank-00001")
    assert sorted(landed) == ["half.at-2-0", "layer.weight.at-3-0"]
    np.testing.assert_array_equal(landed["layer.weight.at-3-0"], saved["layer.weight"][3:])
    assert sorted(tensorferry.open(tmp_path / "root/run7/1/rank-00000"))[-1] == "step"


def test_a_part_of_a_shard_is_read(ferry_torch: types.ModuleType, server: tensorferry.Server) -> None:
    path = server.url("run7/1")
    saved = save(ferry_torch, path)
    reader = ferry_torch.FerryStorageReader(path)
    reader.set_up_storage_reader(reader.read_metadata(), True)
    planner = Loading()
    planner.tensors = {"layer.weight": Tensor(np.zeros((2, 2), "f4"))}
    stored = MetadataIndex("layer.weight", Size((3, 0)))
    wanted = ReadItem(
        LoadItemType.TENSOR, MetadataIndex("layer.weight"), Size((0, 0)), stored, Size((1, 2)), Size((2, 2))
    )
    reader.read_data(LoadPlan([wanted]), planner)
    np.testing.assert_array_equal(planner.tensors["layer.weight"].array, saved["layer.weight"][4:6, 2:4])


def test_a_save_without_its_end_is_not_seen(ferry_torch: types.ModuleType, server: tensorferry.Server) -> None:
    save(ferry_torch, server.url("run7/1"), finish=False)
    with pytest.raises(tensorferry.FerryError):
        ferry_torch.FerryStorageReader(server.url("run7/1")).read_metadata()


def test_two_saves_are_not_mixed(ferry_torch: types.ModuleType, server: tensorferry.Server) -> None:
    path = server.url("run7/1")
    saved = save(ferry_torch, path)
    save(ferry_torch, path, seed=2, finish=False)
    with pytest.raises(tensorferry.IntegrityError, match="another save"):
        load(ferry_torch, path, saved)
    again = save(ferry_torch, path, seed=3)
    assert load(ferry_torch, path, again).tensors["step"].array == 3


def test_a_save_without_collectives_is_refused(ferry_torch: types.ModuleType) -> None:
    writer = ferry_torch.FerryStorageWriter("ferry://lab/x")
    writer.set_up_storage_writer(True, rank=0, use_collectives=False)
    with pytest.raises(RuntimeError, match="collectives"):
        writer.write_data(SavePlan([]), Saving({}))


class Hostile:
    """What runs a program when it is unpickled."""

    def __reduce__(self) -> Any:
        import os

        return os.system, ("true",)


@pytest.mark.parametrize(
    "raw",
    [
        pickle.dumps(Hostile()),
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c\x04true\x85R.",
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x02os\x93.",
        pickle.dumps({"a": 1}),
    ],
    ids=["system", "through a module", "a module", "no metadata"],
)
def test_hostile_metadata_run_nothing(
    ferry_torch: types.ModuleType, server: tensorferry.Server, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("it ran"))
    tensorferry.save_file({"metadata": np.frombuffer(raw, np.uint8)}, server.url("x/metadata"))
    with pytest.raises(pickle.UnpicklingError, match=r"has no place|instead of"):
        ferry_torch.FerryStorageReader(server.url("x")).read_metadata()


def built(target: Any, state: Any) -> bytes:
    """A pickle that sets a state on a target, whatever that is."""
    # The target without STOP, the state without PROTO, BUILD, STOP.
    return pickle.dumps(target, 4)[:-1] + pickle.dumps(state, 4)[2:-1] + b"b."


@pytest.mark.parametrize(
    ("target", "state"),
    [
        (Metadata, (None, {"planner_data": "for all"})),
        (Metadata, {"planner_data": "for all"}),
        (WriteItemType, (None, {"planner_data": "for all"})),
        (Metadata({}), (None, {"planner_data": "by slots"})),
        (Path("x"), {"_str": "/"}),
        (Size(), {"x": 1}),
    ],
    ids=["slots of a class", "a class", "an enum", "slots", "a path", "a size"],
)
def test_hostile_metadata_set_nothing_but_fields(
    ferry_torch: types.ModuleType, target: Any, state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target is WriteItemType:
        monkeypatch.setattr(ferry_torch._MetadataUnpickler, "_PLAIN", {(target.__module__, target.__name__)})
    with pytest.raises(pickle.UnpicklingError, match=r"has no place|no such state"):
        ferry_torch._load_metadata(built(target, state))
    assert Metadata({}).planner_data is None


def test_fields_that_this_torch_does_not_have_are_left_out(ferry_torch: types.ModuleType) -> None:
    metadata = Metadata({"w": BytesStorageMetadata()}, {"w": ("w",)})
    later = built(metadata, {"version": "9", "__class__": 3, "__setstate__": 4})
    loaded = ferry_torch._load_metadata(later)
    assert loaded == metadata and vars(loaded) == vars(metadata)


@pytest.mark.parametrize("raw", [b"", b".", b"\x80\x04b.", b"\x80\x04}\x82\x01.", pickle.dumps([1])[:-2]])
def test_broken_metadata_are_told_of_as_such(ferry_torch: types.ModuleType, raw: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"damaged|has no place"):
        ferry_torch._load_metadata(raw)


@pytest.mark.parametrize(
    ("field", "value"),
    [("checkpoint", value) for value in ("../rank-00000", "rank-1", "rank-00000/x", "rank-00000\n", "", None)]
    + [("array", 5), ("array", None), ("save_id", None)],
)
def test_a_place_elsewhere_is_refused(
    ferry_torch: types.ModuleType, server: tensorferry.Server, field: str, value: Any
) -> None:
    place = dataclasses.replace(ferry_torch._Place("rank-00000", "w", "1"), **{field: value})
    raw = pickle.dumps(Metadata({}, storage_data={MetadataIndex("w"): place}))
    tensorferry.save_file({"metadata": np.frombuffer(raw, np.uint8)}, server.url("x/metadata"))
    reader = ferry_torch.FerryStorageReader(server.url("x"))
    with pytest.raises(tensorferry.IntegrityError, match="was not written by"):
        reader.read_metadata()
    # Other ranks have the metadata from the coordinator.
    reader.set_up_storage_reader(pickle.loads(raw), False)
    index = MetadataIndex("w")
    with pytest.raises(tensorferry.IntegrityError, match="was not written by"):
        reader.read_data(LoadPlan([ReadItem(LoadItemType.BYTE_IO, index, Size(), index, Size(), Size())]), Loading())


def test_values_that_run_something_do_not_reach_the_planner(
    ferry_torch: types.ModuleType, server: tensorferry.Server
) -> None:
    saved = save(ferry_torch, server.url("x"), extra=b"hostile")
    planner = Loading()
    with pytest.raises(tensorferry.IntegrityError, match="extra/state") as caught:
        load(ferry_torch, server.url("x"), saved, planner)
    assert caught.value.hint and not planner.bytes and not planner.committed
    assert load(ferry_torch, server.url("x"), saved, weights_only=False).bytes == {"extra/state": b"hostile"}


def test_paths_that_are_possible(ferry_torch: types.ModuleType) -> None:
    for writer_or_reader in (ferry_torch.FerryStorageWriter, ferry_torch.FerryStorageReader):
        assert writer_or_reader.validate_checkpoint_id("ferry://lab/run7")
        assert writer_or_reader.validate_checkpoint_id(Path("/data/run7"))
        assert not writer_or_reader.validate_checkpoint_id("s3://bucket/run7")
