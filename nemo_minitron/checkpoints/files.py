"""The files of a checkpoint, in a folder or inside a tar archive, by their names and where their bytes lie.

An archive is never unpacked: its members are read in place. Nothing in it is followed: links, devices, absolute names
and names with `..` are refused, all of them before anything is read.
"""

import contextlib
import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_minitron.artifacts.archive import ERRORS, open_archive
from nemo_minitron.checkpoints.file_bytes import Bytes, whole
from nemo_minitron.errors import CheckpointError

GZIP = b"\x1f\x8b"
#: How a file starts that Git Large File Storage left out, and how long it can be (git-lfs, docs/spec.md).
LFS_POINTER, LFS_LIMIT = b"version https://git-lfs.github.com/spec/v1", 1024
TEXT_LIMIT = 64 << 20
#: The block where a tar archive's members end (POSIX has two).
END_OF_ARCHIVE = bytes(512)
MEMBER_LIMIT = 4_000_000
#: Weights hardly compress; what unpacks to more than so many times its size is no checkpoint.
UNPACKED_FACTOR, UNPACKED_SPARE = 20, 1 << 30


class Files:
    """Name -> bytes of a checkpoint's files; names are relative and use slashes.

    Attributes:
        where: the folder or archive, for messages.
    """

    def __init__(self, where: Path, contents: Mapping[str, Bytes]):
        self.where = where
        self._contents = dict(contents)

    def __contains__(self, name: str) -> bool:
        return name in self._contents

    def names(self) -> list[str]:
        return sorted(self._contents)

    def __getitem__(self, name: str) -> Bytes:
        if name not in self._contents:
            raise CheckpointError(f"{self.where} has no {name}: it is not a whole checkpoint")
        refuse_pointer(self._contents[name], f"{self.where}: {name}")
        return self._contents[name]

    def text(self, name: str) -> str:
        """A small text file; raises CheckpointError where it is missing, too large or not UTF-8."""
        data = self[name]
        if data.length > TEXT_LIMIT:
            raise CheckpointError(f"{self.where}: {name} has {data.length} bytes, too many for what it is")
        try:
            return data.read().decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.where}: {name} is not text (UTF-8)") from None

    def below(self, folder: str) -> "Files":
        """The files in `folder`, by their names there."""
        prefix = f"{folder}/" if folder else ""
        inside = {name[len(prefix) :]: data for name, data in self._contents.items() if name.startswith(prefix)}
        return Files(self.where / folder, inside)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(data.length for data in self._contents.values())


def refuse_pointer(data: Bytes, what: str) -> None:
    """Raises CheckpointError where a file is the text that Git leaves in place of a large one."""
    if len(LFS_POINTER) <= data.length < LFS_LIMIT and data.part(0, len(LFS_POINTER)).read() == LFS_POINTER:
        raise CheckpointError(
            f"{what} is a Git-LFS pointer, not the file itself: run `git lfs pull` in that repository (git lfs install "
            "first where Git does not know it), or download it with `minitron download hf://...`"
        )


def folder_files(folder: Path, *, deep: bool = True, entered: tuple[str, ...] = ()) -> Files:
    """All files in `folder`, and below it if `deep`, or else in those of its folders that are `entered`.

    Files may be links, as in the cache of the Hugging Face hub; folders that are links are not entered.
    """
    contents = {}
    for root, folders, names in os.walk(folder):
        wanted = folders if deep else entered if Path(root) == Path(folder) else ()
        folders[:] = sorted(set(folders).intersection(wanted))
        for name in sorted(names):
            path = Path(root) / name
            if path.is_file():
                contents[path.relative_to(folder).as_posix()] = whole(path)
    return Files(folder, contents)


def archive_files(path: Path) -> Files:
    """The members of an uncompressed tar archive, without a leading `./`.

    Raises:
        CheckpointError: it is no tar archive, is truncated, or has members that a checkpoint does not have.
    """
    size = whole(path).length
    refuse_pointer(whole(path), str(path))
    members: dict[str, Bytes] = {}
    try:
        with open_archive(path) as archive:
            for number, member in enumerate(archive):
                if number >= MEMBER_LIMIT:
                    raise CheckpointError(f"{path} has more than {MEMBER_LIMIT} members")
                if member.isdir():
                    member_name(path, member.name)
                    continue
                name = member_name(path, member.name)
                if not member.isreg() or member.issparse():
                    kind = "link" if member.issym() or member.islnk() else "special file"
                    raise CheckpointError(f"{path}: member {member.name!r} is a {kind}; a checkpoint has plain files")
                if name in members:
                    raise CheckpointError(f"{path}: member {name!r} is there twice")
                if member.size < 0 or member.offset_data + member.size > size:
                    raise CheckpointError(
                        f"{path} is truncated: member {name!r} ends at byte {member.offset_data + member.size}, "
                        f"the file at {size}; copy it again"
                    )
                members[name] = Bytes(path, member.offset_data, member.size)
            end = Bytes(path, archive.offset, max(0, min(len(END_OF_ARCHIVE), size - archive.offset)))
            if end.read() != END_OF_ARCHIVE:
                raise CheckpointError(
                    f"{path} is truncated: nothing ends the archive after byte {archive.offset}; copy it again"
                )
    except CheckpointError:
        raise
    except ERRORS as error:
        raise CheckpointError(f"{path} is not a whole tar archive ({error}); copy it again") from None
    return Files(path, members)


def member_name(path: Path, name: str) -> str:
    """The member's name without `./`; raises CheckpointError where it leads outside."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\x00" in name or "\\" in name:
        raise CheckpointError(f"{path}: member {name!r} leads outside the archive; it was not read")
    return pure.as_posix()


def is_gzip(path: Path) -> bool:
    """Whether the file starts as gzip does."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(2) == GZIP
    return False


def unzipped(path: Path) -> "tuple[tempfile.TemporaryDirectory[str], Files]":
    """The members of a compressed archive, decompressed to a temporary folder that lives as long as the first result.

    Raises:
        CheckpointError: the stream is truncated or fails its checksum, or the temporary folder has no room for it.
    """
    folder = tempfile.TemporaryDirectory(prefix="minitron-")
    target = Path(folder.name) / path.name
    try:
        limit = UNPACKED_FACTOR * path.stat().st_size + UNPACKED_SPARE
        with gzip.open(path, "rb") as packed, target.open("wb") as file:
            while block := packed.read(8 << 20):
                file.write(block)
                if file.tell() > limit:
                    raise ValueError(f"it unpacks to more than {limit} bytes")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        folder.cleanup()
        if isinstance(error, OSError) and error.errno is not None:
            raise CheckpointError(
                f"{path} is compressed and could not be unpacked to {folder.name}: {error.strerror}; set TMPDIR to a "
                "folder with room for it"
            ) from None
        raise CheckpointError(f"{path} is not a whole gzip file ({error}); copy it again") from None
    return folder, archive_files(target)


def read_json(files: Files, name: str) -> dict[str, Any]:
    """A mapping in a JSON file; raises CheckpointError where it is none."""
    try:
        loaded = json.loads(files.text(name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{files.where}/{name} is not JSON ({type(error).__name__})") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{files.where}/{name} is not a mapping")
    return loaded
