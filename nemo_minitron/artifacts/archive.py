"""Tar archives as `.nemo` files are: opened with care, and with a manifest as their last member."""

import io
import tarfile
from pathlib import Path

#: Errors of tarfile for a file that is no whole archive.
ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, EOFError, IndexError)


class CheckedMember(tarfile.TarInfo):
    """A member whose header cannot send the reader backwards (CVE-2025-8194)."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.InvalidHeaderError("negative size")  # type: ignore[attr-defined]  # not in typeshed
        return super()._block(count)  # type: ignore[misc]  # not in typeshed


def open_archive(path: Path) -> tarfile.TarFile:
    """The uncompressed archive at `path`, for reading; raises one of ERRORS where it is none."""
    return tarfile.open(path, "r:", tarinfo=CheckedMember)


def last_member(path: Path, name: str, limit: int) -> tuple[bytes, int] | None:
    """Content of the archive's last member, if that is called `name`, and where its header starts; or None.

    Args:
        limit: bytes that it may have.
    """
    try:
        with open_archive(path) as archive:
            members = archive.getmembers()
            last = members[-1] if members else None
            if last is None or not last.isreg() or last.name.removeprefix("./") != name or last.size > limit:
                return None
            file = archive.extractfile(last)
            return (file.read(), last.offset) if file else None
    except ERRORS:
        return None


def append_member(path: Path, name: str, content: bytes) -> None:
    """Adds a file to the archive at `path`."""
    with tarfile.open(path, "a:", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo(f"./{name}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
