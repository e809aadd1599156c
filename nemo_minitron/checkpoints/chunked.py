"""Tensors in boxes, as distributed checkpoints keep them, with checksums where they are stored."""

import concurrent.futures
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from nemo_minitron.checkpoints.file_bytes import Bytes
from nemo_minitron.checkpoints.precision import ITEM_SIZES
from nemo_minitron.checkpoints.tensors import BLOCK, Lazy, in_blocks
from nemo_minitron.errors import CheckpointError

#: Checksums are worked out beside reading and writing: zlib lets other threads run meanwhile.
checksums = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checksum")


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
        chunks = []
        for chunk in self.chunks:
            inside = index - chunk.start[0]
            if 0 <= inside < chunk.shape[0]:
                locate = chunk.locate if chunk.shape[0] == 1 else self._slice(chunk, inside)
                chunks.append(Chunk(chunk.start[1:], chunk.shape[1:], locate))
        return Chunked(self.shape[1:], self.dtype, tuple(chunks), f"{self.name}[{index}]").checked()

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
            yield from in_blocks(self._assembled(), len(buffer))
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
        running = 0
        for block in data.blocks(buffer):
            pending = checksums.submit(zlib.crc32, block, running) if checksum is not None else None
            yield block
            running = pending.result() if pending is not None else 0
        if checksum is not None and running != checksum:
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
        running, pending = 0, None
        for start in range(0, len(out), BLOCK):
            block = out[start : start + BLOCK]
            for _ in data.part(start, len(block)).blocks(block):
                running = pending.result() if pending is not None else 0
                pending = checksums.submit(zlib.crc32, block, running) if checksum is not None else None
        if pending is not None and pending.result() != checksum:
            raise self._damaged(data)

    def _assembled(self) -> memoryview:
        """The whole tensor as bytes [rows * row_bytes], chunk by chunk: for tensors whose rows are cut."""
        import numpy as np

        size = ITEM_SIZES[self.dtype]
        rows: Any = np.empty((self.shape[0], self.row_bytes), dtype=np.uint8)
        for chunk in self.chunks:
            part = bytearray(math.prod(chunk.shape) * size)
            done = 0
            for block in self._chunk_blocks(chunk, memoryview(bytearray(BLOCK))):
                part[done : done + len(block)] = block
                done += len(block)
            top, left = chunk.start[0], chunk.start[1] * size
            box = np.frombuffer(part, dtype=np.uint8).reshape(chunk.shape[0], -1)
            rows[top : top + box.shape[0], left : left + box.shape[1]] = box
        return memoryview(rows.reshape(-1))


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
