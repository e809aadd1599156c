"""Fingerprints of content: equal ones mean equal inputs."""

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from nemo_minitron.artifacts.archive import last_member
from nemo_minitron.artifacts.manifest import MANIFEST, MANIFEST_LIMIT, PARTIAL_KEY, Manifest
from nemo_minitron.artifacts.split_files import parts_of

SAMPLES, SAMPLE_BYTES = 16, 1 << 16
#: Files of a stage folder that differ between equal runs (times, logs, reports) and so stay out of its fingerprint.
VOLATILE = (MANIFEST, PARTIAL_KEY, "logs", "tensorboard", "checkpoints", "report.json", "report.html")
#: Hidden files that say what a zarr array is: its shape, its dtype, what stands where nothing is stored.
HIDDEN_CONTENT = (".zarray", ".zattrs", ".zgroup")


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 over the content of a file, or over names and contents of a folder's files, or of the parts of a split
    file, of which any stands for all.

    What differs between equal runs is left out: logs in a folder, the manifest at the end of an archive.
    """
    path = Path(path)
    if path.is_file() and parts_of(path) == [path]:
        end = _manifest_start(path)
        return _hash_file(path) if end is None else _hash_start(path, end)
    digest = hashlib.sha256()
    for name, file in _named_files(path):
        digest.update(f"{name}\0{_hash_file(file)}\n".encode())
    return digest.hexdigest()


def sampled_fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 over names, sizes and some blocks of every file that `fingerprint` reads, the first and the last block
    included: tells checkpoints apart at no cost, and is no proof of content. The manifest at the end of an archive is
    left out, as there."""
    path, digest = Path(path), hashlib.sha256()
    end = _manifest_start(path) if path.is_file() else None
    for name, file in _named_files(path):
        size = file.stat().st_size if end is None else end
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as opened:
            for number in range(SAMPLES):
                opened.seek(max(size - SAMPLE_BYTES, 0) * number // (SAMPLES - 1))
                digest.update(opened.read(min(SAMPLE_BYTES, size)))
    return f"sampled-{digest.hexdigest()}"


def _manifest_start(path: Path) -> int | None:
    """Where the content of an archive of ours ends and its manifest starts; None for any other file."""
    member = last_member(path, MANIFEST, MANIFEST_LIMIT) if path.suffix == ".nemo" else None
    if member is None:
        return None
    try:
        Manifest.parse(member[0])
    except (ValueError, TypeError):
        return None
    return member[1]


def _named_files(path: Path) -> list[tuple[str, Path]]:
    """The files that are read, in order, by their names: in a folder, or of the parts of a file; empty for a whole
    one."""
    if not path.is_file():
        return [(file.relative_to(path).as_posix(), file) for file in sorted(_content_files(path))]
    parts = parts_of(path)
    return [("", path)] if parts == [path] else [(part.name, part) for part in parts]


def _content_files(folder: Path) -> Iterable[Path]:
    """Files that make up a folder's content.

    Hidden ones are left out, but for those of zarr: the .metadata of a distributed checkpoint carries an id drawn anew
    for each save, and what it describes is in the files beside it.
    """
    for root, folders, files in os.walk(folder):
        volatile = VOLATILE if Path(root) == folder else ()
        folders[:] = [name for name in folders if name not in volatile and not name.startswith(".")]
        shown = (name for name in files if name in HIDDEN_CONTENT or not name.startswith("."))
        yield from (Path(root) / name for name in shown if name not in volatile)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        if sys.version_info >= (3, 11):
            return hashlib.file_digest(file, "sha256").hexdigest()
        return _sha256(file)


def _sha256(file: BinaryIO, length: int | None = None) -> str:
    digest, left = hashlib.sha256(), length
    while block := file.read(1 << 20 if left is None else min(1 << 20, left)):
        digest.update(block)
        left = None if left is None else left - len(block)
    return digest.hexdigest()


def _hash_start(path: Path, length: int) -> str:
    with path.open("rb") as file:
        return _sha256(file, length)
