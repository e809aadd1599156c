"""Tensors of a checkpoint that are not read yet: where their bytes lie, and how to get them in order.

All are little-endian, row-major, and one- or two-dimensional once a stacked tensor is taken apart into layers. Bytes
are only ever moved: reading a tensor in one format and writing it in another leaves every bit as it was.
"""

import abc
import concurrent.futures
import dataclasses
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.precision import cast
from nemo_minitron.checkpoints.storage.pickles import ITEM_SIZES
from nemo_minitron.errors import CheckpointError

BLOCK = 8 << 20
#: Checksums are worked out beside reading and writing: zlib lets other threads run meanwhile.
checksums = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checksum")


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A run of bytes inside a file."""

    path: Path
    offset: int
    length: int

    def part(self, start: int, length: int) -> "Bytes":
        """`length` bytes from `start` on; raises CheckpointError where they reach outside."""
        if start < 0 or length < 0 or start + length > self.length:
            raise CheckpointError(
                f"{self.path}: {length} bytes at {start} reach outside a piece of {self.length} bytes; "
                "the file is damaged"
            )
        return Bytes(self.path, self.offset + start, length)

    def read(self) -> bytes:
        """All of it: for what is small."""
        return b"".join(map(bytes, self.blocks(memoryview(bytearray(self.length)))))

    def blocks(self, buffer: memoryview) -> Iterator[memoryview]:
        """The bytes in order, a buffer at a time; the buffer is used again for the next block."""
        try:
            file = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
        try:
            done = 0
            while done < self.length:
                view = buffer[: min(len(buffer), self.length - done)]
                _fill(file, view, self.offset + done, self.path)
                done += len(view)
                yield view
        finally:
            os.close(file)


@dataclasses.dataclass(frozen=True)
class InMemory(Bytes):
    """Bytes that were made of those of a file.

    Attributes:
        data: the bytes; `path` is where they come from.
    """

    data: bytes = b""

    def read(self) -> bytes:
        return self.data

    def blocks(self, buffer: memoryview) -> Iterator[memoryview]:
        yield memoryview(self.data)


def _fill(file: int, view: memoryview, offset: int, path: Path) -> None:
    filled = 0
    while filled < len(view):
        try:
            count = os.preadv(file, [view[filled:]], offset + filled)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(
                f"{path} is truncated: it ends at byte {offset + filled}, {offset + len(view)} are needed; copy again"
            )
        filled += count


def whole(path: Path) -> Bytes:
    """A file as a run of bytes; raises CheckpointError where it is none."""
    try:
        return Bytes(path, 0, os.stat(path).st_size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def item_size(dtype: str, source: Any) -> int:
    """Bytes of an element; raises CheckpointError for a dtype that no weight has."""
    if dtype not in ITEM_SIZES:
        raise CheckpointError(f"{source} holds {dtype}; known are {', '.join(ITEM_SIZES)}")
    return ITEM_SIZES[dtype]


class Lazy(abc.ABC):
    """A tensor that is not read yet.

    Attributes:
        shape: its shape.
        dtype: its dtype by torch's name (``bfloat16``).
    """

    shape: tuple[int, ...]
    dtype: str

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

    def read(self) -> Any:
        """The tensor, read into memory (torch.Tensor)."""
        import torch

        tensor = torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        if tensor.numel():
            self.read_into(memoryview(tensor.view(torch.uint8).numpy().reshape(-1)))
        return tensor


def same_bits(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors are the same in shape, dtype and every bit; reads them up to the first difference."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    buffers = memoryview(bytearray(BLOCK)), memoryview(bytearray(BLOCK))
    first, second = _rebuffer(one, buffers[0]), _rebuffer(other, buffers[1])
    return all(a == b for a, b in zip(first, second, strict=True))


def _rebuffer(tensor: Lazy, buffer: memoryview, size: int = 1 << 20) -> Iterator[bytes]:
    """The tensor's bytes in pieces of equal size, whatever blocks they come in."""
    rest = bytearray()
    for block in tensor.blocks(buffer):
        rest += block
        whole = len(rest) // size * size
        for start in range(0, whole, size):
            yield bytes(rest[start : start + size])
        del rest[:whole]
    yield bytes(rest)


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

    def rows(self, first: int, last: int) -> "Runs":
        """Rows first..last, the last one not included."""
        start, stop, found, position = first * self.row_bytes, last * self.row_bytes, [], 0
        for run in self.runs:
            low, high = max(start - position, 0), min(stop - position, run.length)
            if low < high:
                found.append(run.part(low, high - low))
            position += run.length
        return Runs((last - first, *self.shape[1:]), self.dtype, tuple(found))


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


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A box of a tensor, row-major in one piece.

    Attributes:
        start: index of its first element.
        shape: its shape.
        locate: returns its bytes and their CRC-32, where that is known.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    locate: Callable[[], tuple[Bytes, int | None]]


