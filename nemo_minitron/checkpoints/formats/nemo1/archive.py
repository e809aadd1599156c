"""NeMo-1 checkpoints: a `.nemo` archive, or the same files in a folder, with model_config.yaml and the weights.

Weights are a Megatron distributed checkpoint (zarr or torch_dist) in model_weights/, or one file model_weights.ckpt.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints import generation, untrusted
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints.chunked import Chunked
from nemo_minitron.checkpoints.files import Files, archive_files, folder_files, is_gzip, unzipped
from nemo_minitron.checkpoints.formats.base import Contents, Format, Model, WriteOptions
from nemo_minitron.checkpoints.formats.nemo1 import config as model_config
from nemo_minitron.checkpoints.formats.nemo1.config import CONFIG, TOKENIZER_FOLDER
from nemo_minitron.checkpoints.names import EMBEDDING, by_canonical_name, checked, stacked
from nemo_minitron.checkpoints.storage import torch_dist
from nemo_minitron.checkpoints.storage import zarr as zarr_store
from nemo_minitron.checkpoints.storage.tar import ArchiveWriter
from nemo_minitron.checkpoints.storage.torch_zip import StoredTensor, read_torch_file
from nemo_minitron.errors import CheckpointError

WEIGHTS, SINGLE = "model_weights", "model_weights.ckpt"
PREFIX = "model."
COMPRESSED = "the archive is compressed: each command unpacks it first; minitron convert makes it plain"


class Nemo1(Format):
    """`.nemo` archives, plain or compressed, and their unpacked folders."""

    name = "nemo1"
    title = "NeMo-1 archive (.nemo)"
    folder_mark = f"{CONFIG} (NeMo 1)"
    file_mark = "a .nemo archive"

    def detect(self, path: Path) -> bool:
        return path.is_file() or (path / CONFIG).is_file()

    def read(self, path: Path) -> Contents:
        if path.is_dir():
            return read(folder_files(path), path)
        if not is_gzip(path):
            return read(archive_files(path), path)
        folder, files = unzipped(path)
        return dataclasses.replace(read(files, path), keep=folder, remarks=(COMPRESSED,))

    def write(self, path: Path, model: Model, options: WriteOptions) -> None:
        write(path, model, options.weights)


def root_of(files: Files) -> Files:
    """The files with model_config.yaml at their root; raises CheckpointError unless there is just one."""
    configs = [name for name in files.names() if name.rpartition("/")[2] == CONFIG]
    if len(configs) != 1:
        raise CheckpointError(f"{files.where} has {len(configs)} files called {CONFIG}, a NeMo-1 checkpoint has one")
    folder = configs[0].rpartition("/")[0]
    return files.below(folder) if folder else files


def read(files: Files, where: Path) -> Contents:
    """What the files of a checkpoint hold; reads no weights.

    Args:
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: the configuration is incomplete, or the weights are missing, damaged or of another model.
    """
    root = root_of(files)
    config = model_config.read_yaml(root)
    tensors = by_canonical_name(_stored(root), root.where)
    if EMBEDDING not in tensors or len(tensors[EMBEDDING].shape) != 2:
        raise CheckpointError(f"{root.where} has no embedding matrix")
    tokenizer = model_config.read_tokenizer(root, config)
    rows = tensors[EMBEDDING].shape[0]
    architecture = model_config.read_architecture(config, rows, f"{root.where}/{CONFIG}")
    architecture = architecture.with_sizes(vocab_padding=model_config.read_padding(config, rows, tokenizer) or None)
    settings = generation.read(root)
    return Contents(
        architecture=architecture,
        tensors=checked(tensors, architecture, where),
        tokenizer_files=tokenizer,
        generation=settings,
        size=files.size(),
        layout=layout(files),
    )


def layout(files: Files) -> str:
    """How the weights lie: ``torch_dist``, ``zarr`` or ``ckpt``."""
    names = files.names()
    if any(name.endswith(f"/{zarr_store.ARRAY}") for name in names):
        return "zarr"
    return "torch_dist" if any(name.endswith(torch_dist.METADATA) for name in names) else "ckpt"


def _stored(files: Files) -> dict[str, Chunked]:
    weights = files.below(WEIGHTS)
    if "metadata.json" in weights:
        try:
            backend = json.loads(weights.text("metadata.json"))["sharded_backend"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CheckpointError(f"{weights.where}/metadata.json is damaged") from None
        if backend == "zarr":
            return zarr_store.tensors(weights)
        if backend == "torch_dist":
            return torch_dist.tensors(weights)
        raise CheckpointError(f"{weights.where}: weights in {untrusted.shown(backend)}; known are zarr and torch_dist")
    if torch_dist.METADATA in weights:
        return torch_dist.tensors(weights)
    return _single(files)


def _single(files: Files) -> dict[str, Chunked]:
    """Weights of model_weights.ckpt, by key."""
    parts = [name for name in files.names() if name.rpartition("/")[2] == SINGLE]
    if not parts:
        raise CheckpointError(f"{files.where} has neither {WEIGHTS}/ with metadata.json nor {SINGLE}")
    if len(parts) > 1:
        raise CheckpointError(
            f"{files.where} was saved in {len(parts)} parts, one a rank ({', '.join(parts[:3])}...); these are not put "
            "together here: convert it to one rank or to a distributed checkpoint in NeMo first"
        )
    source = f"{files.where}/{parts[0]}"
    state = read_torch_file(files[parts[0]], source)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{source} holds no state dict")
    if any(isinstance(key, str) and "language_model.encoder.layers" in key for key in state):
        raise CheckpointError(
            f"{source} has the keys of NeMo's own layers, from before Megatron core (mcore_gpt: false); convert it "
            "with the NeMo 24.07 container's convert_gpt_nemo_to_mcore.py first"
        )
    return {
        key: value.lazy(key) for key, value in state.items() if isinstance(key, str) and isinstance(value, StoredTensor)
    }


def write(path: Path, model: Model, weights: str) -> None:
    """Writes a `.nemo` archive.

    NeMo passes over the member that keeps the settings of generation.

    Args:
        weights: ``torch_dist`` or ``zarr``.
    """
    tokenizer, settings = model.tokenizer_files, model.generation
    with path.open("wb") as file:
        archive = ArchiveWriter(file)
        with archive.create(CONFIG) as member:
            member.write(model_config.write_yaml(model.architecture, model.dtype, tokenizer, weights).encode())
        if settings:
            with archive.create(generation.FILE) as member:
                member.write((json.dumps(dict(settings), indent=2) + "\n").encode())
        if tokenizer is not None:
            folder = "" if tokenizer.kind == tokenizers.SENTENCEPIECE else f"{TOKENIZER_FOLDER}/"
            for name, data in tokenizer.files.items():
                with archive.create(f"{folder}{name}") as member:
                    member.write(data.read())

        def create(name: str) -> Any:
            return archive.create(f"{WEIGHTS}/{name}")

        num_layers = model.architecture.num_layers
        store = zarr_store if weights == "zarr" else torch_dist
        store.write(create, PREFIX, stacked(model.tensors, num_layers), num_layers)
        archive.close()
