"""NeMo-2 checkpoints: a directory with context/ (io.json, model.yaml, tokenizer) and weights/ (torch_dist)."""

import contextlib
import json
from pathlib import Path

from nemo_minitron.checkpoints import generation, untrusted
from nemo_minitron.checkpoints.chunked import Chunked
from nemo_minitron.checkpoints.files import Files, folder_files
from nemo_minitron.checkpoints.formats.base import Contents, MegatronFormat, Model, WriteOptions
from nemo_minitron.checkpoints.formats.nemo2 import context as contexts
from nemo_minitron.checkpoints.formats.nemo2 import context_writer
from nemo_minitron.checkpoints.formats.nemo2.classes import CONTEXT, GENERATION, PREFIX, WEIGHTS
from nemo_minitron.checkpoints.formats.nemo2.context_writer import TokenizerRef
from nemo_minitron.checkpoints.names import EMBEDDING, by_canonical_name, checked, stacked
from nemo_minitron.checkpoints.storage import torch_dist
from nemo_minitron.checkpoints.storage import zarr as zarr_store
from nemo_minitron.checkpoints.tokenizer import HUGGINGFACE, MODEL, SENTENCEPIECE, Tokenizer
from nemo_minitron.errors import CheckpointError

TOKENIZER_FOLDER = "nemo_tokenizer"


class Nemo2(MegatronFormat):
    """NeMo-2 directories."""

    name = "nemo2"
    title = "NeMo-2 directory"
    folder_mark = f"{CONTEXT}/ and {WEIGHTS}/ (NeMo 2)"
    weights, prefix = WEIGHTS, PREFIX

    def detect(self, path: Path) -> bool:
        return (path / CONTEXT).is_dir() and (path / WEIGHTS).is_dir()

    def read(self, path: Path) -> Contents:
        return read(folder_files(path), path)

    def write(self, path: Path, model: Model, options: WriteOptions) -> None:
        del options
        weights, num_layers = path / WEIGHTS, model.architecture.num_layers
        weights.mkdir(parents=True, exist_ok=True)
        self.write_description(path, model)
        layers = stacked(model.tensors, num_layers)
        torch_dist.write(lambda name: (weights / name).open("wb"), PREFIX, layers, num_layers)

    def write_description(self, path: Path, model: Model) -> None:
        folder = path / CONTEXT
        folder.mkdir(parents=True, exist_ok=True)
        reference = _write_tokenizer(folder, model.tokenizer_files) if model.tokenizer_files is not None else None
        context_writer.write_context(folder, model.architecture, tokenizer=reference, dtype=model.dtype)
        if model.generation:
            target = folder / GENERATION
            target.parent.mkdir(exist_ok=True)
            target.write_text(json.dumps(dict(model.generation), indent=2) + "\n", encoding="utf-8")


def read(files: Files, where: Path) -> Contents:
    """What the files of a checkpoint hold; reads no weights.

    Args:
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: the context is missing or unreadable, the family is not a dense one that is known here, or the
            weights are missing, damaged or of another model.
    """
    context = files.below(CONTEXT)
    family, class_name, values = contexts.read_config(context)
    tensors = by_canonical_name(_stored(files.below(WEIGHTS)), files.where / WEIGHTS)
    embedding = tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{files.where / WEIGHTS} has no embedding matrix")
    fields = contexts.read_fields(family, class_name, values) | {"vocab_size": embedding.shape[0]}
    architecture = untrusted.architecture(family, fields, f"{files.where}/{CONTEXT}")
    tokenizer = contexts.read_tokenizer(context)
    padding = contexts.read_padding(context, values, architecture.vocab_size, tokenizer)
    architecture = architecture.with_sizes(vocab_padding=padding or None)
    settings = generation.read(context, GENERATION)
    return Contents(
        architecture=architecture,
        tensors=checked(tensors, architecture, where / WEIGHTS),
        tokenizer_files=tokenizer,
        generation=settings,
        size=files.size(),
        layout="torch_dist",
    )


def _stored(weights: Files) -> dict[str, Chunked]:
    """Tensors by Megatron's keys; NeMo 2 writes torch_dist, early releases could write zarr."""
    backend = "torch_dist"
    if torch_dist.METADATA not in weights and "metadata.json" in weights:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            backend = json.loads(weights.text("metadata.json"))["sharded_backend"]
    return zarr_store.tensors(weights) if backend == "zarr" else torch_dist.tensors(weights)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> TokenizerRef:
    """Writes the tokenizer's files into the context's `folder`; returns how the context names it."""
    if tokenizer.kind == SENTENCEPIECE:
        (folder / MODEL).write_bytes(tokenizer.files[MODEL].read())
        return TokenizerRef(kind=SENTENCEPIECE, name=MODEL)
    if tokenizer.files:
        tokenizer.copy_to(folder / TOKENIZER_FOLDER)
        return TokenizerRef(kind=HUGGINGFACE, name=TOKENIZER_FOLDER)
    return TokenizerRef(kind=HUGGINGFACE, name=tokenizer.hub_name())
