"""Canonical tensors and those of a GGUF file: names, the order of rows, and the precision of each."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats import parts
from nemo_minitron.checkpoints.formats.gguf import config
from nemo_minitron.checkpoints.formats.gguf.families import (
    ARCHITECTURES,
    GAINS,
    IN_TURNS,
    LAYERS,
    OUTER,
    GgufArchitecture,
    architecture_of,
)
from nemo_minitron.checkpoints.formats.gguf.header import FileTensor
from nemo_minitron.checkpoints.formats.gguf.numbers import (
    F16,
    F32,
    OF_DTYPE,
    Q8_0,
    InBlocks,
    InTurns,
    Kind,
    More,
    OfBytes,
    Requantised,
    Stored,
    fits,
)
from nemo_minitron.checkpoints.tensors import Cast, Lazy, Runs
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

SHOWN = 4
#: A tensor as it is written: name, type, shape, bytes.
Written = tuple[str, Kind, tuple[int, ...], Lazy]


def gguf_names(a: Architecture) -> parts.Names:
    """Canonical name -> (GGUF's names, canonical shape), in the order of a forward pass."""
    return parts.names_of(a, OUTER, LAYERS, ARCHITECTURES[architecture_of(a.family) or ""].layer)


def check_names(tensors: Mapping[str, FileTensor], entry: GgufArchitecture, name: str, source: Path) -> None:
    """Raises CheckpointError for tensors that no model of the architecture has."""
    stems = {part for theirs in entry.layer.values() for part in theirs}
    left = [
        known
        for known in tensors
        if known not in (*OUTER.values(), config.ROPE_FACTORS) and not _is_of_layer(known, stems)
    ]
    if left:
        more = ", ..." if len(left) > SHOWN else ""
        raise CheckpointError(
            f"{source} has tensors that no {name} model here has: {', '.join(text[:80] for text in left[:SHOWN])}{more}"
        )


def _is_of_layer(name: str, stems: set[str]) -> bool:
    """Whether it is `blk.NUMBER.` and one of the stems with `weight` or `bias`."""
    if not name.startswith(LAYERS):
        return False
    number, _, inner = name.removeprefix(LAYERS).partition(".")
    stem, dot, kind = inner.rpartition(".")
    return number.isdecimal() and stem + dot in stems and kind in ("weight", "bias")


def import_tensors(tensors: Mapping[str, FileTensor], a: Architecture, source: Path) -> dict[str, Lazy]:
    """Tensors by canonical name.

    A quantised model's are float32, in which what the blocks stand for is exact; so are those whose matrices are of
    several precisions. One-dimensional tensors, which llama.cpp keeps in float32 whatever the rest is, come in the
    precision of the matrices where they lose nothing by it: they are read to find out.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    stored = {name: tensor for name, tensor in tensors.items() if name != config.ROPE_FACTORS}
    vectors = {name for name, tensor in stored.items() if len(tensor.shape) == 1}
    packed = [name for name in vectors if stored[name].kind.dtype is None]
    if packed:
        raise CheckpointError(f"{source}: {packed[0]} has one dimension and is quantised, which llama.cpp never does")
    precisions = {stored[name].kind.dtype for name in stored.keys() - vectors}
    dtype = (precisions.pop() if len(precisions) == 1 else None) or "float32"

    def of(vector_dtype: str) -> dict[str, Lazy]:
        plain = {name: _as_numbers(tensor, a, vector_dtype if name in vectors else dtype)
                 for name, tensor in stored.items()}  # fmt: skip
        return parts.assembled(plain, gguf_names(a), a, source, "metadata")

    wide = of("float32")  # which checks every shape
    if dtype == "float32" or not all(fits(values(wide[name]), dtype) for name in wide if len(wide[name].shape) == 1):
        return wide
    return of(dtype)


def _as_numbers(tensor: FileTensor, a: Architecture, dtype: str) -> Lazy:
    """A tensor of a file as plain numbers, rows in the order that everybody else has them in."""
    head, less = _head(tensor.name, a), 1.0 if _is_gain(tensor.name, a) else 0.0
    if tensor.kind.dtype == dtype and not head and not less:
        return Runs(tensor.shape, dtype, (tensor.data,))
    return Stored(tensor.shape, dtype, tensor.data, tensor.kind, head, less)


def _head(name: str, a: Architecture) -> int:
    """Rows of a head whose halves take turns in a file; 0 where they do not."""
    inner = f"{name.split('.')[-2]}."
    return a.kv_channels if inner in IN_TURNS and ARCHITECTURES[architecture_of(a.family) or ""].in_turns else 0


def _is_gain(name: str, a: Architecture) -> bool:
    """Whether a file holds the gain of a norm, of which the model has the distance from 1."""
    return a.layernorm_zero_centered_gamma and name.endswith(GAINS)


def values(tensor: Lazy) -> "np.ndarray":
    """A small float32 tensor, read."""
    import numpy as np

    data = bytearray(tensor.nbytes)
    tensor.read_into(memoryview(data))
    return np.frombuffer(data, np.float32)


def written(tensors: Mapping[str, Lazy], a: Architecture, wanted: Kind | None) -> list[Written]:
    """The tensors of a file, in the order of a forward pass.

    Args:
        tensors: by canonical name.
        wanted: type of the matrices; None: that of each.
    """
    made: list[Written] = []
    if a.rope_scaling is not None:
        factors = config.rope_factors(a.rope_scaling, a.rotary_base, a.kv_channels)
        made.append((config.ROPE_FACTORS, F32, factors.shape, OfBytes(factors.tobytes())))
    for name, tensor in parts.taken_apart(tensors, gguf_names(a), a).items():
        ordered = InTurns(tensor, head) if (head := _head(name, a)) else tensor
        if len(tensor.shape) == 1:
            kept: Lazy = More(ordered, 1.0) if _is_gain(name, a) else _cast(ordered, "float32")
            made.append((name, F32, tensor.shape, kept))
            continue
        kind = kind_for(tensor, wanted)
        data = InBlocks(ordered) if kind is Q8_0 else _cast(ordered, str(kind.dtype))
        made.append((name, kind, tensor.shape, data))
    return made


def kept(tensors: Mapping[str, Lazy], a: Architecture, wanted: Kind | None) -> dict[str, Lazy]:
    """Canonical tensors as they are once a file holds them."""
    names, held = gguf_names(a), {}
    for name, tensor in tensors.items():
        if len(tensor.shape) == 1:
            gain = _is_gain(names[name][0][0], a)
            held[name] = More(More(tensor, 1.0), -1.0) if gain else tensor
        elif (kind := kind_for(tensor, wanted)) is Q8_0:
            held[name] = Requantised(tensor)
        else:
            held[name] = _cast(tensor, str(kind.dtype))
    return held


def kind_for(tensor: Lazy, wanted: Kind | None) -> Kind:
    """The type that a matrix is stored in: the one that is wanted, or F16 where its rows have no whole blocks of it."""
    kind = wanted or OF_DTYPE.get(tensor.dtype)
    if kind is None:
        raise CheckpointError(f"a tensor of {tensor.dtype} has no type in GGUF here; dtype=bf16 converts the values")
    return F16 if tensor.shape[1] % kind.block else kind


def _cast(tensor: Lazy, dtype: str) -> Lazy:
    return tensor if tensor.dtype == dtype else Cast(tensor, dtype)


def rows_without_blocks(a: Architecture, kind: Kind) -> list[int]:
    """Lengths of matrices' rows that are no multiple of the block of `kind`."""
    lengths = {shape[1] for _, shape in gguf_names(a).values() if len(shape) == 2}
    return sorted(length for length in lengths if length % kind.block)
