"""The table of formats."""

from pathlib import Path

from nemo_minitron.checkpoints.formats.base import Format
from nemo_minitron.checkpoints.formats.bridge.directory import Bridge
from nemo_minitron.checkpoints.formats.gguf.file import Gguf
from nemo_minitron.checkpoints.formats.huggingface.directory import HuggingFace
from nemo_minitron.checkpoints.formats.nemo1.archive import Nemo1
from nemo_minitron.checkpoints.formats.nemo2.directory import Nemo2

#: By name, in the order in which a path is asked for. NeMo 1 takes any file: one that is told by its first bytes
#: stands before it.
FORMATS: dict[str, Format] = {entry.name: entry for entry in (Nemo2(), Gguf(), Nemo1(), Bridge(), HuggingFace())}


def detected(path: Path) -> Format | None:
    """The format of the checkpoint that lies at `path` itself, or None."""
    return next((entry for entry in FORMATS.values() if entry.detect(path)), None)


def is_named_like_a_file(path: Path) -> bool:
    """Whether a file of this name is a checkpoint by itself (``*.nemo``)."""
    return path.suffix in {entry.suffix for entry in FORMATS.values() if entry.suffix}


def stands_for(path: Path) -> Path:
    """The file that stands for the checkpoint which the file `path` belongs to: the first of those that are split."""
    return next((first for entry in FORMATS.values() if (first := entry.first_of(path)) != path), path)


def marks() -> str:
    """What tells a checkpoint, for messages."""
    files = [entry.file_mark for entry in FORMATS.values() if entry.file_mark]
    *folders, last = [entry.folder_mark for entry in FORMATS.values() if entry.folder_mark]
    return f"neither {', '.join(files)}, nor a directory with {', '.join(folders)} or {last}"
