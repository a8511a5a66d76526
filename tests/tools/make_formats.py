#!/usr/bin/env python3
"""Makes checkpoints in the formats that are zip archives or HDF5.

    make_formats.py DIR [--small | --corpus]

`--small` makes the ones of tests/fixtures, `--corpus` the inputs in fuzz/corpus that are such files. The bytes are
random with a fixed seed.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import stand_ins
from stand_ins import METADATA, MODULES, STORAGES, UNTYPED, Size, Storage, Tensor, dtype_of, save

SEED = 20261128


class Maker:
    """Arrays, small or of several cells."""

    def __init__(self, small: bool) -> None:
        self.rng = np.random.default_rng(SEED)
        self.small = small

    def array(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """Random bytes, but 0 and 1 where they are truth values."""
        kind = dtype_of(dtype)
        count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        raw = self.rng.integers(0, 2 if kind == np.dtype(bool) else 251, count, dtype=np.uint8)
        return raw.view(kind).reshape(shape)

    def large(self) -> tuple[int, int]:
        """Elements of 4 bytes, and an odd number of them."""
        return (37, 11) if self.small else (1021, 1031)


def npz(folder: Path, maker: Maker) -> None:
    """numpy's archives: stored, deflated, with odd names, of nothing."""
    folder.mkdir(parents=True)
    arrays = {
        "w": maker.array("float32", maker.large()),
        "a/b": maker.array("int16", (3, 5)),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 7), np.float32),
        "fortran": np.asfortranarray(maker.array("float64", (4, 6))),
        "big": maker.array("int32", (9,)).astype(">i4"),
        "truth": maker.array("bool", (13,)),
        "complex": maker.array("complex64", (2, 2)),
        "zeros": np.zeros((300, 40), np.float32),
    }
    np.savez(folder / "stored.npz", **arrays)
    np.savez_compressed(folder / "deflated.npz", **arrays)
    np.savez(folder / "bf16.npz", x=maker.array("bfloat16", (7, 3)).view("V2"))
    np.savez(folder / "objects.npz", names=np.array(["a", None], object), w=maker.array("uint8", (5,)))
    np.savez(folder / "nothing.npz")


def typed(maker: Maker, dtype: str, shape: tuple[int, ...], **more: object) -> Tensor:
    """A tensor with a storage of its own."""
    kind = next((kind for kind, name in STORAGES.items() if name == dtype), "UntypedStorage")
    array = maker.array(dtype, shape).reshape(-1)
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    return Tensor(Storage(array, kind), 0, shape, strides, dtype, **more)


def torch_files(folder: Path, maker: Maker) -> None:
    """What torch.save writes."""
    folder.mkdir(parents=True)
    every = {dtype: typed(maker, dtype, (3, 4)) for dtype in (*STORAGES.values(), *UNTYPED)}
    for protocol in (1, 2, 4, 5):
        (folder / f"protocol_{protocol}.pt").write_bytes(save(every, protocol=protocol, align=1 if protocol == 4 else 64))
    base = typed(maker, "float32", (6, 8)).storage
    deep = typed(maker, "float32", (16, 8, 3, 3) if maker.small else (64, 128, 3, 3)).storage
    conv = (16, 8, 3, 3) if maker.small else (64, 128, 3, 3)
    views = {
        "whole": Tensor(base, 0, (6, 8), (8, 1), "float32"),
        "tied": Tensor(base, 0, (6, 8), (8, 1), "float32"),
        "transposed": Tensor(base, 0, (8, 6), (1, 8), "float32"),
        "rows": Tensor(base, 16, (2, 8), (8, 1), "float32"),
        "columns": Tensor(base, 3, (6, 2), (8, 1), "float32"),
        "every_third": Tensor(base, 0, (16,), (3,), "float32"),
        "expanded": Tensor(base, 5, (4, 3), (0, 1), "float32"),
        "one": Tensor(base, 47, (), (), "float32"),
        "none": Tensor(base, 0, (0, 8), (8, 1), "float32"),
        "channels_last": Tensor(deep, 0, conv, (conv[1] * 9, 1, 3 * conv[1], conv[1]), "float32"),
        "turned": Tensor(deep, 0, conv[::-1], (1, 3, 9, 9 * conv[1]), "float32"),
        "permuted": Tensor(deep, 0, (conv[1], conv[0], 3, 3), (9, 9 * conv[1], 3, 1), "float32"),
        "large": typed(maker, "float32", maker.large()),
    }
    (folder / "views.pt").write_bytes(save(views))
    nested = {
        "epoch": 7,
        "model": stand_ins.OrderedDict(layer=typed(maker, "float16", (5, 2), parameter=True)),
        "optimizer": {"state": {0: {"step": 12, "exp_avg": typed(maker, "float32", (5, 2))}}, "groups": [{"lr": 0.1}]},
        "list": [typed(maker, "int64", (2,)), typed(maker, "uint8", (3,))],
    }
    (folder / "nested.pth").write_bytes(save(nested, folder="checkpoint"))
    big = {"f": typed(maker, "float32", (3, 3)), "h": typed(maker, "int16", (4,)), "b": typed(maker, "uint8", (5,))}
    (folder / "big_endian.pt").write_bytes(save(big, order="big"))
    (folder / "alone.pt").write_bytes(save(typed(maker, "float64", (2, 3))))
    sharded = folder / "sharded"
    sharded.mkdir()
    weight_map = {}
    for number in (1, 2):
        name = f"pytorch_model-{number:05}-of-00002.bin"
        tensors = {f"layer{number}.{key}": typed(maker, "bfloat16", (4, 6)) for key in ("weight", "bias")}
        (sharded / name).write_bytes(save(tensors, folder="archive"))
        weight_map |= dict.fromkeys(tensors, name)
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (sharded / "config.json").write_text("{}")


