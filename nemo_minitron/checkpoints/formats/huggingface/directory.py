"""Hugging Face checkpoints: a directory with config.json and safetensors, one file or many with an index."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import generation as settings_of_generation
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints.files import Files, folder_files, read_json
from nemo_minitron.checkpoints.formats.huggingface import quantized
from nemo_minitron.checkpoints.formats.huggingface.families import (
    FAMILIES,
    OUTER,
    layer_names,
    read_config,
    write_config,
)
from nemo_minitron.checkpoints.names import EMBEDDING, LAYERS, OUTPUT, layer_shapes, outer_shapes
from nemo_minitron.checkpoints.storage import safetensors as safetensors_file
from nemo_minitron.checkpoints.tensors import Joined, Lazy, Resized, Runs, concatenate, same_bits
from nemo_minitron.checkpoints.untrusted import shown
from nemo_minitron.errors import CheckpointError

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HF_LAYERS = "model.layers."
#: Buffers that older checkpoints carry.
BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def is_huggingface(path: Path) -> bool:
    """Whether `path` is laid out as a Hugging Face checkpoint."""
    return (path / CONFIG).is_file() and not (path / "context").is_dir()


def read(files: Files) -> tuple[Architecture, dict[str, Any], dict[str, Lazy]]:
    """Architecture, generation settings and canonical tensors; reads headers only, but for an output layer that is
    stored though it is tied to the embedding.

    Raises:
        CheckpointError: the family is unknown, a shard is missing or damaged, or a tensor is missing.
    """
    config = read_json(files, CONFIG)
    source = f"{files.where}/{CONFIG}"
    if "mapping" in config and "architecture" in config:
        raise CheckpointError(
            f"{files.where} is a TensorRT-LLM checkpoint of {shown(config['architecture'])} (config.json, "
            "rank*.safetensors): trtllm-build reads it; nothing here does, give the model that it was made from"
        )
    quantization = quantization_of(files, config)
    architecture = read_config(config, source)
    special = {key: config[key] for key in tokenizers.SPECIAL_TOKENS if config.get(key) is not None}
    generation = settings_of_generation.checked(special, source) | settings_of_generation.read(files)
    stored: Mapping[str, Lazy] = _stored(files)
    if quantization is not None:
        stored = quantized.dequantized(stored, quantization, files.where)
    tensors = _canonical(stored, architecture, files.where)
    return architecture, generation, tensors


def quantization_of(files: Files, config: dict[str, Any] | None = None) -> quantized.Quantization | None:
    """How the weights are quantised, or None; raises CheckpointError where that is not known here."""
    config = read_json(files, CONFIG) if config is None else config
    beside = read_json(files, quantized.SIDE_FILE) if quantized.SIDE_FILE in files else None
    return quantized.recognise(config, beside, f"{files.where}/{CONFIG}")


def stored_precisions(files: Files) -> dict[str, int]:
    """Dtype -> tensors that are stored in it, scales included; of quantised directories."""
    return dict(Counter(tensor.dtype for tensor in _stored(files).values()).most_common())


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


def mapped_tensors(folder: Path, a: Architecture) -> dict[str, Any]:
    """The tensors of a plain directory (torch.Tensor) by their Hugging Face names, as views of its files: what is in
    them is read where it is used."""
    from safetensors import safe_open

    wanted = {name for theirs, _ in hf_names(a).values() for name in theirs}
    found: dict[str, Any] = {}
    for file in weight_files(folder_files(Path(folder), deep=False)):
        with safe_open(Path(folder) / file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in wanted & set(opened.keys())}
    return found


def stored_quantized(folder: Path) -> tuple[dict[str, Runs], quantized.Quantization]:
    """The stored tensors of a quantised directory and how they are quantised; see `dequantized`."""
    files = folder_files(Path(folder), deep=False)
    quantization = quantization_of(files)
    if quantization is None:
        raise CheckpointError(f"{folder} is not quantised: its config.json has no {quantized.CONFIG_KEY}")
    return _stored(files), quantization


def tokenizer(files: Files) -> tokenizers.Tokenizer | None:
    """The tokenizer's files."""
    return tokenizers.in_folder(files)


