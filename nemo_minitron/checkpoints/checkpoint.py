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
from nemo_minitron.checkpoints import files
from nemo_minitron.checkpoints import names as canonical
from nemo_minitron.checkpoints.formats import nemo1, nemo2
from nemo_minitron.checkpoints.formats.huggingface import directory as huggingface
from nemo_minitron.checkpoints.formats.huggingface.quantized import Quantization
from nemo_minitron.checkpoints.tensors import Lazy
from nemo_minitron.checkpoints.tokenizer import TEMPLATES, Tokenizer, cached
from nemo_minitron.errors import CheckpointError

NEMO1, NEMO2, HF = "nemo1", "nemo2", "hf"
START_BYTES = 1 << 12
FORMATS = {NEMO1: "NeMo-1 archive (.nemo)", NEMO2: "NeMo-2 directory", HF: "Hugging Face directory"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk, described without loading it.

    Attributes:
        path: where it is.
        format: ``nemo1``, ``nemo2`` or ``hf``.
        architecture: family and sizes.
        tensors: canonical name -> tensor that is read when asked for, in the order of a forward pass.
        tokenizer_files: the tokenizer, or None.
        generation: settings of generation (`eos_token_id`...), where the checkpoint keeps them.
        size: bytes of its files.
        layout: how the weights lie (``torch_dist``, ``zarr``, ``ckpt``, ``safetensors``).
        quantization: how the stored weights are quantised, or None; `tensors` are then what they stand for.
    """

    path: Path
    format: str
    architecture: Architecture
    tensors: Mapping[str, Lazy]
    tokenizer_files: Tokenizer | None
    generation: Mapping[str, Any]
    size: int
    layout: str
    quantization: Quantization | None = None
    keep: Any = None

    @property
    def dtype(self) -> str:
        """Dtype of the first tensor, the embedding (``bfloat16``)."""
        return next(iter(self.tensors.values())).dtype

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
        found = self.tokenizer_files
        if found is None or not found.files:
            return found.name if found else None
        return str(cached(found))


def _start(tensor: Lazy) -> bytes:
    """The first bytes of a tensor."""
    found = b""
    for block in tensor.blocks(memoryview(bytearray(START_BYTES)), check=False):
        found += bytes(block[: START_BYTES - len(found)])
        if len(found) == START_BYTES:
            break
    return found


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
    found = locate(path)
    if found is None:
        raise CheckpointError(
            f"the {role} {path} is no checkpoint that is known here: neither a .nemo archive, nor a directory with "
            "context/ and weights/ (NeMo 2), model_config.yaml (NeMo 1) or config.json (Hugging Face)"
        )
    place, kind = found
    checkpoint = {NEMO1: _open_nemo1, NEMO2: _open_nemo2, HF: _open_hf}[kind](place)
    if checkpoint.quantization is not None and not quantized:
        raise CheckpointError(
            f"the {role} {path} is quantised ({checkpoint.quantization.describe()}): give the model that it was made "
            f"from, in bf16, fp16 or fp32; `minitron convert {path} DST --to hf` makes plain numbers of it, with what "
            "quantising lost still lost"
        )
    return checkpoint


def locate(path: Path) -> tuple[Path, str] | None:
    """Path and format of the checkpoint that `path` stands for, or None."""
    if path.is_file():
        return path, NEMO1
    if nemo2.is_nemo2(path):
        return path, NEMO2
    if (path / nemo1.CONFIG).is_file():
        return path, NEMO1
    if huggingface.is_huggingface(path):
        return path, HF
    archives = sorted(path.glob("*.nemo")) if path.is_dir() else []
    if len(archives) > 1:
        names = ", ".join(archive.name for archive in archives)
        raise CheckpointError(f"{path} holds {len(archives)} archives ({names}); name one of them")
    if archives:
        return locate(archives[0])
    inside = [entry for entry in sorted(path.iterdir()) if entry.is_dir()] if path.is_dir() else []
    found = [place for entry in inside if not entry.name.startswith(".") and (place := locate_here(entry))]
    return found[0] if len(found) == 1 else None


def locate_here(path: Path) -> tuple[Path, str] | None:
    """As locate, for a directory that is a checkpoint itself."""
    if nemo2.is_nemo2(path):
        return path, NEMO2
    if (path / nemo1.CONFIG).is_file():
        return path, NEMO1
    return (path, HF) if huggingface.is_huggingface(path) else None


def _open_nemo1(path: Path) -> Checkpoint:
    keep = None
    if path.is_dir():
        found = files.folder_files(path)
    elif files.is_gzip(path):
        keep, found = files.unzipped(path)
    else:
        found = files.archive_files(path)
    architecture, tokenizer, generation, tensors = nemo1.read(found)
    return Checkpoint(
        path=path,
        format=NEMO1,
        architecture=architecture,
        tensors=canonical.check(tensors, architecture, path),
        tokenizer_files=tokenizer,
        generation=generation,
        size=found.size(),
        layout=nemo1.layout(found),
        keep=keep,
    )


def _open_nemo2(path: Path) -> Checkpoint:
    found = files.folder_files(path)
    architecture, tokenizer, generation, tensors = nemo2.read(found)
    return Checkpoint(
        path=path,
        format=NEMO2,
        architecture=architecture,
        tensors=canonical.check(tensors, architecture, path / nemo2.WEIGHTS),
        tokenizer_files=tokenizer,
        generation=generation,
        size=found.size(),
        layout="torch_dist",
    )


def _open_hf(path: Path) -> Checkpoint:
    found = files.folder_files(path, deep=False, entered=(TEMPLATES,))
    architecture, generation, tensors = huggingface.read(found)
    return Checkpoint(
        path=path,
        format=HF,
        architecture=architecture,
        tensors=tensors,
        tokenizer_files=huggingface.tokenizer(found),
        generation=generation,
        size=found.size(),
        layout="safetensors",
        quantization=huggingface.quantization_of(found),
    )
