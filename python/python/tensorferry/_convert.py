"""Objects of other libraries as named numpy arrays, without a copy where that is possible.

Nothing is imported: an object is recognised by the module of its class, and its library is
loaded by then.

| what | copied |
|---|---|
| numpy arrays, contiguous in either order and in either order of bytes | no |
| numpy arrays with gaps | yes, one tensor at a time |
| tf.Tensor and tf.Variable on the CPU | no: TensorFlow makes a new buffer before it changes one that is shared |
| torch.Tensor on the CPU, contiguous | no |
| jax.Array on the CPU | no |
| anything with DLPack or ``__array__`` | as it sees fit |
| tensors on other devices | yes: their library brings them here |
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ._dtypes import name_of
from ._errors import usage

__all__ = ["Lent", "Named", "as_array", "check", "lent", "named"]

# Deeper nesting is taken for a cycle.
_MAX_DEPTH = 64


@dataclasses.dataclass(frozen=True)
class Named:
    """A tensor of an object, not converted yet."""

    name: str
    value: Any
    trainable: bool | None = None


@dataclasses.dataclass(frozen=True)
class Lent:
    """A tensor as the native module takes it."""

    meaning: dict[str, Any]
    """``name``, ``dtype``, ``shape``, ``fortran_order``, ``big_endian``."""
    array: np.ndarray
    """Its bytes: flat, ``uint8``."""
    copied_bytes: int
    """What the report says of copies. Whether others hold the memory too it does not say."""
    is_fresh: bool = False
    """The memory was made here, so nobody else can write to it."""


def lent(name: str, value: Any) -> Lent:
    """Lends the memory of a value; copies where it is not in one piece."""
    if isinstance(value, Lent):
        return value
    array, copied = as_array(value, name)
    dtype = name_of(array.dtype, name)
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    is_fresh = not (fortran or array.flags.c_contiguous)
    if is_fresh:
        array, copied = np.array(array, order="C"), True
    flat = (array.T if fortran else array).reshape(-1).view(np.uint8)
    meaning = {
        "name": name,
        "dtype": dtype,
        "shape": list(array.shape),
        "fortran_order": bool(fortran),
        "big_endian": array.dtype.byteorder == ">" and array.dtype.itemsize > 1,
    }
    return Lent(meaning, flat, array.nbytes if copied else 0, is_fresh)


def check(items: Iterable[Named]) -> None:
    """Refuses arrays that cannot be lent, before anything is begun."""
    for item in items:
        if isinstance(item.value, np.ndarray):
            name_of(item.value.dtype, item.name)


def as_array(value: Any, name: str = "tensor") -> tuple[np.ndarray, bool]:
    """A value as an array of numpy, and whether it had to be copied."""
    if isinstance(value, np.ndarray):
        # A map is an array too; a masked one has more than bytes.
        if isinstance(value, np.ma.MaskedArray):
            raise usage(f"{name!r} is a masked array, and a checkpoint has no masks", "save .filled()")
        return np.asarray(value), False
    if isinstance(value, (np.generic, bool, int, float, complex)):
        # A copy, and not one worth telling.
        return np.asarray(value), False
    library = _library(value)
    if library == "keras":
        # A variable of Keras holds one of its backend.
        inner = getattr(value, "value", value)
        inner = inner() if callable(inner) else inner
        if inner is not value:
            return as_array(inner, name)
    if library == "torch":
        return _of_torch(value)
    if library in ("tensorflow", "tf_keras"):
        return _of_tensorflow(value, name)
    if library in ("jax", "jaxlib"):
        here = all(device.platform == "cpu" for device in value.devices())
        return np.asarray(value), not here
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value), False
        except (BufferError, RuntimeError, TypeError):
            # Another device, or a type that DLPack or numpy does not have. Not always a copy.
            return _and_whether_copied(np.asarray(value))
    try:
        # No copy of a buffer; what __array__ gives may be one.
        return _and_whether_copied(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise usage(f"{name!r} is no tensor: {type(value).__name__}") from error


def _and_whether_copied(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """An array that another object gave, and whether it was made for this call: it is no view, and
    nobody else refers to it."""
    alone = _references(array) <= _ALONE
    return array, alone and array.base is None and array.flags.owndata


def _references(array: np.ndarray) -> int:
    return sys.getrefcount(array)


def _references_of_new(array: np.ndarray) -> int:
    found = _references(array)
    return found


# What counts as a reference depends on the interpreter.
_ALONE = _references_of_new(np.empty(0))


def _of_tensorflow(value: Any, name: str) -> tuple[np.ndarray, bool]:
    if hasattr(value, "read_value"):
        value = value.read_value()
    try:
        here = "CPU" in value.device.upper() or not value.device
        # Its method numpy() would copy.
        return np.asarray(value), not here
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise usage(f"{name!r} has no value yet: it belongs to a graph") from error


def _of_torch(value: Any) -> tuple[np.ndarray, bool]:
    torch = sys.modules["torch"]
    tensor = value.detach()
    copied = tensor.device.type != "cpu"
    tensor = tensor.cpu()
    if tensor.is_conj() or tensor.is_neg():
        tensor, copied = tensor.resolve_conj().resolve_neg(), True
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"):
        import ml_dtypes

        raw = torch.int16 if kind == "bfloat16" else torch.uint8
        return tensor.view(raw).numpy().view(getattr(ml_dtypes, kind)), copied
    return tensor.numpy(), copied


def named(obj: Any, *, trainable: bool = False, name: str = "tensor") -> list[Named]:
    """The tensors of an object, by name.

    ``keras.Model``, layers and optimizers: paths of the weights (Keras 3). ``tf.Module``: attributes.
    ``torch.nn.Module``: keys of ``state_dict()``. Dicts, lists, tuples and dataclasses: keys,
    joined by ``/``; a list of variables: their own names. ``name`` is that of a single array.
    """
    found = list(_walk(obj, name))
    if trainable:
        found = [item for item in found if item.trainable]
        if not found:
            raise usage(f"nothing in {type(obj).__name__} says that it is trainable")
    seen: dict[str, Any] = {}
    for item in found:
        if item.name in seen:
            raise usage(
                f"two tensors are called {item.name!r}",
                "give layers names of their own, or save a dict",
            )
        seen[item.name] = item
    return found


def _walk(obj: Any, name: str) -> Iterator[Named]:
    if (library := _library(obj)) in ("keras", "tf_keras") and hasattr(obj, "variables"):
        # Without the state of metrics and of random seeds, which an optimizer does not have.
        yield from map(_variable, getattr(obj, "weights", obj.variables))
    elif library == "torch" and callable(getattr(obj, "state_dict", None)):
        learns = {key for key, value in obj.named_parameters() if value.requires_grad}
        for key, value in obj.state_dict().items():
            if not is_tensor(value):
                raise usage(f"{key!r} of the state is no tensor: {type(value).__name__}")
            yield Named(key, value, key in learns)
    elif not is_tensor(obj) and hasattr(obj, "trainable_variables") and hasattr(obj, "_flatten"):
        yield from _of_module(obj)
    elif isinstance(obj, (list, tuple)) and obj and all(map(_is_variable, obj)):
        yield from map(_variable, obj)
    else:
        yield from _nested(obj, "", name, 0)


def _of_module(module: Any) -> Iterator[Named]:
    # The names that attributes give: those of variables are often all the same.
    pairs = module._flatten(predicate=_is_variable, with_path=True)
    seen = set()
    for path, variable in pairs:
        if id(variable) not in seen:
            seen.add(id(variable))
            yield Named("/".join(map(str, path)), variable, bool(variable.trainable))


def _nested(obj: Any, path: str, name: str, depth: int) -> Iterator[Named]:
    if depth > _MAX_DEPTH:
        raise usage(f"{path!r} is nested deeper than {_MAX_DEPTH}")
    if isinstance(obj, Mapping):
        pairs = [(str(key), value) for key, value in obj.items()]
    elif isinstance(obj, tuple) and hasattr(obj, "_fields"):
        pairs = list(zip(obj._fields, obj, strict=True))
    elif isinstance(obj, (list, tuple)):
        pairs = [(str(index), value) for index, value in enumerate(obj)]
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        pairs = [(field.name, getattr(obj, field.name)) for field in dataclasses.fields(obj)]
    elif obj is None:
        # An empty place of a pytree.
        return
    elif is_tensor(obj):
        trainable = getattr(obj, "trainable", getattr(obj, "requires_grad", None)) if _is_variable(obj) else None
        yield Named(path or name, obj, trainable)
        return
    else:
        raise usage(
            f"{path or name!r} is no tensor: {type(obj).__name__}",
            "save takes arrays, models, modules, lists of variables, and dicts, lists and tuples of these",
        )
    for key, value in pairs:
        yield from _nested(value, f"{path}/{key}" if path else key, name, depth + 1)


def is_tensor(obj: Any) -> bool:
    """Whether an object is one tensor."""
    if isinstance(obj, (np.ndarray, np.generic, bool, int, float, complex)):
        return True
    return hasattr(obj, "shape") and (
        hasattr(obj, "__dlpack__") or hasattr(obj, "__array__") or hasattr(obj, "numpy")
    )


def _is_variable(obj: Any) -> bool:
    return _library(obj) in ("keras", "tf_keras", "tensorflow") and hasattr(obj, "assign") and hasattr(obj, "shape")


def _variable(variable: Any) -> Named:
    name = getattr(variable, "path", None) or variable.name
    return Named(name.removesuffix(":0"), variable, bool(variable.trainable))


def _library(obj: Any) -> str:
    # A user's own class counts as what it is derived from.
    for kind in type(obj).__mro__:
        library = kind.__module__.partition(".")[0]
        if library in ("keras", "tf_keras", "tensorflow", "torch", "jax", "jaxlib"):
            return library
    return ""


