"""A tar archive that is written member by member, without knowing their sizes beforehand."""

import contextlib
import io
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from nemo_minitron.errors import CheckpointError


class FromHere(io.RawIOBase):
    """Another file from its current position on, where offsets start at 0; for writing."""

    def __init__(self, file: BinaryIO):
        super().__init__()
        self.file, self.base = file, file.tell()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell() - self.base

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = self.base + offset if whence == io.SEEK_SET else offset
        return self.file.seek(target, whence) - self.base

    def write(self, data: Any) -> int:
        return self.file.write(data)


class ArchiveWriter:
    """A tar archive that is written member by member, sizes filled in once they are known."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self._folders: set[str] = set()

    @contextlib.contextmanager
    def create(self, name: str) -> "Iterator[FromHere]":
        """A member as a seekable file; it is whole when the body ends."""
        self._make_folders(name)
        start = self.file.tell()
        self.file.write(b"\0" * tarfile.BLOCKSIZE)
        yield FromHere(self.file)
        self.file.seek(0, 2)
        size = self.file.tell() - start - tarfile.BLOCKSIZE
        self.file.write(b"\0" * (-size % tarfile.BLOCKSIZE))
        self.file.seek(start)
        self.file.write(self._header(f"./{name}", size))
        self.file.seek(0, 2)

    def _make_folders(self, name: str) -> None:
        parts = name.split("/")[:-1]
        for depth in range(len(parts)):
            folder = "/".join(parts[: depth + 1])
            if folder not in self._folders:
                self._folders.add(folder)
                self.file.write(self._header(f"./{folder}", 0, tarfile.DIRTYPE))

    @staticmethod
    def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
        member = tarfile.TarInfo(name)
        member.size, member.type, member.mode = size, kind, 0o755 if kind == tarfile.DIRTYPE else 0o644
        header = member.tobuf(tarfile.GNU_FORMAT)
        if len(header) != tarfile.BLOCKSIZE:
            raise CheckpointError(f"{name} is too long a name for a member of an archive")
        return header

    def close(self) -> None:
        """Writes the end of the archive."""
        self.file.write(b"\0" * (2 * tarfile.BLOCKSIZE))
        self.file.write(b"\0" * (-self.file.tell() % tarfile.RECORDSIZE))
