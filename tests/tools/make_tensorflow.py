#!/usr/bin/env python3
"""Makes TensorFlow checkpoints and SavedModels, with what TensorFlow itself reads from each.

    make_tensorflow.py DIR [--large]

Each case is a folder of DIR; `expected.json` in it says what must land: name, dtype, shape and
SHA-256 of every tensor, read back by TensorFlow, whether it is trainable where the model says so,
and what is left out. `--large` adds tensors of several cells. The values are random with a fixed seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import trackable_object_graph_pb2

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import format_files  # noqa: E402

SEED = 20261128
LARGE = 3 * (1 << 20) + 5
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
NUMPY = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
         "float32", "float64", "complex64", "complex128")  # fmt: skip
ML = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
      "float8_e4m3b11fnuz", "int4", "uint4", "int2", "uint2")  # fmt: skip
QUANTISED = {"qint8": "int8", "quint8": "uint8", "qint16": "int16", "quint16": "uint16", "qint32": "int32"}


def values(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random bytes as an array; small integers keep to their range."""
    count = int(np.prod(shape, dtype=np.int64))
    known = np.dtype(getattr(ml_dtypes, dtype) if dtype in ML else dtype)
    if dtype in ("bool", "int4", "uint4", "int2", "uint2"):
        limit = {"bool": 2, "int2": 2, "uint2": 4, "int4": 8, "uint4": 16}[dtype]
        return rng.integers(0, limit, count).astype(known).reshape(shape)
    return rng.integers(0, 256, count * known.itemsize, dtype=np.uint8).view(known).reshape(shape)


def save(prefix: Path, tensors: dict[str, Any], slices: dict[str, str] | None = None) -> None:
    """One shard, by the operation that everything in TensorFlow saves with. The part of a variable
    is `name#n`, so that several parts can stand in one dictionary."""
    names = list(tensors)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=[name.split("#")[0] for name in names],
        shape_and_slices=[(slices or {}).get(name, "") for name in names],
        tensors=[tf.convert_to_tensor(tensors[name]) for name in names],
    )


def merge(shards: list[Path], prefix: Path) -> None:
    """Several shards become one checkpoint."""
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(p) for p in shards], destination_prefix=str(prefix), delete_old_dirs=False
    )


# ---------------------------------------------------------------- the cases