def weight_files(files: Files) -> list[str]:
    """Names of the files with weights: one, or else those that the index names; so transformers looks for them.

    Raises:
        CheckpointError: there are none, or the index is damaged.
    """
    if SINGLE in files:
        return [SINGLE]
    if INDEX not in files:
        found = [name for name in files.names() if name.endswith((".bin", ".safetensors", ".pth"))]
        hint = f"; there are {', '.join(found[:4])}" if found else ""
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
    found: dict[str, Runs] = {}
    for name in names:
        found |= safetensors_file.read(files[name])
    missing = sorted(_weight_map(files).keys() - found.keys()) if names != [SINGLE] else []
    if missing:
        raise CheckpointError(f"{files.where}: the index names {', '.join(missing[:6])}, which no shard holds")
    return found


def _canonical(stored: Mapping[str, Lazy], a: Architecture, where: Path) -> dict[str, Lazy]:
    """Tensors by canonical name; raises CheckpointError naming what is missing or left over."""
    left = {name: tensor for name, tensor in stored.items() if not name.endswith(BUFFERS)}
    if a.num_layers > len(left):
        raise CheckpointError(
            f"{where} has {len(left)} tensors, too few for the {a.num_layers} layers of its config.json"
        )
    if a.share_embeddings_and_output_weights:
        _check_tied(left.pop(OUTER[OUTPUT], None), left.get(OUTER[EMBEDDING]), where)
    found: dict[str, Lazy] = {}
    problems = []
    for name, (theirs, shape) in hf_names(a).items():
        missing = [part for part in theirs if part not in left]
        if missing:
            problems.append(f"missing {', '.join(missing)}")
            continue
        parts = [left.pop(part) for part in theirs]
        wrong = _wrong_shapes(theirs, parts, shape, a)
        if wrong:
            problems += wrong
        else:
            found[name] = _fuse(name, parts, a)
    problems += [f"left over {name}" for name in sorted(left)]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(
            f"{where} does not hold the weights that its config.json describes: {'; '.join(problems[:6])}{more}"
        )
    return found


def _check_tied(output: Lazy | None, embedding: Lazy | None, where: Path) -> None:
    """Raises CheckpointError where an output layer is stored that is not the embedding, to which it is tied."""
    if output is not None and embedding is not None and not same_bits(output, embedding):
        raise CheckpointError(
            f"{where}: {OUTER[OUTPUT]} differs from {OUTER[EMBEDDING]}, and tie_word_embeddings makes them one, so "
            "that its values would be lost: state tie_word_embeddings=false in config.json if they are the model's, or "
            "take the tensor out"
        )


