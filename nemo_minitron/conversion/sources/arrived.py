"""What has arrived in the partial folder of a download."""

from pathlib import Path

from nemo_minitron.artifacts import PARTIAL_KEY

SHOWN = 8


def arrived(folder: Path) -> list[Path]:
    """Its files, without the key of the job that makes it."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / PARTIAL_KEY)


def measured(folder: Path) -> dict[str, int]:
    """How many files, and their bytes."""
    sizes = [path.stat().st_size for path in arrived(folder)]
    return {"files": len(sizes), "bytes": sum(sizes)}