def dtypes(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """Every type, scalars, empty tensors, odd names, texts."""
    tensors: dict[str, Any] = {}
    for dtype in NUMPY + ML:
        for form, shape in (("matrix", (5, 7)), ("scalar", ()), ("empty", (0, 3))):
            tensors[f"{dtype}/{form}"] = values(dtype, shape, rng)
    for name, dtype in QUANTISED.items():
        tensors[f"{name}/matrix"] = tf.bitcast(values(dtype, (3, 5), rng), getattr(tf, name))
    tensors["näme/with:odd..chars.S"] = values("float32", (2,), rng)
    tensors["a text"] = tf.constant(["some", "", "words"])
    tensors["deep"] = values("uint8", (1,) * 7 + (2,), rng)
    # What optimizers of TensorFlow 1 keep beside a variable.
    for name in ("net/w", "net/w/Adam", "net/w/Adam_1", "beta1_power"):
        tensors[name] = values("float32", (4,), rng)
    if large:
        tensors["large/u8"] = values("uint8", (LARGE,), rng)
        tensors["large/bf16"] = values("bfloat16", (1031, 1999), rng)
    save(folder / "ckpt", tensors)
    return folder / "ckpt"


def sharded(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """Three shards; the middle one holds variables in parts that others hold as well."""
    rows, columns = (40, 6), (64, 10)
    whole = {
        "part/rows": values("float32", rows, rng),
        "part/columns": values("float32", columns, rng),
        "part/grid": values("int64", (9, 8), rng),
        "part/3d": values("int16", (4, 6, 5), rng),
        "part/ümlaut": values("uint8", (100, 3), rng),
        "part/far": values("complex64", (12_000, 1), rng),
    }
    if large:
        whole["part/large rows"] = values("float32", (1500, 701), rng)
        whole["part/large columns"] = values("float32", (1500, 701), rng)
        whole["part/thin"] = values("uint8", (400_000, 3), rng)
    cuts = {
        "part/rows": ([0, 11, 12, 40], None),
        "part/columns": (None, [0, 3, 4, 10]),
        "part/grid": ([0, 5, 9], [0, 1, 8]),
        "part/3d": (None, [0, 2, 6], None),
        "part/ümlaut": ([0, 64, 100], None),
        "part/far": ([0, 8191, 8192, 12_000], None),
        "part/large rows": ([0, 701, 1500], None),
        "part/large columns": (None, [0, 350, 701]),
        "part/thin": (None, [0, 1, 2, 3]),
    }
    shards: list[dict[str, Any]] = [{}, {}, {}]
    specs: list[dict[str, str]] = [{}, {}, {}]
    number = 0
    for name, value in whole.items():
        pieces: list[tuple[list[str], list[slice]]] = [([], [])]
        for dim, cut in enumerate(cuts[name]):
            ranges = [("-", slice(None))]
            if cut is not None:
                pairs = zip(cut, cut[1:])
                ranges = [(f"{a},{b - a}", slice(a, b)) for a, b in pairs]
            pieces = [(t + [text], s + [part]) for t, s in pieces for text, part in ranges]
            assert dim < value.ndim
        shape = " ".join(map(str, value.shape))
        for texts, parts in pieces:
            text = ":".join(texts) + ":-" * (value.ndim - len(texts))
            number += 1
            key = f"{name}#{number}"
            shards[number % 3][key] = value[tuple(parts)]
            specs[number % 3][key] = f"{shape} {text}"
    for index, shard in enumerate(shards):
        shard[f"whole/{index}"] = values("float32", (3, index), rng)
    prefixes = []
    for index, shard in enumerate(shards):
        prefixes.append(folder / f"tmp{index}")
        save(prefixes[-1], shard, specs[index])
    merge(prefixes, folder / "model.ckpt-3")
    for left in folder.glob("tmp*"):
        left.unlink()
    reader = tf.train.load_checkpoint(str(folder / "model.ckpt-3"))
    for name, value in whole.items():
        assert reader.get_tensor(name).tobytes() == value.tobytes(), name
    return folder / "model.ckpt-3"


def foreign(folder: Path, rng: np.random.Generator, dtypes: Sequence[str]) -> Path:
    """What a big-endian machine saves. TensorFlow reads it anywhere and turns the bytes."""
    out = format_files.Bundle(folder / "ckpt", big_endian=True)
    for dtype in dtypes:
        for form, shape in (("matrix", (5, 7)), ("scalar", ()), ("empty", (0, 3))):
            value = values(dtype, shape, rng)
            data = value.byteswap().tobytes()
            if value.dtype.kind == "c":
                # Each of its two numbers by itself.
                data = value.reshape(-1).view(f"f{value.itemsize // 2}").byteswap().tobytes()
            crc = format_files.CRC32C.of(data)
            out.note(f"{dtype}/{form}", tf.as_dtype(dtype).as_datatype_enum, shape, len(data), crc)
            out.data.write(data)
    return out.close()


def big_endian(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """Every type that .npy can say to be big-endian, and those of one byte."""
    return foreign(folder, rng, NUMPY)


def big_endian_bfloat16(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """The type that .npy has only as two bytes without an order."""
    note(folder, refused="bfloat16")
    return foreign(folder, rng, ["float32", "bfloat16"])


def many(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """So many names that the index has several blocks."""
    count = 9000 if large else 40
    tensors = {f"model/layers/{i:05}/attention/query/kernel": values("float32", (2,), rng) for i in range(count)}
    save(folder / "ckpt", tensors)
    return folder / "ckpt"


def network() -> keras.Model:
    """A small model whose optimizer has run."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((16,))
    x = keras.layers.Dense(32, name="d1")(inputs)
    x = keras.layers.BatchNormalization(name="bn")(x)
    x = keras.layers.Dropout(0.1)(x)
    outputs = keras.layers.Dense(4, name="d2")(x)
    model = keras.Model(inputs, outputs, name="net")
    model.compile("adam", "mse")
    rng = np.random.default_rng(SEED)
    model.fit(rng.normal(size=(8, 16)), rng.normal(size=(8, 4)), epochs=1, verbose=0)
    return model


def keras_checkpoint(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """A folder as training leaves it: two checkpoints, of which the second is the latest."""
    model = network()
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(model), str(folder), max_to_keep=3)
    manager.save()
    manager.save()
    note(folder, trainable=[v.path for v in model.trainable_variables])
    return folder


class Module(tf.Module):
    """Variables in lists, dictionaries and modules, two of which have the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.list = [tf.Variable([1.0, 2.0], name="b0"), tf.Variable([3.0, 4.0], name="b1", trainable=False)]
        self.a = tf.Variable(tf.ones([3, 2]), name="a")
        self.sub = tf.Module()
        self.sub.w = tf.Variable(2.0)
        self.entries = {"x.y": tf.Variable(3.0)}

    @tf.function(input_signature=[tf.TensorSpec([], tf.float32)])
    def double(self, x: tf.Tensor) -> tf.Tensor:
        """Something to save."""
        return x * self.a


def module_checkpoint(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """A module, reached by two ways."""
    module = Module()
    tf.train.Checkpoint(module=module, again=module.sub).write(str(folder / "ckpt"))
    return folder / "ckpt"


def keras_export(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """What `model.export` of Keras 3 writes."""
    model = network()
    model.export(str(folder / "model"), verbose=False)
    note(folder, trainable=[v.path for v in model.trainable_variables], order=[v.path for v in model.variables])
    return folder / "model"


def frozen_network() -> keras.Model:
    """One whose first layers are not trained, which their variables do not say."""
    model = network()
    for name in ("d1", "bn"):
        model.get_layer(name).trainable = False
    model.compile("adam", "mse")
    rng = np.random.default_rng(SEED)
    model.fit(rng.normal(size=(8, 16)), rng.normal(size=(8, 4)), epochs=1, verbose=0)
    return model


def keras_frozen_export(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """What `model.export` writes where a part is frozen."""
    model = frozen_network()
    model.export(str(folder / "model"), verbose=False)
    note(folder, trainable=[v.path for v in model.trainable_variables], order=[v.path for v in model.variables])
    return folder / "model"


def keras_saved(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """What `tf.saved_model.save` writes of a Keras model: its optimizer knows what is trained."""
    model = network()
    tf.saved_model.save(model, str(folder / "model"))
    note(folder, trainable=[v.path for v in model.trainable_variables])
    return folder / "model"


def keras_frozen_saved(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """The same where a part is frozen."""
    model = frozen_network()
    tf.saved_model.save(model, str(folder / "model"))
    note(folder, trainable=[v.path for v in model.trainable_variables])
    return folder / "model"


class Recurrent(keras.Model):
    """A model by attributes, two of whose variables have the same name."""

    def __init__(self) -> None:
        super().__init__(name="sub")
        self.first = keras.layers.GRU(4, name="layer")
        self.second = keras.layers.Dense(2, name="layer")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """One after the other."""
        return self.second(self.first(x))


def keras_attributes(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """A model and its optimizer in one checkpoint, whose keys lead over the optimizer: what is
    called by its way is called as in a checkpoint of the model alone."""
    model = Recurrent()
    model.compile("adam", "mse")
    model.fit(rng.normal(size=(8, 5, 3)), rng.normal(size=(8, 2)), epochs=1, verbose=0)
    alone = tf.train.load_checkpoint(tf.train.Checkpoint(model=model).write(str(folder / "alone")))
    by_value = {alone.get_tensor(k).tobytes(): way(k) for k in alone.get_variable_to_dtype_map() if k != GRAPH}
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / "ckpt"))
    both = tf.train.load_checkpoint(str(folder / "ckpt"))
    keys = [key for key in both.get_variable_to_dtype_map() if key.startswith("optimizer/_trainable_variables/")]
    names = {key: by_value[both.get_tensor(key).tobytes()] for key in keys}
    for made in folder.glob("alone*"):
        made.unlink()
    given = given_names(both)
    by_bytes = {both.get_tensor(key).tobytes(): key for key in both.get_variable_to_dtype_map() if key != GRAPH}
    order = [by_bytes[v.numpy().tobytes()] for v in model.trainable_variables]
    note(folder, names=names, trainable=[given.get(key) or names.get(key) or way(key) for key in order])
    return folder / "ckpt"


class Listed(keras.Model):
    """A model whose layers are in a plain list, which the graph of objects does not have."""

    def __init__(self) -> None:
        super().__init__(name="listed")
        self.blocks = [keras.layers.Dense(3, name="block") for _ in range(3)]
        self.head = keras.layers.Dense(2, name="head")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """One after the other."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def keras_list(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """Weights that are reached by the optimizer's list alone, and have each other's names."""
    model = Listed()
    model.compile("sgd", "mse")
    model.fit(rng.normal(size=(8, 3)), rng.normal(size=(8, 2)), epochs=1, verbose=0)
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / "ckpt"))
    reader = tf.train.load_checkpoint(str(folder / "ckpt"))
    given = given_names(reader)
    names, order = {}, []
    for index, variable in enumerate(model.trainable_variables):
        listed = f"optimizer/_trainable_variables/{index}{VALUE}"
        if reader.has_tensor(listed):
            names[listed] = f"trainable_variables/{index}"
        found = [k for k in reader.get_variable_to_dtype_map()
                 if k != GRAPH and np.array_equal(reader.get_tensor(k), variable.numpy())]  # fmt: skip
        key = listed if listed in found else found[0]
        order.append(given.get(key) or names.get(key) or way(key))
    assert names
    note(folder, names=names, trainable=order)
    return folder / "ckpt"


def plain_variables(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """Variables that nobody has named, so that TensorFlow calls all of them the same."""
    variable = lambda: tf.Variable(values("float32", (2,), rng))  # noqa: E731
    lists, held = [variable(), variable()], {"a": variable()}
    tf.train.Checkpoint(v=variable(), l=lists, d=held, step=tf.Variable(7)).write(str(folder / "ckpt"))
    return folder / "ckpt"


def keras_optimizers(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """Two models, each with an optimizer under a name of its own: trainable is what both train."""
    keras.utils.set_random_seed(2)
    models = {}
    for name in ("first", "second"):
        layers = [keras.Input((3,)), keras.layers.Dense(4, name="a"), keras.layers.BatchNormalization(name="b")]
        models[name] = keras.Sequential(layers, name=name)
    one, other = keras.optimizers.Adam(), keras.optimizers.SGD(momentum=0.9)
    one.build(models["first"].trainable_variables)
    other.build(models["second"].trainable_variables)
    step, epoch = tf.Variable(3, name="step"), tf.Variable(4, name="epoch")
    checkpoint = tf.train.Checkpoint(**models, opt=one, rival=other, step=step, epoch=epoch)
    checkpoint.write(str(folder / "ckpt"))
    note(folder, trainable=[v.path for model in models.values() for v in model.trainable_variables])
    return folder / "ckpt"


def module_export(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """What `tf.saved_model.save` writes of a module."""
    module = Module()
    tf.saved_model.save(module, str(folder / "model"))
    keys = {id(module.a): "a", id(module.list[0]): "list/0", id(module.sub.w): "sub/w",
            id(module.entries["x.y"]): "entries/x..y"}  # fmt: skip
    names = {"a": "a", "list/0": "b0"}
    order = [names.get(keys[id(v)], keys[id(v)]) for v in module.trainable_variables]
    note(folder, trainable=order)
    return folder / "model"


def version_1(folder: Path, rng: np.random.Generator, large: bool) -> Path:
    """The format before 2017, which is refused."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.get_variable("w", initializer=np.float32([1, 2, 3]))
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(write_version=tf.compat.v1.train.SaverDef.V1)
        saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)
    (folder / "checkpoint").unlink()  # it names a place of this machine
    note(folder, refused="version 1")
    return folder / "model.ckpt"


CASES = (dtypes, sharded, many, keras_checkpoint, module_checkpoint, keras_export, keras_frozen_export,
         keras_saved, keras_frozen_saved, keras_attributes, keras_optimizers, keras_list,
         plain_variables, module_export, version_1, big_endian, big_endian_bfloat16)  # fmt: skip


# ---------------------------------------------------------------- what must land

NOTES: dict[Path, dict[str, Any]] = {}


def note(folder: Path, **what: Any) -> None:
    """Remembers what only the maker of a case knows."""
    NOTES[folder] = what


def prefix_of(source: Path) -> str:
    """The checkpoint in a source."""
    if (source / "saved_model.pb").is_file():
        return str(source / "variables" / "variables")
    return tf.train.latest_checkpoint(str(source)) if source.is_dir() else str(source)


def given_names(reader: Any) -> dict[str, str]:
    """Names that the makers gave their variables, by key; those that are not unique are left out."""
    if not reader.has_tensor(GRAPH):
        return {}
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.ParseFromString(reader.get_tensor(GRAPH))
    named = {a.checkpoint_key: a.full_name for node in graph.nodes for a in node.attributes}
    # A second copy of the same variable has its name, too.
    copies = {key for key in named if key.startswith("_all_variables/")}
    kept = [name for key, name in named.items() if key not in copies]
    said = {k: n for k, n in named.items() if k not in copies and kept.count(n) == 1 and n}
    return {k: n for k, n in said.items() if not re.fullmatch(r"Variable(_?\d+)?", n)}


def way(key: str) -> str:
    """What a variable is called that has no name of its own."""
    return key.removesuffix(VALUE)


def expect(folder: Path, source: Path) -> dict[str, Any]:
    """What TensorFlow reads from a source."""
    said = NOTES.get(folder, {})
    result: dict[str, Any] = {"source": source.relative_to(folder).as_posix()}
    if "refused" in said:
        return result | said
    reader = tf.train.load_checkpoint(prefix_of(source))
    names = given_names(reader)
    trainable = said.get("trainable")
    rows, skipped = [], []
    types = reader.get_variable_to_dtype_map()
    for key in sorted(types):
        if key == GRAPH:
            continue  # it is read for what it says
        if types[key] == tf.string:
            skipped.append(key)
            continue
        if key.startswith("_all_variables/"):
            continue
        value = reader.get_tensor(key)
        dtype = value.dtype.names[0] if value.dtype.names else value.dtype.name
        raw = np.ascontiguousarray(value).tobytes()
        name = names.get(key) or said.get("names", {}).get(key) or way(key)
        row = {"name": name, "dtype": QUANTISED.get(dtype, dtype), "shape": list(value.shape),
               "sha256": hashlib.sha256(raw).hexdigest()}  # fmt: skip
        if trainable is not None:
            row["trainable"] = name in trainable
        if name != key:
            row["source_name"] = key
        rows.append(row)
    result |= {"tensors": rows, "skipped": skipped}
    return result | {key: said[key] for key in ("trainable", "order") if key in said}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, metavar="DIR")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--only", nargs="*", help="names of cases")
    args = parser.parse_args()
    for number, case in enumerate(CASES):
        if args.only and case.__name__ not in args.only:
            continue
        folder = args.dir / case.__name__
        folder.mkdir(parents=True)
        source = case(folder, np.random.default_rng(SEED + number), args.large)
        expected = expect(folder, source)
        (folder / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")
        print(f"{case.__name__}: {len(expected.get('tensors', []))} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
