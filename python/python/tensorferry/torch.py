"""Storage for ``torch.distributed.checkpoint`` that leaves one ``.npy`` file for each tensor or shard.

**Not run against torch.** This module is written against the documented interfaces ``StorageWriter``,
``StorageReader`` and the planners of torch 2.3 and later, and tested with small stand-ins for them:
torch is not part of this project's test machines. Should it misbehave with the real one, that is a
defect worth reporting; ``ferry://`` through fsspec (:mod:`tensorferry.fsspec`) needs nothing of this module.

    import torch.distributed.checkpoint as dcp
    from tensorferry.torch import FerryStorageReader, FerryStorageWriter

    dcp.save(state_dict, storage_writer=FerryStorageWriter("ferry://lab/run7/step-1000"))
    dcp.load(state_dict, storage_reader=FerryStorageReader("ferry://lab/run7/step-1000"))

**What lands.** Every rank sends a checkpoint of its own, ``…/step-1000/rank-00000`` and so on. A tensor
that is saved whole has its name in the state dict; a shard has its offsets behind it
(``layer.weight.at-512-0``). What is no tensor is a ``uint8`` array with the bytes that the planner gave
(``torch.save`` by default). When all ranks are done, the coordinator publishes
``…/step-1000/metadata``, an array with torch's ``Metadata`` as a pickle. It is there only when
everything else is, so its presence means that the save is complete.

**Mixtures.** All parts of one save carry the same random number, which the metadata repeat. A reader that finds
another one (a later save to the same place died half-way) raises and loads nothing.

**Trust.** Metadata are a pickle. Reading allows only the types that torch's metadata are made of, and sets
only the fields that these have, so a hostile server can give wrong numbers, but its metadata run nothing here.
The values that are no tensors are another matter: the planner gets their bytes, and torch's
``DefaultLoadPlanner.load_bytes`` is ``torch.load(…, weights_only=False)``, which runs whatever the bytes say.
So the reader first reads them with ``torch.load(…, weights_only=True)``, and gives the planner none that does not
pass. ``weights_only=False`` leaves that out, for values of types that torch does not know and for planners with a
format of their own: then whoever can write to the server can run programs here.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import re
import secrets
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorferry
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ._temporary import TemporaryFolder

__all__ = ["FerryStorageReader", "FerryStorageWriter"]

METADATA = "metadata"
"""Name of the checkpoint, and of its one array, that says what is where."""
SAVE_ID = "tensorferry.torch.save"
"""Key in the metadata of every checkpoint of a save; the value is the same in all of them."""
MAX_PATTERNS = 1024
"""Most names that a pull can ask for."""

_RANK = re.compile(r"rank-[0-9]{5,}")


@dataclasses.dataclass(frozen=True)
class _Share:
    """What the coordinator tells a rank, and a rank tells nobody else."""

    rank: int
    save_id: str


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an item is: the checkpoint beneath the destination, and the array in it."""

    checkpoint: str
    array: str
    save_id: str


