"""Dtypes by torch's names, and precisions of floating-point numbers by NumPy, so that changing one needs no torch.

bfloat16 is the upper half of a float32. Results equal torch's bit for bit, NaN apart, which stays NaN.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

#: Dtypes of torch by name -> bytes an element.
ITEM_SIZES = {
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
#: Floating-point dtypes that NumPy counts with, by torch's names; bfloat16 by way of float32.
FLOATS = ("bfloat16", "float16", "float32", "float64")
#: float32 without its sign: infinity, above which all is NaN.
INFINITY = 0x7F800000
QUIET_NAN = 0x7FC0


def item_size(dtype: str, source: str | Path) -> int:
    """Bytes of an element; raises CheckpointError for a dtype that no weight has."""
    if dtype not in ITEM_SIZES:
        raise CheckpointError(f"{source} holds {dtype}; known are {', '.join(ITEM_SIZES)}")
    return ITEM_SIZES[dtype]


def numbers(data: memoryview, dtype: str) -> "np.ndarray":
    """The numbers that the bytes of `dtype` (by torch's name) stand for, as an array [n]; bfloat16 as float32."""
    import numpy as np

    if dtype == "bfloat16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype.startswith("float8"):  # NumPy has none
        import torch

        return torch.frombuffer(data, dtype=getattr(torch, dtype)).float().numpy()
    return np.frombuffer(data, dtype)


def cast(data: memoryview, source: str, target: str) -> memoryview:
    """The bytes of the numbers in another precision, rounded to nearest, ties to even.

    Args:
        source: their dtype, by torch's name.
        target: ``bfloat16``, ``float16`` or ``float32``.
    """
    import numpy as np

    with np.errstate(over="ignore"):  # beyond the largest number lies infinity, in torch as well
        values = numbers(data, source).astype(np.float32)
        made: Any = _bfloat16(values) if target == "bfloat16" else values.astype(target)
    return memoryview(made.view(np.uint8))


def _bfloat16(values: "np.ndarray") -> "np.ndarray":
    """float32 numbers as the bits of bfloat16 [n]."""
    import numpy as np

    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16)
    rounded[(bits & 0x7FFFFFFF) > INFINITY] = QUIET_NAN
    return rounded


def count_not_finite(data: memoryview, dtype: str) -> int:
    """How many of the numbers are NaN or Inf."""
    import numpy as np

    values = numbers(data, dtype)
    return int(values.size - np.isfinite(values).sum())
