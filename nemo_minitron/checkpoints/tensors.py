"""Tensors of a checkpoint that are not read yet: where their bytes lie, and how to get them in order.

All are little-endian, row-major, and one- or two-dimensional once a stacked tensor is taken apart into layers. Bytes
are only ever moved: reading a tensor in one format and writing it in another leaves every bit as it was.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.file_bytes import Bytes
from nemo_minitron.checkpoints.precision import ITEM_SIZES, cast
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    import torch

BLOCK = 8 << 20


class Lazy(abc.ABC):
    """A tensor that is not read yet.

    Attributes:
        shape: its shape.
        dtype: its dtype by torch's name (``bfloat16``).
    """

    if TYPE_CHECKING:  # read-only for readers; a subclass has fields or properties

        @property
        def shape(self) -> tuple[int, ...]:
            raise NotImplementedError

        @property
        def dtype(self) -> str:
            raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * ITEM_SIZES[self.dtype]

    @abc.abstractmethod
    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        """The tensor's bytes in order; each block is valid until the next.

        Args:
            buffer: memory to use; a reader may yield views of memory of its own instead.
            check: compare with the checksum that is stored; without, the caller has one to hand to `check`.

        Raises:
            CheckpointError: a file is missing, too short, or fails its checksum.
        """

    def check(self, checksum: int) -> None:  # noqa: B027
        """Compares the CRC-32 of all bytes, where one is stored; for blocks that were read without checking."""

    def read_into(self, out: memoryview) -> None:
        """Fills `out` [nbytes] with the tensor."""
        done = 0
        for block in self.blocks(memoryview(bytearray(min(len(out), BLOCK)))):
            out[done : done + len(block)] = block
            done += len(block)

    def read(self) -> "torch.Tensor":
        """The tensor, read into memory."""
        import torch

        tensor = torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        if tensor.numel():
            self.read_into(bytes_of(tensor))
        return tensor


def same_bits(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors are the same in shape, dtype and every bit; reads them up to the first difference."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(a == b for a, b in zip(_pieces(one), _pieces(other), strict=True))


def same_numbers(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors of floating-point numbers are the same, in whatever precisions."""
    if one.dtype == other.dtype:
        return same_bits(one, other)
    return same_bits(*(tensor if tensor.dtype == "float32" else Cast(tensor, "float32") for tensor in (one, other)))


def _pieces(tensor: Lazy, size: int = 1 << 20) -> Iterator[bytes]:
    """The tensor's bytes in pieces of equal size, the last one shorter."""
    for block in in_units(tensor, memoryview(bytearray(BLOCK)), size):
        yield from map(bytes, in_blocks(block, size))


def in_units(tensor: Lazy, buffer: memoryview, unit: int) -> Iterator[memoryview]:
    """The tensor's bytes in blocks of whole units of so many bytes, and at the end what is left."""
    rest = bytearray()
    for block in tensor.blocks(buffer):
        if not rest and not len(block) % unit:
            yield block
            continue
        rest += block
        whole = len(rest) // unit * unit
        if whole:
            yield memoryview(bytes(rest[:whole]))
            del rest[:whole]
    if rest:
        yield memoryview(bytes(rest))


@dataclasses.dataclass(frozen=True)
class Runs(Lazy):
    """A tensor as runs of bytes that follow each other.

    Attributes:
        runs: where they lie.
    """

    shape: tuple[int, ...]
    dtype: str
    runs: tuple[Bytes, ...]

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        for run in self.runs:
            yield from run.blocks(buffer)

    def read_into(self, out: memoryview) -> None:
        done = 0
        for run in self.runs:
            run.read_into(out[done : done + run.length])
            done += run.length

    def rows(self, first: int, last: int) -> "Runs":
        """Rows first..last, the last one not included."""
        start, stop, runs, position = first * self.row_bytes, last * self.row_bytes, [], 0
        for run in self.runs:
            low, high = max(start - position, 0), min(stop - position, run.length)
            if low < high:
                runs.append(run.part(low, high - low))
            position += run.length
        return Runs((last - first, *self.shape[1:]), self.dtype, tuple(runs))


