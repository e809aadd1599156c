"""Canonical tensors and those of a Hugging Face directory: only names and the order of rows differ."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats.huggingface.families import FAMILIES, OUTER, layer_names
from nemo_minitron.checkpoints.names import EMBEDDING, LAYERS, OUTPUT, layer_shapes, outer_shapes
from nemo_minitron.checkpoints.tensors import Joined, Lazy, Resized, Runs, concatenate, same_bits
from nemo_minitron.errors import CheckpointError

HF_LAYERS = "model.layers."
#: Buffers that older checkpoints carry.
BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def import_tensors(stored: Mapping[str, Lazy], a: Architecture, where: Path) -> dict[str, Lazy]:
    """Tensors by canonical name; raises CheckpointError naming what is missing or left over."""
    left = {name: tensor for name, tensor in stored.items() if not name.endswith(BUFFERS)}
    if a.num_layers > len(left):
        raise CheckpointError(
            f"{where} has {len(left)} tensors, too few for the {a.num_layers} layers of its config.json"
        )
    if a.share_embeddings_and_output_weights:
        _check_tied(left.pop(OUTER[OUTPUT], None), left.get(OUTER[EMBEDDING]), where)
    tensors: dict[str, Lazy] = {}
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
            tensors[name] = _fuse(name, parts, a)
    problems += [f"left over {name}" for name in sorted(left)]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(
            f"{where} does not hold the weights that its config.json describes: {'; '.join(problems[:6])}{more}"
        )
    return tensors


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
    names: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    names |= {name: ((OUTER[name],), shape) for name, shape in before.items()}
    for number in range(a.num_layers):
        for name, shape in layer_shapes(a).items():
            theirs = tuple(f"{HF_LAYERS}{number}.{part}" for part in layer_names(family, name))
            names[f"{LAYERS}{number}.{name}"] = (theirs, shape)
    return names | {name: ((OUTER[name],), shape) for name, shape in after.items()}


def _part_rows(name: str, parts: int, shape: tuple[int, ...], a: Architecture) -> list[int]:
    """Rows of each Hugging Face tensor of a canonical one."""
    if parts == 3:
        groups = a.num_query_groups * a.kv_channels
        return [a.num_attention_heads * a.kv_channels, groups, groups]
    return [shape[0] // parts] * parts


def _wrong_shapes(names: tuple[str, ...], parts: list[Lazy], shape: tuple[int, ...], a: Architecture) -> list[str]:
    problems = []
    for name, part, rows in zip(names, parts, _part_rows(names[0], len(parts), shape, a)):
        if part.shape != (rows, *shape[1:]):
            problems.append(f"{name} is {part.shape}, config.json makes it {(rows, *shape[1:])}")
    if len({part.dtype for part in parts}) > 1:
        problems.append(f"{', '.join(names)} have different dtypes")
    return problems


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
    last_read, exported = _LastRead(), {}
    for name, (theirs, shape) in hf_names(a).items():
        tensor: Lazy = tensors[name]
        if name in (EMBEDDING, OUTPUT) and a.vocab_padding:
            tensor = Resized(tensor, a.vocab_size - a.vocab_padding)
        if len(theirs) == 1:
            exported[theirs[0]] = tensor
            continue
        for part, ranges in zip(theirs, part_ranges(a, len(theirs), shape[0])):
            rows = sum(last - first for first, last in ranges)
            exported[part] = _RowsOf((rows, *shape[1:]), tensor.dtype, ranges, name, tensor, last_read)
    return exported
