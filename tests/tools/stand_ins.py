"""Stand-ins for the names that pickles of PyTorch refer to, for writing and for reading them without it.

Python's own `pickle` and `zipfile`, which PyTorch uses too, do the rest. Reading gives numpy arrays,
with the strides that the file says.
"""

from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}  # fmt: skip
# Types without a storage class of their own.
UNTYPED = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "uint16", "uint32", "uint64")


def dtype_of(name: str) -> np.dtype:
    """The numpy type of this name, also where only ml_dtypes has it."""
    return np.dtype(getattr(ml_dtypes, name, name))


class Named:
    """Something that pickles only refer to."""

    def __init__(self, module: str, name: str) -> None:
        self.__module__, self.__qualname__, self.__name__ = module, name, name

    def __reduce__(self) -> str:
        return self.__name__

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        return (self.__name__, *args)


class Fields:
    """An object of some class that is only its fields."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __hash__(self) -> int:
        return hash(repr(self.__dict__))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fields) and self.__dict__ == other.__dict__


class TensorProperties(Fields):
    """Says its fields as a tuple, as the original does."""

    def __getstate__(self) -> tuple[Any, ...]:
        return tuple(self.__dict__.values())

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


class Size(tuple):
    """torch.Size."""

    def __reduce__(self) -> Any:
        return Size, (tuple(self),)


class Storage:
    """Bytes and how a pickle refers to them."""

    count: ClassVar[int] = 0

    def __init__(self, array: np.ndarray, kind: str) -> None:
        self.array, self.kind = array, kind


class Tensor:
    """A view of a storage."""

    def __init__(self, storage: Storage, offset: int, shape: Any, strides: Any, dtype: str, **more: Any) -> None:
        self.storage, self.offset, self.dtype = storage, offset, dtype
        self.shape, self.strides, self.more = tuple(shape), tuple(strides), more

    def __reduce__(self) -> Any:
        args = (self.storage, self.offset, self.shape, self.strides, False, OrderedDict())
        if self.storage.kind == "UntypedStorage":
            return MODULES["torch._utils"]._rebuild_tensor_v3, (*args, DTYPES[self.dtype])
        rebuilt = (MODULES["torch._utils"]._rebuild_tensor_v2, args)
        if self.more.get("parameter"):
            return MODULES["torch._utils"]._rebuild_parameter, (self.plain(), True, OrderedDict())
        return rebuilt

    def plain(self) -> Tensor:
        """The same without being a parameter."""
        return Tensor(self.storage, self.offset, self.shape, self.strides, self.dtype)


METADATA = "torch.distributed.checkpoint.metadata"
MODULES: dict[str, Any] = {}
DTYPES: dict[str, Named] = {}


def module(name: str, **members: Any) -> None:
    """Puts a stand-in where pickle looks for the original."""
    made = types.ModuleType(name)
    for key, value in members.items():
        if isinstance(value, type):
            value.__module__, value.__qualname__ = name, key
        setattr(made, key, value)
    MODULES[name] = sys.modules[name] = made


def fields(name: str) -> type:
    """A class of its own."""
    return type(name, (Fields,), {})


for _name in (*STORAGES.values(), *UNTYPED, "float8_e8m0fnu"):
    DTYPES[_name] = Named("torch", _name)
module("torch", Size=Size, **{name: Named("torch", name) for name in STORAGES}, **DTYPES)
module("torch.storage", UntypedStorage=Named("torch.storage", "UntypedStorage"))
module("torch._utils", **{name: Named("torch._utils", name) for name in (
    "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")})  # fmt: skip
module(METADATA, TensorProperties=TensorProperties, **{name: fields(name) for name in (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex")})  # fmt: skip
module("torch.distributed.checkpoint.filesystem", _StorageInfo=fields("_StorageInfo"))


class Unpickler(pickle.Unpickler):
    """Makes tensors of what is known and text of everything else."""

    def __init__(self, data: bytes, storages: dict[str, bytes], order: str) -> None:
        super().__init__(io.BytesIO(data))
        self.storages, self.order = storages, order

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in MODULES and hasattr(MODULES[module], name):
            return getattr(MODULES[module], name)
        return Named(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def tensor_of(node: Any, storages: dict[str, bytes], order: str) -> Any:
    """The array that a call of a rebuilding function stands for, or None."""
    if not isinstance(node, tuple) or not node or not str(node[0]).startswith("_rebuild_"):
        return None
    if node[0] == "_rebuild_parameter":
        return tensor_of(node[1], storages, order)
    _, (_, kind, key, _, _), offset, shape, strides = node[:5]
    name = node[7].__name__ if node[0] == "_rebuild_tensor_v3" else STORAGES[kind.__name__]
    dtype = dtype_of(name).newbyteorder(order)
    raw = np.frombuffer(storages[key], np.uint8)
    base = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(f"V{dtype.itemsize}")[offset:]
    view = np.lib.stride_tricks.as_strided(base, shape, [stride * dtype.itemsize for stride in strides])
    return view.view(dtype)


def load(data: bytes | Path) -> tuple[Any, dict[str, bytes], str]:
    """Root, storages and byte order of a file of torch.save."""
    with zipfile.ZipFile(io.BytesIO(data) if isinstance(data, bytes) else data) as archive:
        names = archive.namelist()
        root = next(name for name in names if name.endswith("data.pkl")).removesuffix("data.pkl")
        order = archive.read(root + "byteorder").decode() if root + "byteorder" in names else "little"
        prefix = root + "data/"
        storages = {n.removeprefix(prefix): archive.read(n) for n in names if n.startswith(prefix)}
        pickled = archive.read(root + "data.pkl")
    order = ">" if order == "big" else "<"
    return Unpickler(pickled, storages, order).load(), storages, order


def flatten(node: Any, storages: dict[str, bytes], order: str, path: str = "") -> dict[str, np.ndarray]:
    """Every tensor by its path."""
    array = tensor_of(node, storages, order)
    if array is not None:
        return {path: array}
    found: dict[str, np.ndarray] = {}
    items: Any = ()
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list | tuple):
        items = enumerate(node)
    for key, value in items:
        found |= flatten(value, storages, order, f"{path}.{key}" if path else str(key))
    return found


class Pickler(pickle.Pickler):
    """Refers to storages by number, as torch.save does."""

    def __init__(self, file: Any, protocol: int) -> None:
        super().__init__(file, protocol)
        self.storages: list[Storage] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        if obj not in self.storages:
            self.storages.append(obj)
        where = "torch.storage" if obj.kind == "UntypedStorage" else "torch"
        count = obj.array.nbytes if obj.kind == "UntypedStorage" else obj.array.size
        return ("storage", getattr(MODULES[where], obj.kind), str(self.storages.index(obj)), "cpu", count)


def save(root: Any, *, protocol: int = 2, order: str = "little", folder: str = "archive", align: int = 64) -> bytes:
    """A file as torch.save writes it."""
    pickled = io.BytesIO()
    pickler = Pickler(pickled, protocol)
    pickler.dump(root)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        def add(name: str, data: bytes) -> None:
            info = zipfile.ZipInfo(f"{folder}/{name}")
            start = out.tell() + 30 + len(info.filename) + 4
            info.extra = b"FB" + (-start % align).to_bytes(2, "little") + b"Z" * (-start % align)
            archive.writestr(info, data)

        add("data.pkl", pickled.getvalue())
        add("byteorder", order.encode())
        for number, storage in enumerate(pickler.storages):
            array = storage.array if order == "little" else storage.array.byteswap()
            add(f"data/{number}", array.tobytes())
        add("version", b"3\n")
    return out.getvalue()