@dataclasses.dataclass(frozen=True)
class Chunked(Lazy):
    """A tensor in boxes, as distributed checkpoints keep it."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]
    name: str = "a tensor"

    def layer(self, index: int) -> Lazy:
        """One layer of a stacked tensor [l, ...]."""
        found = []
        for chunk in self.chunks:
            inside = index - chunk.start[0]
            if 0 <= inside < chunk.shape[0]:
                locate = chunk.locate if chunk.shape[0] == 1 else self._slice(chunk, inside)
                found.append(Chunk(chunk.start[1:], chunk.shape[1:], locate))
        return Chunked(self.shape[1:], self.dtype, tuple(found), f"{self.name}[{index}]").checked()

    def _slice(self, chunk: Chunk, inside: int) -> Callable[[], tuple[Bytes, int | None]]:
        length = math.prod(chunk.shape[1:]) * ITEM_SIZES[self.dtype]
        return lambda: (chunk.locate()[0].part(inside * length, length), None)

    def checked(self) -> "Chunked":
        """Itself with the chunks in order; raises CheckpointError unless they tile the tensor exactly."""
        chunks = sorted(self.chunks, key=lambda chunk: chunk.start)
        if len(self.shape) not in (1, 2) or not _tiles(self.shape, chunks):
            raise CheckpointError(
                f"{self.name}: its {len(chunks)} pieces do not make up a tensor of shape {self.shape}; "
                "the checkpoint is damaged or was not copied whole"
            )
        return dataclasses.replace(self, chunks=tuple(chunks))

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        columns = self.shape[1:]
        if any(chunk.shape[1:] != columns for chunk in self.chunks):
            yield from _in_blocks(memoryview(self._assembled()), len(buffer))
            return
        for chunk in self.chunks:
            yield from self._chunk_blocks(chunk, buffer, check or len(self.chunks) > 1)

    def check(self, checksum: int) -> None:
        if len(self.chunks) == 1:
            data, expected = self.chunks[0].locate()
            if expected is not None and checksum != expected:
                raise self._damaged(data)

    def _damaged(self, data: Bytes) -> CheckpointError:
        return CheckpointError(f"{data.path}: {self.name} fails its checksum; the file is damaged, copy it again")

    def _chunk_blocks(self, chunk: Chunk, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        data, checksum = chunk.locate()
        checksum = checksum if check else None
        expected = math.prod(chunk.shape) * ITEM_SIZES[self.dtype]
        if data.length != expected:
            raise CheckpointError(f"{data.path}: {self.name} has {data.length} bytes where {expected} are needed")
        found = 0
        for block in data.blocks(buffer):
            pending = checksums.submit(zlib.crc32, block, found) if checksum is not None else None
            yield block
            found = pending.result() if pending is not None else 0
        if checksum is not None and found != checksum:
            raise self._damaged(data)

    def read_into(self, out: memoryview) -> None:
        if any(chunk.shape[1:] != self.shape[1:] for chunk in self.chunks):
            super().read_into(out)
            return
        done = 0
        for chunk in self.chunks:  # straight into place
            size = math.prod(chunk.shape) * ITEM_SIZES[self.dtype]
            self._read_chunk(chunk, out[done : done + size])
            done += size

    def _read_chunk(self, chunk: Chunk, out: memoryview) -> None:
        data, checksum = chunk.locate()
        if data.length != len(out):
            raise CheckpointError(f"{data.path}: {self.name} has {data.length} bytes where {len(out)} are needed")
        found, pending = 0, None
        for start in range(0, len(out), BLOCK):
            block = out[start : start + BLOCK]
            for _ in data.part(start, len(block)).blocks(block):
                found = pending.result() if pending is not None else 0
                pending = checksums.submit(zlib.crc32, block, found) if checksum is not None else None
        if pending is not None and pending.result() != checksum:
            raise self._damaged(data)

    def _assembled(self) -> Any:
        """The whole tensor as bytes [rows * row_bytes], chunk by chunk: for tensors whose rows are cut."""
        import numpy as np

        size = ITEM_SIZES[self.dtype]
        rows = np.empty((self.shape[0], self.row_bytes), dtype=np.uint8)
        for chunk in self.chunks:
            part = bytearray(math.prod(chunk.shape) * size)
            done = 0
            for block in self._chunk_blocks(chunk, memoryview(bytearray(BLOCK))):
                part[done : done + len(block)] = block
                done += len(block)
            top, left = chunk.start[0], chunk.start[1] * size
            box = np.frombuffer(part, dtype=np.uint8).reshape(chunk.shape[0], -1)
            rows[top : top + box.shape[0], left : left + box.shape[1]] = box
        return rows.reshape(-1)


def _tiles(shape: tuple[int, ...], chunks: list[Chunk]) -> bool:
    """Whether boxes, sorted by their start, cover `shape` exactly once."""
    rank = len(shape)
    for chunk in chunks:
        if len(chunk.start) != rank or len(chunk.shape) != rank:
            return False
        if any(a < 0 or b < 1 or a + b > c for a, b, c in zip(chunk.start, chunk.shape, shape)):
            return False
    strips: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for chunk in chunks:
        columns = (chunk.start[1], chunk.shape[1]) if rank == 2 else (0, 1)
        strips.setdefault((chunk.start[0], chunk.shape[0]), []).append(columns)
    return _covers(list(strips), shape[0]) and all(
        _covers(strip, shape[1] if rank == 2 else 1) for strip in strips.values()
    )


def _covers(intervals: list[tuple[int, int]], length: int) -> bool:
    position = 0
    for start, size in sorted(intervals):
        if start != position:
            return False
        position += size
    return position == length


def _in_blocks(data: memoryview, size: int) -> Iterator[memoryview]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@dataclasses.dataclass(frozen=True)
class Resized(Lazy):
    """A tensor with fewer rows, or with zeros below it: the padding of the vocabulary."""

    inner: Lazy
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.inner.shape[1:])

    @property
    def dtype(self) -> str:
        return self.inner.dtype

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
class Cast(Lazy):
    """A tensor in another precision."""

    inner: Lazy
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        for block in self.inner.blocks(buffer[: len(buffer) // 16 * 16 or len(buffer)]):
            yield cast(block, self.inner.dtype, self.dtype)


@dataclasses.dataclass(frozen=True)
class Computed(Lazy):
    """A tensor that a function returns when it is asked for."""

    shape: tuple[int, ...]
    dtype: str
    function: Callable[[], Any]

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        import torch

        tensor = self.function().contiguous()
        if tuple(tensor.shape) != self.shape or str(tensor.dtype) != f"torch.{self.dtype}":
            raise CheckpointError(f"a tensor {tuple(tensor.shape)} of {tensor.dtype} came where {self} was announced")
        yield from _in_blocks(memoryview(tensor.view(torch.uint8).numpy().reshape(-1)), len(buffer))


@dataclasses.dataclass(frozen=True)
class ByRows(Lazy):
    """A tensor made of another, some rows at a time: what is made never lies in memory as a whole.

    Attributes:
        prepare: returns the other tensor [rows, ...] and the function that makes rows of this one from rows of that.
    """

    shape: tuple[int, ...]
    dtype: str
    prepare: Callable[[], tuple[Any, Callable[[Any], Any]]]

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        import torch

        source, function = self.prepare()
        for rows in source.split(max(1, BLOCK // max(self.row_bytes, 1))):
            made = function(rows).to(getattr(torch, self.dtype)).contiguous()
            if made.shape[1:] != self.shape[1:] or len(source) != self.shape[0]:
                raise CheckpointError(f"rows {tuple(made.shape)} of {len(source)} came where {self} was announced")
            yield from _in_blocks(memoryview(made.view(torch.uint8).numpy().reshape(-1)), len(buffer))


@dataclasses.dataclass(frozen=True)
class Watched(Lazy):
    """A tensor that tells how many of its bytes were read."""

    inner: Lazy
    tell: Callable[[int], Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> str:
        return self.inner.dtype

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        for block in self.inner.blocks(buffer, check):
            yield block
            self.tell(len(block))

    def check(self, checksum: int) -> None:
        self.inner.check(checksum)

    def read_into(self, out: memoryview) -> None:
        self.inner.read_into(out)
        self.tell(len(out))


def in_memory(tensor: Any) -> Computed:
    """A torch tensor as a Lazy."""
    return Computed(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: tensor)