class FerryStorageWriter(StorageWriter):
    """Saves to a server, or to a folder of this machine.

    Args:
        path: ``ferry://HOST[:PORT]/NAME``, ``HOST:NAME`` or a local folder; ``checkpoint_id`` of
            ``dcp.save`` takes its place.
        overwrite: replace what an earlier save left at the same place. While that is under way neither
            can be read.
        save_options: keyword arguments of :func:`tensorferry.save_file` (``durability``, …).

    The tensors of a rank are sent out of their own memory if they are on the CPU. Those of other devices
    are copied to the CPU first, all of the rank's at once.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = True, **save_options: Any) -> None:
        super().__init__()
        self.path = os.fspath(path)
        self._save_options = {"overwrite": overwrite, **save_options}
        self._is_coordinator = False
        self._rank: int | None = None
        self._save_id: str | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self.path = os.fspath(checkpoint_id)
        self._save_id = None

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **told: Any) -> None:
        self._is_coordinator = is_coordinator
        self._rank = told.get("rank")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._save_id = secrets.token_hex(16)
        return [dataclasses.replace(plan, storage_data=_Share(rank, self._save_id)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Sends this rank's items; they are published and durable when the future has its value."""
        share = plan.storage_data
        if not isinstance(share, _Share):
            raise RuntimeError(
                "the plan did not come through prepare_global_plan: saving without collectives is not possible, "
                "for the parts of a save could not be told from those of another"
            )
        checkpoint = f"rank-{share.rank:05}"
        arrays: dict[str, Any] = {}
        results = []
        for item in plan.items:
            data = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                array: Any = np.frombuffer(data.getbuffer(), np.uint8)
                size = array.nbytes
            else:
                array = data.detach().cpu().contiguous()
                size = array.numel() * array.element_size()
            name = _array_name(item, arrays)
            arrays[name] = array
            results.append(WriteResult(item.index, size, _Place(checkpoint, name, share.save_id)))
        # A rank may have nothing to save; there is no checkpoint without an entry.
        if arrays:
            self._save(arrays, checkpoint, share.save_id)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publishes the metadata: from now on the save is complete."""
        metadata = dataclasses.replace(
            metadata, storage_data={result.index: result.storage_data for rank in results for result in rank}
        )
        save_id = self._save_id
        if save_id is None:
            raise RuntimeError("finish comes after prepare_global_plan, on the same object")
        self._save({METADATA: np.frombuffer(pickle.dumps(metadata), np.uint8)}, METADATA, save_id)

    def _save(self, arrays: dict[str, Any], checkpoint: str, save_id: str) -> None:
        destination = _beneath(self.path, checkpoint)
        tensorferry.save_file(arrays, destination, metadata={SAVE_ID: save_id}, **self._save_options)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return _is_possible(checkpoint_id)


class FerryStorageReader(StorageReader):
    """Loads what :class:`FerryStorageWriter` saved, also with another number of ranks.

    Args:
        path: as there. A local folder may also be the receiver's own (``ROOT/run7/step-1000``).
        cache_dir: where what is fetched from a server is kept until this object is gone; by
            default a temporary folder. A folder of this machine is mapped, not copied.
        weights_only: refuse values that are no tensors unless ``torch.load(…, weights_only=True)`` reads
            them. Without, a planner that unpickles them runs what the checkpoint says.

    Of each saving rank's checkpoint, only the arrays that the plan wants are fetched; an array that is
    wanted in part is fetched whole.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        weights_only: bool = True,
    ) -> None:
        super().__init__()
        self.path = os.fspath(path)
        self._weights_only = weights_only
        self._cache = TemporaryFolder("tensorferry-torch-", cache_dir)
        self._fetched_count = 0
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self.path = os.fspath(checkpoint_id)
        self._metadata = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        folder = self._local(METADATA, [METADATA])
        metadata = _load_metadata(np.asarray(tensorferry.open(folder)[METADATA]).tobytes())
        # Here and not in read_data: the planner must not begin on what is damaged.
        places = metadata.storage_data.values() if isinstance(metadata.storage_data, dict) else [None]
        for place in places:
            if not _is_place(place):
                raise tensorferry.IntegrityError(f"{self.path} was not written by FerryStorageWriter")
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Loads all items of the plan.

        Raises:
            tensorferry.IntegrityError: the parts are of different saves, or a value that is no tensor
                is more than ``weights_only`` allows.
        """
        if self._metadata is None:
            raise RuntimeError("read_data comes after set_up_storage_reader")
        by_checkpoint: dict[str, list[tuple[ReadItem, _Place]]] = defaultdict(list)
        for item in plan.items:
            place = self._metadata.storage_data[item.storage_index]
            if not _is_place(place):
                raise tensorferry.IntegrityError(f"{self.path} was not written by FerryStorageWriter")
            by_checkpoint[place.checkpoint].append((item, place))
        folders = {}
        for checkpoint, items in by_checkpoint.items():
            folders[checkpoint] = self._local(checkpoint, sorted({place.array for _, place in items}))
            self._check_save(folders[checkpoint], checkpoint, items[0][1].save_id)
        opened = {checkpoint: tensorferry.open(folder) for checkpoint, folder in folders.items()}
        if self._weights_only:
            for checkpoint, items in by_checkpoint.items():
                for item, place in items:
                    if item.type == LoadItemType.BYTE_IO:
                        _check_bytes(item, opened[checkpoint][place.array])
        # All checks come before the first tensor is touched.
        for checkpoint, items in by_checkpoint.items():
            arrays = opened[checkpoint]
            for item, place in items:
                self._load(item, arrays[place.array], planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _load(self, item: ReadItem, array: np.ndarray, planner: LoadPlanner) -> None:
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, io.BytesIO(np.asarray(array).tobytes()))
            return
        assert self._metadata is not None
        dtype = self._metadata.state_dict_metadata[item.storage_index.fqn].properties.dtype
        region = tuple(slice(start, start + n) for start, n in zip(item.storage_offsets, item.lengths, strict=True))
        # As bytes, so that types without a name in numpy (bfloat16) pass. A copy, because a map is read-only.
        raw = np.array(array[region], order="C", copy=True).reshape(-1).view(np.uint8)
        values = torch.from_numpy(raw).view(dtype).reshape(tuple(item.lengths))
        target = planner.resolve_tensor(item).detach()
        if tuple(target.shape) != tuple(item.lengths):
            raise ValueError(
                f"{item.dest_index.fqn}: the plan reads {tuple(item.lengths)} elements into {tuple(target.shape)}"
            )
        target.copy_(values)
        planner.commit_tensor(item, target)

    def _check_save(self, folder: str, checkpoint: str, save_id: str) -> None:
        found = tensorferry.open(folder).metadata.get(SAVE_ID)
        if found != save_id:
            raise tensorferry.IntegrityError(
                f"{_beneath(self.path, checkpoint)} belongs to another save than the metadata ({found} instead of "
                f"{save_id}): a later save to the same place was not completed"
            )

    def _local(self, checkpoint: str, names: list[str]) -> str:
        """A folder with these arrays of a checkpoint."""
        source = _beneath(self.path, checkpoint)
        if not _is_remote(source):
            return source
        folder = os.path.join(self._cache.name, f"{self._fetched_count}")
        self._fetched_count += 1
        tensorferry.pull(source, folder, include=names if len(names) <= MAX_PATTERNS else ())
        return folder

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return _is_possible(checkpoint_id)


# ---------------------------------------------------------------- names


def _array_name(item: WriteItem, taken: Iterable[str]) -> str:
    """What an item's array is called; a shard by its offsets, which no other shard of it has."""
    index: MetadataIndex = item.index
    name = index.fqn
    if item.type != WriteItemType.BYTE_IO and item.tensor_data is not None:
        chunk = item.tensor_data.chunk
        if tuple(chunk.sizes) != tuple(item.tensor_data.size):
            name += ".at-" + "-".join(map(str, chunk.offsets))
    distinct, number = name, 0
    while distinct in taken:
        number += 1
        distinct = f"{name}~{number}"
    return distinct


