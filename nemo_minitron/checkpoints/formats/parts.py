"""Tensors that other engines keep in parts: query, key and value apart, the gate apart from what it gates.

A canonical tensor is one of theirs, or several: linear_qkv has query, key and value interleaved by group, and a gated
linear_fc1 has its gate above. Only names and the order of rows differ.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.names import EMBEDDING, LAYERS, OUTPUT, layer_shapes, outer_shapes
from nemo_minitron.checkpoints.tensors import Joined, Lazy, Resized, Runs, concatenate
from nemo_minitron.errors import CheckpointError

#: Canonical name -> (names of its parts, canonical shape), in the order of a forward pass.
Names = Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]
SHOWN = 6


def names_of(a: Architecture, outer: Mapping[str, str], layers: str, layer: Mapping[str, tuple[str, ...]]) -> Names:
    """The names of a model.

    Args:
        outer: canonical name -> theirs, of what is in no layer.
        layers: what their names of a layer begin with, before its number.
        layer: how a canonical name inside a layer begins -> theirs of each part; the longest that fits counts.
    """
    before, after = outer_shapes(a)
    names: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    names |= {name: ((outer[name],), shape) for name, shape in before.items()}
    for number in range(a.num_layers):
        for name, shape in layer_shapes(a).items():
            theirs = tuple(f"{layers}{number}.{part}" for part in _layer_names(layer, name))
            names[f"{LAYERS}{number}.{name}"] = (theirs, shape)
    return names | {name: ((outer[name],), shape) for name, shape in after.items()}


def _layer_names(layer: Mapping[str, tuple[str, ...]], name: str) -> tuple[str, ...]:
    """Their names inside a layer of the canonical `name` inside a layer, such as ``mlp.linear_fc1.weight``."""
    stem = max((stem for stem in layer if name.startswith(stem)), key=len)
    return tuple(f"{theirs}{name[len(stem) :]}" for theirs in layer[stem])


def assembled(
    stored: Mapping[str, Lazy], names: Names, a: Architecture, where: Path, described: str
) -> dict[str, Lazy]:
    """Tensors by canonical name.

    Args:
        described: what describes the model, for messages.

    Raises:
        CheckpointError: it names what is missing, left over or of another shape.
    """
    left, tensors, problems = dict(stored), {}, []
    for name, (theirs, shape) in names.items():
        missing = [part for part in theirs if part not in left]
        if missing:
            problems.append(f"missing {', '.join(missing)}")
            continue
        parts = [left.pop(part) for part in theirs]
        wrong = _wrong_shapes(theirs, parts, shape, a, described)
        if wrong:
            problems += wrong
        else:
            tensors[name] = _fuse(parts, a)
    problems += [f"left over {name}" for name in sorted(left)]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{where} does not hold the weights that its {described} describes: {'; '.join(problems[:SHOWN])}{more}"
        )
    return tensors


def taken_apart(tensors: Mapping[str, Lazy], names: Names, a: Architecture) -> dict[str, Lazy]:
    """Name of each part -> tensor; the vocabulary without its padding."""
    last_read, exported = _LastRead(), {}
    for name, (theirs, shape) in names.items():
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


def _part_rows(parts: int, shape: tuple[int, ...], a: Architecture) -> list[int]:
    """Rows of each part of a canonical tensor."""
    if parts == 3:
        groups = a.num_query_groups * a.kv_channels
        return [a.num_attention_heads * a.kv_channels, groups, groups]
    return [shape[0] // parts] * parts


def _wrong_shapes(
    names: tuple[str, ...], parts: list[Lazy], shape: tuple[int, ...], a: Architecture, described: str
) -> list[str]:
    problems = []
    for name, part, rows in zip(names, parts, _part_rows(len(parts), shape, a)):
        if part.shape != (rows, *shape[1:]):
            problems.append(f"{name} is {part.shape}, {described} makes it {(rows, *shape[1:])}")
    if len({part.dtype for part in parts}) > 1:
        problems.append(f"{', '.join(names)} have different dtypes")
    return problems


def _fuse(parts: list[Any], a: Architecture) -> Lazy:
    """One canonical tensor from its parts: only the order of rows changes."""
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
        if isinstance(self.whole, Runs):  # rows are where they are: nothing has to be read for the other parts
            for first, last in self.ranges:
                yield from self.whole.rows(first, last).blocks(buffer)
            return
        data = self.last_read.bytes_of(self.name, self.whole)
        for first, last in self.ranges:
            for start in range(first * self.row_bytes, last * self.row_bytes, len(buffer)):
                yield data[start : min(start + len(buffer), last * self.row_bytes)]


def part_ranges(a: Architecture, parts: int, rows: int) -> list[list[tuple[int, int]]]:
    """Rows of each part in the canonical tensor: halves, or query, key and value by group."""
    if parts == 2:
        return [[(0, rows // 2)], [(rows // 2, rows)]]
    size, queries = a.kv_channels, a.num_attention_heads // a.num_query_groups * a.kv_channels
    starts = [group * (queries + 2 * size) for group in range(a.num_query_groups)]
    return [
        [(start, start + queries) for start in starts],
        [(start + queries, start + queries + size) for start in starts],
        [(start + queries + size, start + queries + 2 * size) for start in starts],
    ]