def hf_names(a: Architecture) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Canonical name -> (Hugging Face names, canonical shape), in the order of a forward pass."""
    family = FAMILIES[a.family]
    before, after = outer_shapes(a)
    found = {name: ((OUTER[name],), shape) for name, shape in before.items()}
    for number in range(a.num_layers):
        for name, shape in layer_shapes(a).items():
            theirs = tuple(f"{HF_LAYERS}{number}.{part}" for part in layer_names(family, name))
            found[f"{LAYERS}{number}.{name}"] = (theirs, shape)
    return found | {name: ((OUTER[name],), shape) for name, shape in after.items()}


def _part_rows(name: str, parts: int, shape: tuple[int, ...], a: Architecture) -> list[int]:
    """Rows of each Hugging Face tensor of a canonical one."""
    if parts == 3:
        groups = a.num_query_groups * a.kv_channels
        return [a.num_attention_heads * a.kv_channels, groups, groups]
    return [shape[0] // parts] * parts


def _wrong_shapes(names: tuple[str, ...], parts: list[Lazy], shape: tuple[int, ...], a: Architecture) -> list[str]:
    found = []
    for name, part, rows in zip(names, parts, _part_rows(names[0], len(parts), shape, a)):
        if part.shape != (rows, *shape[1:]):
            found.append(f"{name} is {part.shape}, config.json makes it {(rows, *shape[1:])}")
    if len({part.dtype for part in parts}) > 1:
        found.append(f"{', '.join(names)} have different dtypes")
    return found


def _fuse(name: str, parts: list[Any], a: Architecture) -> Lazy:
    """One canonical tensor from its Hugging Face parts: only the order of rows changes."""
    if len(parts) < 3:
        return _below(parts)
    query, key, value = parts
    size, per_group = a.kv_channels, a.num_attention_heads // a.num_query_groups * a.kv_channels
    rows = []
    for group in range(a.num_query_groups):
        rows.append(query.rows(group * per_group, (group + 1) * per_group))
        rows += [part.rows(group * size, (group + 1) * size) for part in (key, value)]
    return _below(rows)


def _below(parts: list[Any]) -> Lazy:
    """Tensors one below the other: as runs of bytes where they are such."""
    return concatenate(parts) if all(isinstance(part, Runs) for part in parts) else Joined(tuple(parts))


class _LastRead:
    """The bytes of the tensor that was read last; its parts are handed out one after the other."""

    def __init__(self) -> None:
        self.name, self.data = "", bytearray()

    def bytes_of(self, name: str, tensor: Lazy) -> memoryview:
        if self.name != name:
            self.name = ""
            if len(self.data) < tensor.nbytes:
                self.data = bytearray(tensor.nbytes)
            tensor.read_into(memoryview(self.data)[: tensor.nbytes])
            self.name = name
        return memoryview(self.data)[: tensor.nbytes]


@dataclasses.dataclass(frozen=True)
class _RowsOf(Lazy):
    """Rows of a canonical tensor: (first, last) ranges, the last not included."""

    shape: tuple[int, ...]
    dtype: str
    ranges: list[tuple[int, int]]
    name: str
    whole: Lazy
    last_read: _LastRead

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        data = self.last_read.bytes_of(self.name, self.whole)
        for first, last in self.ranges:
            for start in range(first * self.row_bytes, last * self.row_bytes, len(buffer)):
                yield data[start : min(start + len(buffer), last * self.row_bytes)]


def part_ranges(a: Architecture, parts: int, rows: int) -> list[list[tuple[int, int]]]:
    """Rows of each Hugging Face part in the canonical tensor: halves, or query, key and value by group."""
    if parts == 2:
        return [[(0, rows // 2)], [(rows // 2, rows)]]
    size, queries = a.kv_channels, a.num_attention_heads // a.num_query_groups * a.kv_channels
    starts = [group * (queries + 2 * size) for group in range(a.num_query_groups)]
    return [
        [(start, start + queries) for start in starts],
        [(start + queries, start + queries + size) for start in starts],
        [(start + queries + size, start + queries + 2 * size) for start in starts],
    ]


def export_tensors(tensors: Mapping[str, Lazy], a: Architecture) -> dict[str, Lazy]:
    """Hugging Face name -> tensor; the vocabulary without its padding."""
    last_read, found = _LastRead(), {}
    for name, (theirs, shape) in hf_names(a).items():
        tensor: Lazy = tensors[name]
        if name in (EMBEDDING, OUTPUT) and a.vocab_padding:
            tensor = Resized(tensor, a.vocab_size - a.vocab_padding)
        if len(theirs) == 1:
            found[theirs[0]] = tensor
            continue
        for part, ranges in zip(theirs, part_ranges(a, len(theirs), shape[0])):
            rows = sum(last - first for first, last in ranges)
            found[part] = _RowsOf((rows, *shape[1:]), tensor.dtype, ranges, name, tensor, last_read)
    return found


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


def write(
    folder: Path,
    architecture: Architecture,
    tensors: Mapping[str, Lazy],
    tokenizer: tokenizers.Tokenizer | None,
    generation: Mapping[str, Any],
    shard_bytes: int,
) -> None:
    """Writes config.json, generation_config.json, tokenizer and weights into `folder`.

    Special tokens that `generation` does not name are the tokenizer's.

    Raises:
        CheckpointError: transformers has no class that computes what this architecture does, or the tokenizer's files
            do not go with it.
    """
    stated = settings_of_generation.completed(
        generation, tokenizer, architecture.vocab_size - architecture.vocab_padding
    )
    config = write_config(architecture, next(iter(tensors.values())).dtype, stated)
    exported = export_tensors(tensors, architecture)
    folder.mkdir(parents=True, exist_ok=True)
    _dump(folder / CONFIG, config)
    own = {} if generation else {"_from_model_config": True}
    _dump(folder / settings_of_generation.FILE, own | stated)
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
