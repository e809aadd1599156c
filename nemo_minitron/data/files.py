"""A user's files of text, compressed or not: which there are in a folder, and what they hold, line by line.

Whatever is wrong with a file is one DataError that names it and the place.
"""

import collections
import contextlib
import gzip
import io
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from nemo_minitron.errors import DataError

#: Suffixes of compressed files -> what they are called.
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
MARK = "\ufeff"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
#: How the text begins that Git leaves where Git LFS has not fetched the file itself.
LFS_POINTER = "version https://git-lfs.github.com/spec/"
#: Names of one message.
SHOWN = 5


def kind(path: Path) -> str:
    """The suffix that says what a file holds, in small letters: `.jsonl` of `a.JSONL`, `a.jsonl.gz`, `a.jsonl.zst`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] != ".parquet" else path.suffix.lower()
    return suffixes[-1] if suffixes else ""


def files_in(folder: Path) -> list[Path]:
    """All files below `folder` in the order of their names, links followed, without hidden files and folders.

    Raises:
        DataError: a folder cannot be read.
    """
    files, seen = [], set()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(root) in seen:  # a link led here before, or leads in a circle
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(root) / name for name in names if not name.startswith(".")]
    return sorted(files)


def left_out(folder: Path, paths: Iterable[Path], known: Iterable[str]) -> list[str]:
    """A note for each kind of file in `folder` that is not read: how many there are, and the names of the first."""
    kinds = collections.defaultdict(list)
    for path in paths:
        name = "plain text about it" if kind(path) in known else kind(path) or "without a suffix"
        kinds[name if path.exists() else "broken links"].append(path)
    return [
        f"{folder}: files left out, {name}: {len(left)} ({_shortened(left, folder)}); read are {', '.join(known)}"
        for name, left in sorted(kinds.items())
    ]


def _shortened(paths: list[Path], folder: Path) -> str:
    """The names of the first few files, and how many more there are."""
    names = [str(path.relative_to(folder)) for path in paths[:SHOWN]]
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(names) + more


def without_copies(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """The files without those that hold, compressed, what another of the same name holds, and a note for each of them.

    Raises:
        DataError: one of two files of the same name cannot be read.
    """
    kept: dict[Path, list[Path]] = collections.defaultdict(list)
    notes = []
    for path in sorted(paths, key=lambda path: (path.suffix.lower() in COMPRESSED, path)):
        others = kept[path.with_suffix("") if path.suffix.lower() in COMPRESSED else path]
        same = next((other for other in others if _same_text(path, other)), None)
        if same is None:
            others.append(path)
        else:
            notes.append(f"{path} is left out: it holds what {same} holds")
    return sorted(itertools.chain.from_iterable(kept.values())), notes


def _same_text(one: Path, other: Path) -> bool:
    """Whether two files hold the same lines."""
    return all(left == right for left, right in itertools.zip_longest(lines(one), lines(other)))


def lines(path: Path) -> Iterator[str]:
    """The lines of a file with their ends, as Python's text files have them; a byte-order mark at its start is none.

    Raises:
        DataError: it cannot be read, is compressed and truncated or damaged, a Git LFS pointer, or not UTF-8.
    """
    packed = COMPRESSED.get(path.suffix.lower())
    try:
        try:
            with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
                first = text.readline()
                if first.startswith(LFS_POINTER):
                    raise DataError(f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull`")
                yield from itertools.chain([first] if first else [], text)
        except UnicodeDecodeError:
            raise DataError(_wrong_byte(path)) from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if packed and getattr(error, "errno", None) is None:
            raise DataError(f"{path} is not a whole {packed} file ({error}); copy it again") from None
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def content(path: Path) -> str:
    """All of a file's text; raises what `lines` raises."""
    return "".join(lines(path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """The bytes that a file holds, decompressed."""
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        if suffix in COMPRESSED and not file.peek(1):
            raise EOFError("it is empty")
        if suffix == ".gz":
            with gzip.open(file, "rb") as unpacked:
                yield unpacked
        elif suffix == ".zst":
            import pyarrow

            with pyarrow.CompressedInputStream(file, "zstd") as stream, io.BufferedReader(stream, 1 << 16) as unpacked:
                yield unpacked
        else:
            yield file


def _wrong_byte(path: Path) -> str:
    """Where the first byte lies that is not UTF-8: the line, and the byte's place in all of the (unpacked) file.

    Raises:
        OSError, EOFError, zlib.error: it is compressed and damaged, whatever its bytes came to be.
    """
    start = 0
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                other = "UTF-16" if number == 1 and line.startswith(UTF_16) else "ENCODING"
                place = start + error.start
                collections.deque(file if path.suffix.lower() in COMPRESSED else (), maxlen=0)
                return f"{path}:{number}: byte {place} is not UTF-8; convert it first, iconv -f {other} -t UTF-8"
            start += len(line)
    return f"{path} is not UTF-8"
