"""Disk formats of checkpoints."""

import dataclasses
from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk, described without loading it.

    Attributes:
        path: where it is.
        format: ``nemo2``.
        architecture: family and sizes.
        tokenizer: directory with the tokenizer's files, or a hub name, or None.
    """

    path: Path
    format: str
    architecture: Architecture
    tokenizer: str | None


def open_checkpoint(path: str | Path, role: str = "checkpoint") -> Checkpoint:
    """Tells the format of the checkpoint at `path`, checks that it is whole, and reads its sizes; loads no weights.

    Args:
        role: what the checkpoint is for (teacher, student), for messages.

    Raises:
        CheckpointError: it is missing, truncated, or none of the known formats.
    """
    from nemo_minitron.checkpoints import nemo2, torch_dist

    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"the {role} {path} does not exist")
    if not path.is_dir() or not nemo2.is_nemo2(path):
        raise CheckpointError(
            f"the {role} {path} is no checkpoint that is known here: a NeMo-2 checkpoint is a directory with "
            "context/ and weights/"
        )
    torch_dist.check_complete(path / nemo2.WEIGHTS)
    return Checkpoint(path=path, format="nemo2", architecture=nemo2.architecture(path), tokenizer=nemo2.tokenizer(path))
