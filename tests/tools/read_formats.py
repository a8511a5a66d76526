"""Tensors of the formats that are zip archives or HDF5, by Python's own libraries: numpy, zipfile and pickle, h5py."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import stand_ins


def described(dtype: np.dtype) -> tuple[str, str]:
    """Name in the manifest and descr in the .npy file."""
    if dtype == ml_dtypes.bfloat16:
        return "bfloat16", "<V2"
    if dtype == np.dtype("V2"):
        return "bfloat16", "<V2"
    if dtype.name.startswith("float8"):
        return dtype.name, "|V1"
    if dtype.kind == "V" and dtype.names is None:
        return f"V{dtype.itemsize}", f"|V{dtype.itemsize}"
    return dtype.newbyteorder("=").name, dtype.str


def npz(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of numbers in an archive of numpy."""
    with np.load(path) as arrays:
        for name in arrays.files:
            try:
                yield name, arrays[name]
            except ValueError as error:  # pickled objects
                assert "allow_pickle" in str(error), error


def torch_file(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a file of torch.save."""
    root, storages, order = stand_ins.load(path)
    return stand_ins.flatten(root, storages, order) if not alone(root) else {
        path.stem: stand_ins.tensor_of(root, storages, order)
    }  # fmt: skip


def alone(root: object) -> bool:
    """Whether a file holds a tensor and no dict."""
    return isinstance(root, tuple) and bool(root) and str(root[0]).startswith("_rebuild_")


def distributed(folder: Path) -> dict[str, np.ndarray]:
    """Tensors of a folder of torch.distributed.checkpoint, put together."""
    metadata = stand_ins.Unpickler((folder / ".metadata").read_bytes(), {}, "<").load()
    whole: dict[str, np.ndarray] = {}
    for name, stored in metadata.state_dict_metadata.items():
        if hasattr(stored, "chunks"):
            dtype = stand_ins.dtype_of(stored.properties.dtype.__name__)
            whole[name] = np.zeros(stored.size[1] if stored.size and stored.size[0] == "Size" else stored.size, dtype)
    for index, info in metadata.storage_data.items():
        data = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        if index.fqn not in whole:
            continue
        root, storages, order = stand_ins.load(data)
        part = stand_ins.tensor_of(root, storages, order)
        at = tuple(slice(o, o + n) for o, n in zip(index.offset or (0,) * part.ndim, part.shape, strict=True))
        whole[index.fqn][at] = part
    return whole


# Datasets that no reader takes, though h5py reads them: made for the test of what is listed.
LEFT_OUT = "left_out"


def hdf5(*files: Any) -> dict[str, np.ndarray]:
    """Datasets of numbers of an HDF5 file, or of all shards of one, by their names."""
    found: dict[str, np.ndarray] = {}
    groups: dict[str, str] = {}
    for file in files:
        collect(file, found, groups)
    return by_layer(found, groups)


def collect(file: Any, found: dict[str, np.ndarray], groups: dict[str, str]) -> None:
    """Adds the datasets of a file by their paths, and the names that Keras gave its groups."""
    import h5py

    def visit(group: Any, path: str) -> None:
        if isinstance(group.attrs.get("name"), str):
            groups[path] = group.attrs["name"]
        for key in group:
            here = f"{path}/{key}" if path else key
            if not isinstance(group.get(key, getlink=True), h5py.HardLink) or key.startswith(LEFT_OUT):
                continue
            item = group[key]
            if isinstance(item, h5py.Group):
                visit(item, here)
            elif isinstance(item, h5py.Dataset) and item.shape is not None and is_number(item):
                values = item[()]
                named = item.attrs.get("dtype")
                if values.dtype.kind == "V" and isinstance(named, str):
                    values = values.view(stand_ins.dtype_of(named))
                found[here] = np.asarray(values)

    with h5py.File(file, "r") as opened:
        visit(opened, "")


def is_number(dataset: Any) -> bool:
    """Whether a landed .npy file can hold it."""
    kind = dataset.dtype.kind
    return kind in "biufc" or (kind == "V" and dataset.dtype.names is None and dataset.dtype.subdtype is None)


def by_layer(found: dict[str, np.ndarray], groups: dict[str, str]) -> dict[str, np.ndarray]:
    """With the names of layers where Keras wrote the file, if that leaves every name once."""
    renamed = {}
    for path, values in found.items():
        parts = path.split("/")
        if parts[0] == "model_weights" and len(parts) > 2:
            parts = parts[2:]
        elif len(parts) > 2 and parts[-2] == "vars" and "/".join(parts[:-1]) in groups:
            layer = groups["/".join(parts[:-1])]
            parts = [*parts[:-3], layer, parts[-1]] if len(parts) > 3 else [parts[0], parts[-1]]
        renamed["/".join(parts)] = values
    return renamed if len(renamed) == len(found) else found


def keras_archive(path: Path) -> dict[str, np.ndarray]:
    """Weights of a .keras file."""
    with zipfile.ZipFile(path) as archive:
        return hdf5(io.BytesIO(archive.read("model.weights.h5")))


def is_zip_with(path: Path, ending: str) -> bool:
    """Whether a file is an archive with such a member."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(ending) for name in archive.namelist())


def tensors(path: Path) -> list[tuple[str, np.ndarray]] | None:
    """Tensors of a file; None when it is in none of these formats."""
    if is_zip_with(path, "data.pkl"):
        return list(torch_file(path).items())
    if is_zip_with(path, ".npy"):
        return list(npz(path))
    if is_zip_with(path, "model.weights.h5"):
        return list(keras_archive(path).items())
    if path.suffix in (".h5", ".hdf5"):
        return list(hdf5(path).items())
    return None


def sides(path: Path) -> dict[str, bytes]:
    """Side files that lie in a file."""
    if path.suffix != ".keras":
        return {}
    with zipfile.ZipFile(path) as archive:
        texts = [name for name in ("config.json", "metadata.json") if name in archive.namelist()]
        return {f"{path.stem}.{name}": archive.read(name) for name in texts}


def folder_tensors(folder: Path) -> list[tuple[str, np.ndarray]] | None:
    """Tensors of a folder that is one checkpoint only as a whole."""
    if (folder / ".metadata").is_file():
        return list(distributed(folder).items())
    return None


def indexed(index: Path) -> list[tuple[str, np.ndarray]]:
    """Tensors of all files that an index names."""
    if index.name.endswith(".weights.json"):
        return list(hdf5(*shards(index)).items())
    return [row for shard in shards(index) for row in tensors(shard) or []]


def shards(index: Path) -> list[Path]:
    """Files that an index names."""
    names: set[str] = set()
    for shard in json.loads(index.read_text())["weight_map"].values():
        names |= {shard} if isinstance(shard, str) else set(shard)
    return [index.parent / name for name in sorted(names)]
