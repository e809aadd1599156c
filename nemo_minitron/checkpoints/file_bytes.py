"""Runs of bytes inside files, read in place and in order."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.errors import CheckpointError


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

    def read_into(self, out: memoryview) -> None:
        """Fills `out` [length] with it."""
        for _ in self.blocks(out):  # one block, which is `out`
            pass

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

    def read_into(self, out: memoryview) -> None:
        out[:] = self.data

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