def concatenate(parts: list[Runs]) -> Runs:
    """Tensors of equal dtype and row length, one below the other."""
    rows = sum(part.shape[0] for part in parts)
    return Runs((rows, *parts[0].shape[1:]), parts[0].dtype, tuple(run for part in parts for run in part.runs))


@dataclasses.dataclass(frozen=True)
class Joined(Lazy):
    """Tensors of equal dtype and row length, one below the other."""

    parts: tuple[Lazy, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        for part in self.parts:
            yield from part.blocks(buffer)


def bytes_of(tensor: "torch.Tensor") -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which they share."""
    import torch

    data: Any = tensor.view(torch.uint8).numpy().reshape(-1)
    return memoryview(data)


def in_blocks(data: memoryview, size: int) -> Iterator[memoryview]:
    """The data in pieces of `size` bytes, the last one shorter."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


@dataclasses.dataclass(frozen=True)
class MadeOf(Lazy):
    """A tensor made of another while that is read: of its shape and dtype, where a subclass does not say otherwise."""

    inner: Lazy

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> str:
        return self.inner.dtype


@dataclasses.dataclass(frozen=True)
class Resized(MadeOf):
    """A tensor with fewer rows, or with zeros below it: the padding of the vocabulary."""

    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.inner.shape[1:])

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        left = self.nbytes
        for block in self.inner.blocks(buffer):  # to its end: its checksum is known only then
            if left:
                yield block[:left]
            left -= min(left, len(block))
        while left:
            zeros = memoryview(bytes(min(left, BLOCK)))
            yield zeros
            left -= len(zeros)


@dataclasses.dataclass(frozen=True)
class Cast(MadeOf):
    """A tensor in another precision."""

    precision: str

    @property
    def dtype(self) -> str:
        return self.precision

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        for block in self.inner.blocks(buffer[: len(buffer) // 16 * 16 or len(buffer)]):
            yield cast(block, self.inner.dtype, self.dtype)


@dataclasses.dataclass(frozen=True)
class Computed(Lazy):
    """A tensor that a function returns when it is asked for."""

    shape: tuple[int, ...]
    dtype: str
    function: "Callable[[], torch.Tensor]"

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:

        tensor = self.function().contiguous()
        if tuple(tensor.shape) != self.shape or str(tensor.dtype) != f"torch.{self.dtype}":
            raise CheckpointError(f"a tensor {tuple(tensor.shape)} of {tensor.dtype} came where {self} was announced")
        yield from in_blocks(bytes_of(tensor), len(buffer))


@dataclasses.dataclass(frozen=True)
class ByRows(Lazy):
    """A tensor made of another, some rows at a time: what is made never lies in memory as a whole.

    Attributes:
        prepare: returns the other tensor [rows, ...] and the function that makes rows of this one from rows of that.
    """

    shape: tuple[int, ...]
    dtype: str
    prepare: "Callable[[], tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]"

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        import torch

        source, function = self.prepare()
        step = max(1, BLOCK // max(self.row_bytes, 1))
        for rows in torch.split(source, step):
            made = function(rows).to(getattr(torch, self.dtype)).contiguous()
            if made.shape[1:] != self.shape[1:] or len(source) != self.shape[0]:
                raise CheckpointError(f"rows {tuple(made.shape)} of {len(source)} came where {self} was announced")
            yield from in_blocks(bytes_of(made), len(buffer))


@dataclasses.dataclass(frozen=True)
class Watched(MadeOf):
    """A tensor that tells how many of its bytes were read."""

    tell: Callable[[int], Any]

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        for block in self.inner.blocks(buffer, check):
            yield block
            self.tell(len(block))

    def check(self, checksum: int) -> None:
        self.inner.check(checksum)

    def read_into(self, out: memoryview) -> None:
        self.inner.read_into(out)
        self.tell(len(out))


def in_memory(tensor: "torch.Tensor") -> Computed:
    """A torch tensor as a Lazy."""
    return Computed(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: tensor)
