"""Writes a checkpoint in any format from canonical tensors, one tensor at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import names as canonical
from nemo_minitron.checkpoints.formats import nemo1, nemo2
from nemo_minitron.checkpoints.formats import nemo2_context as context
from nemo_minitron.checkpoints.formats.huggingface import directory as huggingface
from nemo_minitron.checkpoints.storage import torch_dist
from nemo_minitron.checkpoints.tensors import Lazy
from nemo_minitron.checkpoints.tokenizer import MODEL, SENTENCEPIECE, Tokenizer

TOKENIZER_FOLDER = "nemo_tokenizer"
SHARD_BYTES = 5_000_000_000


def place_in(partial: Path, output: str | Path, form: str) -> Path:
    """Where a stage writes a checkpoint of format `form` inside its partial folder."""
    return partial / Path(output).name if form == "nemo1" else partial


def write_checkpoint(
    path: Path,
    form: str,
    architecture: Architecture,
    tensors: Mapping[str, Lazy],
    tokenizer: Tokenizer | None,
    generation: Mapping[str, Any],
    *,
    weights: str = "torch_dist",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint at `path`, which nobody else looks at yet.

    Args:
        path: an archive for `nemo1`; a folder, which may exist, otherwise.
        form: ``nemo1``, ``nemo2`` or ``hf``.
        tensors: canonical name -> tensor, those of the architecture and no others.
        weights: inside an archive: ``torch_dist`` or ``zarr``.
        shard_bytes: size of a Hugging Face weight file.

    Raises:
        CheckpointError: the tensors are not those of the architecture, or the format cannot express it.
    """
    tensors = canonical.check(tensors, architecture, "the model to write")
    if form == "nemo1":
        nemo1.write(path, architecture, tensors, tokenizer, generation, weights)
    elif form == "hf":
        huggingface.write(path, architecture, tensors, tokenizer, generation, shard_bytes)
    else:
        _write_nemo2(path, architecture, tensors, tokenizer, generation)


def _write_nemo2(
    path: Path,
    architecture: Architecture,
    tensors: Mapping[str, Lazy],
    tokenizer: Tokenizer | None,
    generation: Mapping[str, Any],
) -> None:
    weights = path / nemo2.WEIGHTS
    weights.mkdir(parents=True, exist_ok=True)
    dtype = next(iter(tensors.values())).dtype
    write_context(path, architecture, tokenizer, generation, dtype)
    stacked = canonical.stacked(tensors, architecture.num_layers)
    torch_dist.write(lambda name: (weights / name).open("wb"), nemo2.PREFIX, stacked, architecture.num_layers)


def write_context(
    path: Path, architecture: Architecture, tokenizer: Tokenizer | None, generation: Mapping[str, Any], dtype: str
) -> None:
    """Writes context/ of a NeMo-2 checkpoint: what plain NeMo rebuilds the model from, and the tokenizer's files."""
    folder, reference = path / nemo2.CONTEXT, None
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None and tokenizer.kind == SENTENCEPIECE:
        (folder / MODEL).write_bytes(tokenizer.files[MODEL].read())
        reference = context.TokenizerRef(kind=SENTENCEPIECE, name=MODEL)
    elif tokenizer is not None and tokenizer.files:
        tokenizer.copy_to(folder / TOKENIZER_FOLDER)
        reference = context.TokenizerRef(kind="huggingface", name=TOKENIZER_FOLDER)
    elif tokenizer is not None:
        reference = context.TokenizerRef(kind="huggingface", name=tokenizer.name)
    context.write_context(folder, architecture, tokenizer=reference, dtype=dtype)
    if generation:
        target = path / nemo2.CONTEXT / nemo2.GENERATION
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(dict(generation), indent=2) + "\n", encoding="utf-8")
