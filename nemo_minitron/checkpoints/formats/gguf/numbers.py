"""Types of numbers in GGUF files, the plain ones and those in blocks that share scales, and tensors of them.

Blocks are dequantised, and quantised to Q8_0, by the gguf library's NumPy code, some rows at a time.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.file_bytes import Bytes
from nemo_minitron.checkpoints.precision import cast, numbers
from nemo_minitron.checkpoints.tensors import Cast, Lazy, MadeOf, in_units
from nemo_minitron.errors import CheckpointError
from nemo_minitron.packages import extras

if TYPE_CHECKING:
    import numpy as np

LIBRARY = "gguf"
#: Bytes of a tensor that are rearranged or computed at a time.
PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of numbers.

    Attributes:
        name: as llama.cpp calls it (``Q4_K``).
        number: as files call it.
        block: numbers of a row that are stored together.
        block_bytes: bytes of that.
        dtype: the same by torch's name, where it is a plain one; else None.
    """

    name: str
    number: int
    block: int
    block_bytes: int
    dtype: str | None = None

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor."""
        return math.prod(shape) // self.block * self.block_bytes


F32, F16, BF16 = Kind("F32", 0, 1, 4, "float32"), Kind("F16", 1, 1, 2, "float16"), Kind("BF16", 30, 1, 2, "bfloat16")
Q8_0 = Kind("Q8_0", 8, 32, 34)
PLAIN = {kind.number: kind for kind in (F32, F16, BF16)}
#: dtype -> the type that holds it.
OF_DTYPE = {kind.dtype: kind for kind in PLAIN.values()}


def kind_of(number: int, what: str) -> Kind:
    """The type that files call `number`.

    Args:
        what: which tensor of which file is of it, for messages.

    Raises:
        CheckpointError: it is no type of weights, or not one that can be dequantised.
        MissingPackageError: it is a quantised one, and the gguf library is not installed.
    """
    if number in PLAIN:
        return PLAIN[number]
    extras.require(LIBRARY, f"{what}, which is quantised,", (extras.EVALUATE,))
    kind = _quantised(number)
    if kind is None:
        raise CheckpointError(f"{what} is of GGUF's type {_named(number)}, which is not read: give it in F16 or BF16")
    return kind


def _named(number: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return str(number)


@functools.cache
def _quantised(number: int) -> Kind | None:
    """The quantised type of that number, where the library can dequantise it; else None."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    try:
        stored = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[stored]
        quants.dequantize(np.zeros((1, size), np.uint8), stored)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return Kind(stored.name, number, block, size)


def view(values: "np.ndarray") -> memoryview:
    """The bytes of an array."""
    import numpy as np

    data: Any = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return memoryview(data)


def dequantised(rows: "np.ndarray", kind: Kind) -> "np.ndarray":
    """The numbers of stored rows, uint8 [n, bytes], as float32 [n, columns]."""
    import numpy as np

    if kind.dtype is not None:
        return numbers(view(rows), kind.dtype).astype(np.float32).reshape(len(rows), -1)
    from gguf import GGMLQuantizationType, quants

    with np.errstate(all="ignore"):  # a damaged scale may be NaN, or overflow: so is what it scales
        return quants.dequantize(rows, GGMLQuantizationType(kind.number))


