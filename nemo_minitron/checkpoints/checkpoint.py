"""Checkpoints on disk, of any format, in one view: architecture, tensors by Megatron's names, tokenizer.

Nothing here imports NeMo or Megatron, and no weight is read before it is asked for.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats import table
from nemo_minitron.checkpoints.formats.base import DEFAULTS, Contents, Format, Model, WriteOptions
from nemo_minitron.checkpoints.formats.table import FORMATS
from nemo_minitron.checkpoints.names import checked
from nemo_minitron.checkpoints.tensors import Lazy
from nemo_minitron.checkpoints.tokenizer import Tokenizer, cached
from nemo_minitron.errors import CheckpointError

START_BYTES = 1 << 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Contents):
    """A checkpoint on disk, described without loading it.

    Attributes:
        path: where it is.
        format: the name of its format (``nemo1``, ``nemo2``, ``hf``, ``gguf``).
    """

    path: Path
    format: str

    @property
    def kind(self) -> Format:
        """Its format."""
        return FORMATS[self.format]

    @functools.cached_property
    def content(self) -> str:
        """SHA-256 over the start of every tensor: the same for the same weights in any format. It tells models apart
        at little cost, and is no proof of content."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors.items():
            digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape[1:]}\0".encode() + _start(tensor))
        return digest.hexdigest()

    @functools.cached_property
    def tokenizer(self) -> str | None:
        """Directory with the tokenizer's files as transformers reads them, or its hub name, or None.

        Files inside an archive, or among weights, are copied to the user's cache once.
        """
        tokenizer = self.tokenizer_files
        if tokenizer is None or not tokenizer.files:
            return tokenizer.name if tokenizer else None
        return str(cached(tokenizer))


def _start(tensor: Lazy) -> bytes:
    """The first bytes of a tensor."""
    data = b""
    for block in tensor.blocks(memoryview(bytearray(START_BYTES)), check=False):
        data += bytes(block[: START_BYTES - len(data)])
        if len(data) == START_BYTES:
            break
    return data


def open_checkpoint(path: str | Path, role: str = "checkpoint", *, quantized: bool = False) -> Checkpoint:
    """Tells the format of the checkpoint at `path`, checks that it is whole, and reads its sizes; loads no weights.

    A folder as the NGC client leaves it, with one `.nemo` file in it, stands for that file.

    Args:
        role: what the checkpoint is for (teacher, student), for messages.
        quantized: take one with quantised weights too; its tensors are then what the weights stand for.

    Raises:
        CheckpointError: it is missing, truncated, quantised where that is of no use, or none of the known formats.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"the {role} {path} does not exist")
    located = locate(path)
    if located is None:
        raise CheckpointError(f"the {role} {path} is no checkpoint that is known here: {table.marks()}")
    place, kind = located
    contents = kind.read(place)
    if contents.quantization is not None and not quantized:
        raise CheckpointError(
            f"the {role} {path} is quantised ({contents.quantization.describe()}): give the model that it was made "
            f"from, in bf16, fp16 or fp32; `minitron convert {path} DST --to hf` makes plain numbers of it, with what "
            "quantising lost still lost"
        )
    return Checkpoint(path=place, format=kind.name, **vars(contents))


def locate(path: Path) -> tuple[Path, Format] | None:
    """Path and format of the checkpoint that `path` stands for, or None."""
    kind = table.detected(path)
    if kind is not None or not path.is_dir():
        return (path, kind) if kind is not None else None
    entries = sorted(path.iterdir())
    files = sorted({table.stands_for(entry) for entry in entries if table.is_named_like_a_file(entry)})
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{path} holds {len(files)} checkpoints ({names}); name one of them")
    if files:
        return locate(files[0])
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    inside = [(folder, kind) for folder in folders if (kind := table.detected(folder)) is not None]
    return inside[0] if len(inside) == 1 else None


def place_in(partial: Path, output: str | Path, form: str) -> Path:
    """Where a stage writes a checkpoint of format `form` inside its partial folder."""
    return FORMATS[form].place_in(partial, output)


def write_checkpoint(
    path: Path,
    form: str,
    architecture: Architecture,
    tensors: Mapping[str, Lazy],
    tokenizer: Tokenizer | None,
    generation: Mapping[str, Any],
    options: WriteOptions = DEFAULTS,
) -> None:
    """Writes a checkpoint at `path`, which nobody else looks at yet, one tensor at a time.

    Args:
        path: the file for formats that are one; a folder, which may exist, otherwise.
        form: the name of its format (``nemo1``, ``nemo2``, ``hf``, ``gguf``).
        tensors: canonical name -> tensor, those of the architecture and no others.

    Raises:
        CheckpointError: the tensors are not those of the architecture, or the format cannot express it.
    """
    model = Model(
        architecture=architecture,
        tensors=checked(tensors, architecture, "the model to write"),
        tokenizer_files=tokenizer,
        generation=generation,
    )
    FORMATS[form].write(path, model, options)
