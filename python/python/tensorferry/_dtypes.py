"""Names of element types, here and in numpy."""

from __future__ import annotations

import numpy as np

from ._errors import usage

# Types that numpy itself has, under the same name.
_NUMPY = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()
)
# One element per byte or more in ml_dtypes and in a checkpoint alike.
ML_DTYPES = frozenset(
    """bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e4m3b11fnuz float8_e4m3
    float8_e3m4 float8_e8m0fnu int4 uint4 int2 uint2""".split()
)
# Raw bytes under names that numpy does not have.
_VOID = {"complex32": "V4", "V1": "V1", "V4": "V4"}
_WIDTH = {"bfloat16": 2}


def dtype_of(name: str) -> np.dtype | None:
    """numpy's type for a name in a manifest; ``None`` for packed types and those in blocks.

    Without ml_dtypes its types are raw bytes of the same width.
    """
    if name in _NUMPY:
        return np.dtype(name)
    if name in _VOID:
        return np.dtype(_VOID[name])
    if name not in ML_DTYPES:
        return None
    try:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    except (ImportError, AttributeError):
        return np.dtype(f"V{_WIDTH.get(name, 1)}")


def name_of(dtype: np.dtype, tensor: str) -> str:
    """The name for a type of numpy or ml_dtypes."""
    if dtype.kind == "V" and dtype.fields is None and dtype.subdtype is None and dtype.name.startswith("void"):
        if dtype.itemsize in (1, 4):
            return f"V{dtype.itemsize}"
    elif dtype.name in _NUMPY or dtype.name in ML_DTYPES:
        return dtype.name
    hint = None
    if dtype.name.startswith(("float4", "float6")):
        hint = "a checkpoint packs these more densely than numpy does; save .view(numpy.uint8)"
    elif dtype.kind in "OSU":
        hint = "only numbers and booleans are tensors"
    raise usage(f"{tensor!r} has elements of type {dtype}, for which a checkpoint has no name", hint)
