"""What surrounds the writing of a checkpoint: room on the disk for it, and a bar of what is done."""

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_minitron.checkpoints.tensors import Lazy, Watched
from nemo_minitron.errors import MinitronError

SPARE_BYTES = 64 << 20


def check_room(output: str | Path, needed: int) -> None:
    """Raises MinitronError where the disk of `output` has less than `needed` bytes left."""
    folder = Path(output).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise MinitronError(
            f"{output} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left; free some, or give another "
            "output"
        )


@contextlib.contextmanager
def progress(tensors: Mapping[str, Lazy], title: str) -> Iterator[dict[str, Lazy]]:
    """The tensors, with a bar of the bytes that are read from them; none where this is no terminal."""
    if not sys.stderr.isatty():
        yield dict(tensors)
        return
    from tqdm import tqdm

    with tqdm(total=total_bytes(tensors), desc=title, unit="B", unit_scale=True, leave=False) as bar:
        yield {name: Watched(tensor, bar.update) for name, tensor in tensors.items()}


def total_bytes(tensors: Mapping[str, Lazy]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())