def distributed(folder: Path, maker: Maker) -> None:
    """A checkpoint of two ranks: parts along the first axis, along the second, along both, and a whole."""
    folder.mkdir(parents=True)
    meta, disk = MODULES[METADATA], MODULES["torch.distributed.checkpoint.filesystem"]
    rows = 6 if maker.small else 600
    cuts = {
        "rows": ("float32", (rows, 10), [(0, 0, rows // 2, 10), (rows // 2, 0, rows - rows // 2, 10)]),
        "columns": ("bfloat16", (rows, 11), [(0, 0, rows, 4), (0, 4, rows, 7)]),
        "both": ("int16", (rows, 10), [(0, 0, 2, 5), (0, 5, 2, 5), (2, 0, rows - 2, 5), (2, 5, rows - 2, 5)]),
        "whole": ("float64", (5, 3), [(0, 0, 5, 3)]),
    }
    files = [bytearray(), bytearray()]
    tensors, places = {}, {}
    for name, (dtype, shape, parts) in cuts.items():
        chunks = []
        for number, (row, column, height, width) in enumerate(parts):
            data = save(typed(maker, dtype, (height, width)))
            rank = number % 2
            start = Size((row, column))
            index = meta.MetadataIndex(fqn=name, offset=start, index=number)
            places[index] = disk._StorageInfo(relative_path=f"__{rank}_0.distcp", offset=len(files[rank]), length=len(data))
            files[rank] += data
            chunks.append(meta.ChunkStorageMetadata(offsets=start, sizes=Size((height, width))))
        properties = meta.TensorProperties(dtype=stand_ins.DTYPES[dtype], layout=None, requires_grad=False)
        tensors[name] = meta.TensorStorageMetadata(properties=properties, size=Size(shape), chunks=chunks)
    tensors["step"] = meta.BytesStorageMetadata()
    places[meta.MetadataIndex(fqn="step", offset=None, index=None)] = disk._StorageInfo(
        relative_path="__0_0.distcp", offset=len(files[0]), length=4
    )
    files[0] += pickle.dumps(7)[:4]
    for rank, data in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(data)
    metadata = meta.Metadata(state_dict_metadata=tensors, planner_data=None, storage_data=places, storage_meta=None)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, 4))


def hdf5(folder: Path, maker: Maker) -> None:
    """Files of h5py: every layout, filter and type, in the old form and in the new one."""
    import h5py

    folder.mkdir(parents=True)
    rows, columns = maker.large()
    for name, more in (("old", {}), ("latest", {"libver": "latest"}), ("block", {"userblock_size": 1024})):
        with h5py.File(folder / f"{name}.h5", "w", **more) as file:
            layouts(file.create_group("layouts"), maker, rows, columns, name == "latest")
            types(file.create_group("types"), maker)
            file["again"] = file["types/float32"]
            file["left_out_soft"] = h5py.SoftLink("/types/float32")
    with h5py.File(folder / "ordered.h5", "w", track_order=True) as file:
        for number in range(40):
            file.create_group(f"layer{number}", track_order=True)["weight"] = maker.array("float32", (2, 3))
    for libver, count in (("earliest", 300), ("latest", 300 if maker.small else 3000)):
        with h5py.File(folder / f"many_{libver}.h5", "w", libver=libver) as file:
            for number in range(count if not maker.small or libver == "latest" else 60):
                file[f"w{number}"] = maker.array("uint8", (number % 5,))


def layouts(group: Any, maker: Maker, rows: int, columns: int, is_new: bool) -> None:
    """One array in every layout."""
    import h5py

    values = np.arange(rows * columns, dtype="f4").reshape(rows, columns)
    tile = (max(rows // 5, 1), max(columns // 3, 1))
    whole = (rows, columns)
    group.create_dataset("contiguous", data=values)
    group.create_dataset("one_chunk", data=values, chunks=whole)
    group.create_dataset("chunks", data=values, chunks=tile)
    group.create_dataset("large_chunk", data=values[:3], chunks=(3, columns))
    group.create_dataset("gzip", data=values, chunks=tile, compression="gzip")
    group.create_dataset("gzip_whole", data=values, chunks=whole, compression="gzip")
    group.create_dataset("shuffle", data=values, chunks=tile, compression="gzip", shuffle=True)
    group.create_dataset("fletcher", data=values, chunks=tile, fletcher32=True)
    group.create_dataset("everything", data=values, chunks=tile, compression="gzip", shuffle=True, fletcher32=True)
    group.create_dataset("left_out_lzf", data=values, chunks=tile, compression="lzf")
    resizable = "left_out_resizable" if is_new else "resizable"
    group.create_dataset(resizable, data=values, chunks=tile, maxshape=(None, None))
    group.create_dataset("cube", data=maker.array("int16", (7, 9, 11)), chunks=(3, 4, 5), compression="gzip")
    # More than a page of an array of chunks, or more than a node of a tree.
    group.create_dataset("tall", data=maker.array("uint8", (1100 if is_new else 90,)), chunks=(1,))
    sparse = group.create_dataset("sparse", (50, 20), "i4", chunks=(10, 20), fillvalue=7)
    sparse[20:30] = 1
    group.create_dataset("never", (6, 2), "f8", fillvalue=2.5)
    group.create_dataset("zeros", (6, 2), "f8")
    group.create_dataset("empty", (0, 4), "f4")
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    small = maker.array("int32", (5, 3))
    space = h5py.h5s.create_simple(small.shape)
    made = h5py.h5d.create(group.id, b"compact", h5py.h5t.NATIVE_INT32, space, plist)
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, small)


def types(group: Any, maker: Maker) -> None:
    """One array of every type."""
    import h5py

    for dtype in ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
                  "float16", "float32", "float64", "complex64", "complex128"):  # fmt: skip
        group[dtype] = maker.array(dtype, (3, 5))
    group["big"] = maker.array("float32", (4,)).astype(">f4")
    group["scalar"] = np.float64(1.5)
    group["opaque"] = maker.array("bfloat16", (6,)).view("V2")
    group["opaque"].attrs["dtype"] = "bfloat16"
    group.create_dataset("enum", data=np.array([0, 2, 5], "i2"), dtype=h5py.enum_dtype({"a": 0, "b": 2, "c": 5}, "i2"))
    group["left_out_text"] = "a text"
    group["left_out_texts"] = np.array([b"abc", b"d"], "S3")
    group["left_out_record"] = np.zeros(3, [("a", "f4"), ("b", "i4")])
    group.create_dataset("left_out_lists", (2,), h5py.vlen_dtype(np.int32))
    group["left_out_reference"] = group.ref
    group.create_dataset("left_out_null", data=h5py.Empty("f4"))


def keras_files(folder: Path, maker: Maker) -> None:
    """What Keras writes, where it can be had."""
    try:
        import keras
    except ImportError:
        print("keras is not installed: none of its files are made")
        return
    folder.mkdir(parents=True)
    width = 12 if maker.small else 400
    for policy in ("float32", "bfloat16"):
        keras.config.set_dtype_policy(policy)
        keras.utils.set_random_seed(SEED)
        inner = keras.Sequential([keras.layers.Dense(5, name="dense"), keras.layers.BatchNormalization(name="norm")], name="inner")
        model = keras.Sequential([keras.layers.Input((width,)), keras.layers.Dense(9, name="first"), inner,
                                  keras.layers.Dense(3, name="last")], name=f"net_{policy}")  # fmt: skip
        model.compile("adam", "mse")
        model.fit(np.ones((4, width)), np.ones((4, 3)), verbose=0)
        model.save(folder / f"{policy}.keras")
        model.save_weights(folder / f"{policy}.weights.h5")
        if policy == "float32":
            model.save(folder / "whole.h5")
            sharded = folder / "sharded"
            sharded.mkdir()
            model.save_weights(sharded / "m.weights.json", max_shard_size=0.000001 if maker.small else 0.00005)


class Runs:
    """What a pickle can do when Python loads it."""

    def __reduce__(self) -> object:
        return exec, ("raise SystemExit('a pickle was executed')",)


def refused(folder: Path, maker: Maker) -> None:
    """Files that must be refused, with the reason in their name."""
    folder.mkdir(parents=True)
    (folder / "executes.pt").write_bytes(save({"w": typed(maker, "float32", (2,)), "x": Runs()}))
    out = io.BytesIO(save({"w": typed(maker, "float32", (2,))}))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(zipfile.ZipInfo("archive/constants.pkl"), pickle.dumps(()))
    (folder / "torchscript.pt").write_bytes(out.getvalue())
    (folder / "legacy.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest")


def corpus(root: Path, maker: Maker) -> None:
    """Inputs for the fuzz targets, each shorter than 4 KiB."""
    import h5py

    def put(target: str, name: str, data: bytes) -> None:
        assert len(data) < 4096, (name, len(data))
        (root / target).mkdir(parents=True, exist_ok=True)
        (root / target / name).write_bytes(data)

    for name, write in (("stored", np.savez), ("deflated", np.savez_compressed)):
        out = io.BytesIO()
        write(out, w=np.zeros((3, 4), np.float32), **{"a/b": np.arange(5)})
        put("archive", name, out.getvalue())
    put("archive", "torch", save({"w": typed(maker, "float32", (2,))}))
    base = typed(maker, "float32", (4, 6)).storage
    roots = {
        "views": {"w": Tensor(base, 0, (4, 6), (6, 1), "float32"), "t": Tensor(base, 0, (6, 4), (1, 6), "float32"),
                  "s": Tensor(base, 1, (4, 2), (6, 2), "float32"), "tied": Tensor(base, 0, (4, 6), (6, 1), "float32")},
        "nested": {"epoch": 3, "model": stand_ins.OrderedDict(w=typed(maker, "bfloat16", (3,), parameter=True)),
                   "list": [typed(maker, "float8_e5m2", (2, 2)), {0: 2.5, "x": (None, True)}]},
    }  # fmt: skip
    for name, node in roots.items():
        for protocol in (1, 2, 4, 5):
            with zipfile.ZipFile(io.BytesIO(save(node, protocol=protocol))) as archive:
                put("torch", f"{name}_{protocol}", b"\0" + archive.read("archive/data.pkl"))
    with tempfile.TemporaryDirectory() as temp:
        distributed(Path(temp) / "d", maker)
        put("torch", "distributed", b"\0" + (Path(temp) / "d/.metadata").read_bytes())
    for libver in ("earliest", "latest"):
        for name in ("plain", "chunks", "links"):
            out = io.BytesIO()
            with h5py.File(out, "w", libver=libver) as file:
                if name == "plain":
                    file["w"] = np.arange(6, dtype="f4").reshape(2, 3)
                    file["g/b"] = np.array([True, False])
                    file["g"].attrs["name"] = np.bytes_("layer")
                elif name == "chunks":
                    file.create_dataset("z", data=np.arange(40, dtype="i2"), chunks=(16,), compression="gzip", shuffle=True)
                    if libver == "latest":
                        file.create_dataset("u", data=np.arange(40, dtype="i2"), chunks=(16,))
                else:
                    for number in range(3 if libver == "earliest" else 10):
                        file.create_group(f"w{number}")
            data = out.getvalue()
            if len(data) < 4096:
                put("hdf5", f"{name}_{libver}", data)
            else:
                print(f"{name}_{libver} has {len(data)} bytes")


def expected(root: Path) -> None:
    """What the files hold, for the tests in Rust."""
    import blake3
    import read_formats

    found = {}
    for path in sorted(p for p in root.rglob("*") if not p.name.startswith(".") or p.name == ".metadata"):
        relative = path.relative_to(root).as_posix()
        if relative.startswith("refused") or path.suffix == ".distcp":
            continue
        if path.name == ".metadata":
            path, relative = path.parent, path.parent.relative_to(root).as_posix()
            arrays = read_formats.folder_tensors(path)
        elif path.name.endswith((".index.json", ".weights.json")):
            arrays = read_formats.indexed(path)
        else:
            arrays = read_formats.tensors(path) if path.is_file() else None
        if arrays is None:
            continue
        rows = {}
        for name, array in arrays:
            dtype, descr = read_formats.described(array.dtype)
            fortran = array.flags.f_contiguous and not array.flags.c_contiguous
            raw = np.asfortranarray(array).T.tobytes() if fortran else array.tobytes()
            rows[name] = {"dtype": dtype, "descr": descr, "shape": array.shape, "fortran": bool(fortran),
                          "blake3": blake3.blake3(raw).hexdigest()}  # fmt: skip
        found[relative] = rows
    (root / "expected.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def main() -> int:
    """Makes everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--corpus", action="store_true")
    args = parser.parse_args()
    maker = Maker(args.small or args.corpus)
    if args.corpus:
        corpus(args.folder, maker)
        return 0
    npz(args.folder / "npz", maker)
    torch_files(args.folder / "torch", maker)
    distributed(args.folder / "distributed", maker)
    hdf5(args.folder / "hdf5", maker)
    keras_files(args.folder / "keras", maker)
    refused(args.folder / "refused", maker)
    if args.small:
        expected(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
