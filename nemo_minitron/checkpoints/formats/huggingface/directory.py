"""Hugging Face checkpoints: a directory with config.json and safetensors, one file or many with an index."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import generation
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints.files import Files, folder_files, read_json
from nemo_minitron.checkpoints.formats.base import (
    TRANSFORMERS,
    Contents,
    Format,
    Model,
    Quantization,
    WriteOptions,
)
from nemo_minitron.checkpoints.formats.huggingface import config as config_json
from nemo_minitron.checkpoints.formats.huggingface import quantized
from nemo_minitron.checkpoints.formats.huggingface.config import CONFIG
from nemo_minitron.checkpoints.formats.huggingface.mapping import export_tensors, hf_names, import_tensors
from nemo_minitron.checkpoints.storage import safetensors as safetensors_file
from nemo_minitron.checkpoints.tensors import Lazy, Runs
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class HuggingFace(Format):
    """Hugging Face directories, plain or quantised by ModelOpt."""

    name = "hf"
    title = "Hugging Face directory"
    folder_mark = f"{CONFIG} (Hugging Face)"
    engine = TRANSFORMERS

    def detect(self, path: Path) -> bool:
        return (path / CONFIG).is_file() and not (path / "context").is_dir()

    def read(self, path: Path) -> Contents:
        return read(folder_files(path, deep=False, entered=(tokenizers.TEMPLATES,)))

    def check(self, architecture: Architecture, dtype: str) -> None:
        config_json.write_config(architecture, dtype)

    def write(self, path: Path, model: Model, options: WriteOptions) -> None:
        write(path, model, options.shard_bytes)

    def mapped(self, path: Path, architecture: Architecture) -> "dict[str, torch.Tensor] | None":
        return mapped_tensors(path, architecture)


def read(files: Files) -> Contents:
    """What the files of a directory hold; reads headers only, but for an output layer that is stored though it is tied
    to the embedding.

    Raises:
        CheckpointError: the family is unknown, a shard is missing or damaged, or a tensor is missing.
    """
    config = config_json.load(files)
    source = f"{files.where}/{CONFIG}"
    quantization = quantization_of(files, config)
    architecture = config_json.read_config(config, source)
    special = generation.checked(config_json.special_tokens(config), source)
    settings = special | generation.read(files)
    stored = _stored(files)
    plain: Mapping[str, Lazy] = stored
    if quantization is not None:
        plain = quantized.dequantized(stored, quantization, files.where)
    return Contents(
        architecture=architecture,
        tensors=import_tensors(plain, architecture, files.where),
        tokenizer_files=tokenizers.in_folder(files),
        generation=settings,
        size=files.size(),
        layout="safetensors",
        quantization=quantization,
        stored_precisions=None if quantization is None else _precisions(stored),
    )


def _precisions(stored: Mapping[str, Lazy]) -> dict[str, int]:
    """Dtype -> tensors that are stored in it, scales included."""
    return dict(Counter(tensor.dtype for tensor in stored.values()).most_common())


def quantization_of(files: Files, config: dict[str, Any] | None = None) -> Quantization | None:
    """How the weights are quantised, or None; raises CheckpointError where that is not known here."""
    config = read_json(files, CONFIG) if config is None else config
    beside = read_json(files, quantized.SIDE_FILE) if quantized.SIDE_FILE in files else None
    return quantized.recognise(config, beside, f"{files.where}/{CONFIG}")


def dequantized(folder: Path, dtype: str | None = None) -> dict[str, Lazy]:
    """Hugging Face name -> plain tensor of a directory that ModelOpt quantised, each made when it is read.

    Args:
        dtype: of the tensors that were quantised (`float32`); None: that of those that were not.

    Raises:
        CheckpointError: the directory is damaged, not quantised, or quantised in a way that is not known here.
    """
    stored, quantization = stored_quantized(folder)
    return quantized.dequantized(stored, quantization, folder, dtype)


def stored_tensors(folder: Path) -> dict[str, Runs]:
    """Every tensor of a directory as it is stored, by its Hugging Face name."""
    return _stored(folder_files(Path(folder), deep=False))


def mapped_tensors(folder: Path, a: Architecture) -> "dict[str, torch.Tensor]":
    """The tensors of a plain directory by their Hugging Face names, as views of its files: what is in
    them is read where it is used."""
    from safetensors import safe_open

    wanted = {name for theirs, _ in hf_names(a).values() for name in theirs}
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder_files(Path(folder), deep=False)):
        with safe_open(Path(folder) / file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in wanted & set(opened.keys())}
    return tensors


def stored_quantized(folder: Path) -> tuple[dict[str, Runs], Quantization]:
    """The stored tensors of a quantised directory and how they are quantised; see `dequantized`."""
    files = folder_files(Path(folder), deep=False)
    quantization = quantization_of(files)
    if quantization is None:
        raise CheckpointError(f"{folder} is not quantised: its config.json has no {quantized.CONFIG_KEY}")
    return _stored(files), quantization


def weight_files(files: Files) -> list[str]:
    """Names of the files with weights: one, or else those that the index names; so transformers looks for them.

    Raises:
        CheckpointError: there are none, or the index is damaged.
    """
    if SINGLE in files:
        return [SINGLE]
    if INDEX not in files:
        others = [name for name in files.names() if name.endswith((".bin", ".safetensors", ".pth"))]
        hint = f"; there are {', '.join(others[:4])}" if others else ""
        raise CheckpointError(f"{files.where} has neither {SINGLE} nor {INDEX}{hint}: it is not a whole checkpoint")
    shards = sorted(set(_weight_map(files).values()))
    for shard in shards:
        if "/" in shard or shard.startswith("."):
            raise CheckpointError(f"{files.where}/{INDEX} names the file {shard}, which is outside the checkpoint")
    return shards


def _weight_map(files: Files) -> dict[str, str]:
    """Tensor -> file, of the index."""
    places = read_json(files, INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(value, str) for value in places.values()):
        raise CheckpointError(f"{files.where}/{INDEX} has no weight_map")
    return places


def _stored(files: Files) -> dict[str, Runs]:
    """Every tensor of every file of weights, by its Hugging Face name."""
    names = weight_files(files)
    tensors: dict[str, Runs] = {}
    for name in names:
        tensors |= safetensors_file.read(files[name])
    missing = sorted(_weight_map(files).keys() - tensors.keys()) if names != [SINGLE] else []
    if missing:
        raise CheckpointError(f"{files.where}: the index names {', '.join(missing[:6])}, which no shard holds")
    return tensors


def shards(tensors: Mapping[str, Lazy], limit: int) -> dict[str, dict[str, Lazy]]:
    """File name -> tensors, each file at most `limit` bytes unless one tensor alone is larger."""
    groups: list[dict[str, Lazy]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": group for number, group in enumerate(groups, 1)}


def write(folder: Path, model: Model, shard_bytes: int) -> None:
    """Writes config.json, generation_config.json, tokenizer and weights into `folder`.

    Special tokens that the settings of generation do not name are the tokenizer's.

    Raises:
        CheckpointError: transformers has no class that computes what this architecture does, or the tokenizer's files
            do not go with it.
    """
    a, tokenizer = model.architecture, model.tokenizer_files
    settings = generation.completed(model.generation, tokenizer, a.vocab_size - a.vocab_padding)
    config = config_json.write_config(a, model.dtype, settings)
    exported = export_tensors(model.tensors, a)
    folder.mkdir(parents=True, exist_ok=True)
    _dump(folder / CONFIG, config)
    own = {} if model.generation else {"_from_model_config": True}
    _dump(folder / generation.FILE, own | settings)
    if tokenizer is not None:
        tokenizer.copy_to(folder)
    files = shards(exported, shard_bytes)
    for name, group in files.items():
        with (folder / name).open("wb") as file:
            safetensors_file.write(file, group)
    if len(files) > 1:
        places = {tensor: name for name, group in files.items() for tensor in group}
        total = sum(tensor.nbytes for tensor in exported.values())
        _dump(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