def _is_remote(path: str) -> bool:
    """As the command line reads it: ``://``, or a colon before the first slash."""
    return "://" in path or ":" in path.partition("/")[0]


def _beneath(path: str, checkpoint: str) -> str:
    return f"{path.rstrip('/')}/{checkpoint}"


def _is_possible(checkpoint_id: str | os.PathLike[str]) -> bool:
    scheme, separator, _ = os.fspath(checkpoint_id).partition("://")
    return not separator or scheme == "ferry"


# ---------------------------------------------------------------- metadata


# The one in Python: that in C cannot be told what BUILD may set.
_Unpickler: Any = vars(pickle)["_Unpickler"]


class _MetadataUnpickler(_Unpickler):
    """Resolves the types of torch's ``Metadata`` and nothing else, and sets only their fields."""

    _PLAIN = {
        ("builtins", "set"),
        ("builtins", "frozenset"),
        ("builtins", "slice"),
        ("builtins", "complex"),
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("pathlib", "Path"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        (__name__, "_Place"),
    }
    _METADATA_MODULES = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed._shard.sharded_tensor.metadata",
    )

    def find_class(self, module: str, name: str) -> Any:
        found = None
        if (module, name) in self._PLAIN:
            return super().find_class(module, name)
        # A dot in the name would reach through a class into what its module has imported.
        if "." not in name and (module in self._METADATA_MODULES or module == "torch"):
            found = super().find_class(module, name)
        if module == "torch" and isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            return found
        is_own_class = isinstance(found, type) and found.__module__ == module
        if module in self._METADATA_MODULES and is_own_class:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the metadata of a checkpoint")

    def get_extension(self, code: int) -> Any:
        # A registered one may come out of a cache, past find_class.
        raise pickle.UnpicklingError(f"extension {code} has no place in the metadata of a checkpoint")

    def load_build(self) -> None:
        """Sets the state of an object. On a class it would be set for the whole process."""
        instance, state = self.stack[-2:]
        kind = type(instance)
        is_ours = kind.__module__ in self._METADATA_MODULES or kind is _Place
        if not is_ours or not dataclasses.is_dataclass(kind):
            raise pickle.UnpicklingError(f"a state for {kind.__name__} has no place in the metadata of a checkpoint")
        if not hasattr(kind, "__setstate__"):
            if not isinstance(state, dict):
                raise pickle.UnpicklingError(f"{kind.__name__} has no such state")
            # A later torch may have more of them, which this one would not look at.
            fields = {field.name for field in dataclasses.fields(kind)}
            self.stack[-1] = {name: value for name, value in state.items() if name in fields}
        super().load_build()

    dispatch = {**_Unpickler.dispatch, pickle.BUILD[0]: load_build}


def _load_metadata(raw: bytes) -> Metadata:
    try:
        metadata = _MetadataUnpickler(io.BytesIO(raw)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        raise pickle.UnpicklingError(f"damaged metadata: {error}") from error
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"{type(metadata).__name__} instead of torch's Metadata")
    return metadata


def _is_place(place: object) -> bool:
    """Whether this is where a writer puts things, and nowhere else on the server."""
    if type(place) is not _Place:
        return False
    texts = [vars(place).get(field.name) for field in dataclasses.fields(_Place)]
    # No subclass of a string, nor one that a pickle left out.
    return all(type(text) is str for text in texts) and _RANK.fullmatch(place.checkpoint) is not None


def _check_bytes(item: ReadItem, array: np.ndarray) -> None:
    try:
        torch.load(io.BytesIO(np.asarray(array).tobytes()), map_location="cpu", weights_only=True)
    except Exception as error:
        raise tensorferry.IntegrityError(
            f"{item.dest_index.fqn} holds more than torch.load(weights_only=True) reads: {error}",
            code="integrity", exit_code=6, tensor=item.dest_index.fqn,
            hint="weights_only=False of the reader takes it, and may run whatever it says",
        ) from error