def in_turns(rows: "np.ndarray", head: int) -> "np.ndarray":
    """Rows [n, ...] of heads whose halves follow each other, in llama.cpp's order for Llama: the halves take turns."""
    return rows.reshape(-1, 2, head // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def in_halves(rows: "np.ndarray", head: int) -> "np.ndarray":
    """The reverse of `in_turns`."""
    return rows.reshape(-1, head // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@dataclasses.dataclass(frozen=True)
class Stored(Lazy):
    """Rows of a tensor in a file as plain numbers, made some rows at a time.

    Attributes:
        shape: its shape.
        dtype: of the numbers to make.
        data: the rows' bytes.
        kind: how they are stored.
        head: rows of a head whose halves take turns in the file; 0: none.
        less: what is taken from each number (1 where a file stores a norm's gain and a model its distance from 1).
    """

    shape: tuple[int, ...]
    dtype: str
    data: Bytes
    kind: Kind
    head: int = 0
    less: float = 0.0

    @property
    def stored_row(self) -> int:
        """Bytes of a row in the file."""
        return self.kind.bytes_of(self.shape[1:])

    def rows(self, first: int, last: int) -> "Stored":
        """Rows first..last, the last one not included; whole heads, where there are such."""
        part = self.data.part(first * self.stored_row, (last - first) * self.stored_row)
        return dataclasses.replace(self, shape=(last - first, *self.shape[1:]), data=part)

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        import numpy as np

        unit = self.head or 1
        step = unit * max(1, PIECE // (unit * max(self.row_bytes, 1)))
        for first in range(0, self.shape[0], step):
            piece = self.rows(first, min(first + step, self.shape[0]))
            rows = np.empty((piece.shape[0], piece.stored_row), np.uint8)
            for _ in piece.data.blocks(view(rows)):  # one: all of it at once
                pass
            yield self._made(in_halves(rows, self.head) if self.head else rows)

    def _made(self, rows: "np.ndarray") -> memoryview:
        """The bytes of the numbers of stored rows."""
        import numpy as np

        if self.kind.dtype == self.dtype and not self.less:
            return view(rows)
        values = dequantised(np.ascontiguousarray(rows), self.kind)
        values = values - np.float32(self.less) if self.less else values
        return cast(view(values), "float32", self.dtype)


def fits(values: "np.ndarray", dtype: str) -> bool:
    """Whether float32 numbers are all in `dtype` as well, bit for bit."""
    import numpy as np

    again = numbers(cast(view(values), "float32", dtype), dtype).astype(np.float32)
    return view(again) == view(values)


@dataclasses.dataclass(frozen=True)
class InTurns(MadeOf):
    """A tensor of heads in llama.cpp's order of rows for Llama."""

    head: int

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        import numpy as np

        unit = self.head * self.row_bytes
        for piece in in_units(self.inner, buffer, unit):
            rows = np.frombuffer(piece, np.uint8).reshape(-1, self.row_bytes)
            yield view(in_turns(rows, self.head))


@dataclasses.dataclass(frozen=True)
class More(MadeOf):
    """A tensor in float32 with a number added to each: a norm's gain of its distance from 1."""

    more: float
    dtype = "float32"

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        import numpy as np

        for block in Cast(self.inner, self.dtype).blocks(buffer):
            yield view(np.frombuffer(block, np.float32) + np.float32(self.more))


@dataclasses.dataclass(frozen=True)
class InBlocks(MadeOf):
    """The bytes of a tensor [n, columns] quantised to Q8_0, as uint8 [n, bytes]."""

    dtype = "uint8"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape[0], Q8_0.bytes_of(self.inner.shape[1:])

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        import numpy as np

        columns, size = self.inner.shape[1], self.inner.row_bytes
        for piece in in_units(self.inner, buffer[:PIECE], size):
            values = numbers(piece, self.inner.dtype).astype(np.float32).reshape(-1, columns)
            yield view(quantised(values))


def quantised(values: "np.ndarray") -> "np.ndarray":
    """float32 [n, columns] as Q8_0, uint8 [n, bytes]."""
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    with np.errstate(all="ignore"):
        return np.ascontiguousarray(quants.quantize(values, GGMLQuantizationType.Q8_0))


@dataclasses.dataclass(frozen=True)
class Requantised(MadeOf):
    """What is left of a tensor [n, columns] once it was quantised to Q8_0, in float32."""

    dtype = "float32"

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        import numpy as np

        row = Q8_0.bytes_of(self.inner.shape[1:])
        for block in InBlocks(self.inner).blocks(buffer):
            yield view(dequantised(np.frombuffer(block, np.uint8).reshape(-1, row), Q8_0))


@dataclasses.dataclass(frozen=True)
class OfBytes(Lazy):
    """A small tensor that is there already, as its bytes."""

    data: bytes
    dtype = "uint8"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.data),)

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        yield memoryview(self.data)
