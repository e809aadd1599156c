"""The cut as a transform of tensors: what is kept, and where; no model is loaded.

Legend: h hidden, f FFN, n heads, g query groups, d head size, l layers.

Indices are in ModelOpt's order (mcore_minitron): the most important first, heads within their query group. For the same
scores the result equals ModelOpt's own, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import ImportanceScores, PruningPlan
from nemo_minitron.checkpoints.names import LAYERS, QK_NORMS
from nemo_minitron.checkpoints.tensors import ByRows, Lazy

if TYPE_CHECKING:
    from torch import Tensor

    #: A layer of the teacher (from 0) -> its tensor.
    ByLayer = Sequence[Tensor] | Mapping[int, Tensor]


@dataclasses.dataclass(frozen=True)
class Kept:
    """What stays, as indices into the teacher; None: all of it.

    Attributes:
        hidden: channels of the residual stream [h'].
        ffn: FFN neurons of each layer that stays [l, f'].
        heads: attention heads of each layer that stays, group by group [l, n'].
        ranking: all heads of each query group, numbered within it, the most important first [l, g, n/g].
    """

    hidden: Tensor | None = None
    ffn: ByLayer | None = None
    heads: ByLayer | None = None
    ranking: ByLayer | None = None


def choose(scores: ImportanceScores | None, architecture: Architecture, width: Mapping[str, int]) -> Kept:
    """What the scores keep of each dimension that `width` narrows; without scores, as for a cut of layers, all.

    Importance (arXiv 2407.14679, section 2.2): L2 over samples of the mean magnitude over the sequence; of a channel,
    summed over all norms; of a head, L2 over its channels.
    """
    if scores is None:
        return Kept()
    kept: dict[str, Any] = {}
    if "hidden_size" in width:
        importance = scores.hidden.pow(0.5).sum(dim=0)  # [h]
        kept["hidden"] = importance.argsort(descending=True)[: width["hidden_size"]]
    if "ffn_hidden_size" in width:
        kept["ffn"] = [layer.pow(0.5).argsort(descending=True)[: width["ffn_hidden_size"]] for layer in scores.ffn]
    if "num_attention_heads" in width:
        per_group = width["num_attention_heads"] // architecture.num_query_groups
        kept["ranking"] = [head_ranking(layer, architecture) for layer in scores.heads]
        kept["heads"] = [best_heads(ranking, architecture, per_group) for ranking in kept["ranking"]]
    return Kept(**kept)


def head_ranking(scores: Tensor, a: Architecture) -> Tensor:
    """The heads of each query group by importance [g, n/g], from scores of their channels [n*d]."""
    import torch

    heads = torch.linalg.vector_norm(scores.pow(0.5).view(a.num_attention_heads, a.kv_channels), ord=2, dim=1)  # [n]
    return heads.view(a.num_query_groups, -1).argsort(dim=1, descending=True)


def best_heads(ranking: Tensor, a: Architecture, per_group: int) -> Tensor:
    """The best `per_group` heads of each query group [g * per_group], numbered over all."""
    import torch

    first = torch.arange(0, a.num_attention_heads, a.num_attention_heads // a.num_query_groups)
    return (ranking[:, :per_group] + first[:, None]).flatten()


def cut(tensors: Mapping[str, Lazy], plan: PruningPlan, kept: Kept) -> dict[str, Lazy]:
    """The student's tensors by canonical name, each cut when it is read; what is not cut is passed through."""
    teacher = Architecture.from_dict(plan.teacher)
    stay = [number for number in range(teacher.num_layers) if number + 1 not in plan.drop_layers]
    new_number = {old: new for new, old in enumerate(stay)}
    student = {}
    for name, tensor in tensors.items():
        if not name.startswith(LAYERS):
            student[name] = _narrowed(tensor, outer_indices(name, kept))
            continue
        number, inner = name.removeprefix(LAYERS).split(".", 1)
        if int(number) in new_number:
            indices = layer_indices(inner, int(number), teacher, kept)
            student[f"{LAYERS}{new_number[int(number)]}.{inner}"] = _narrowed(tensor, indices)
    return student


def outer_indices(name: str, kept: Kept) -> tuple[Tensor | None, ...]:
    """Rows and columns to keep of a tensor outside the layers: embedding and output [v, h], final norm [h]."""
    return (kept.hidden,) if "layernorm" in name else (None, kept.hidden)


def layer_indices(name: str, layer: int, teacher: Architecture, kept: Kept) -> tuple[Tensor | None, ...]:
    """Rows and columns to keep of a tensor inside a layer; None: all."""
    ffn = None if kept.ffn is None else kept.ffn[layer]
    heads = None if kept.heads is None else kept.heads[layer]
    if "layer_norm_" in name:
        return (kept.hidden,)
    module, _, kind = name.rpartition(".")
    if module in QK_NORMS:  # of head size, shared by all heads
        return (None,)
    rows, columns = {
        "self_attention.linear_qkv": lambda: (_qkv_rows(heads, teacher), kept.hidden),
        "self_attention.linear_proj": lambda: (kept.hidden, _channels(heads, teacher.kv_channels)),
        "mlp.linear_fc1": lambda: (_fc1_rows(ffn, teacher), kept.hidden),
        "mlp.linear_fc2": lambda: (kept.hidden, ffn),
    }[module]()
    return (rows,) if kind == "bias" else (rows, columns)


def _channels(heads: Tensor | None, size: int) -> Tensor | None:
    """The channels [n' * d] of heads [n']."""
    if heads is None:
        return None
    import torch

    return (heads[:, None] * size + torch.arange(size)).flatten()


def _qkv_rows(heads: Tensor | None, a: Architecture) -> Tensor | None:
    """Rows of linear_qkv: for each group its heads that stay, its key, its value."""
    if heads is None:
        return None
    import torch

    per_group = a.num_attention_heads // a.num_query_groups
    queries = heads.view(a.num_query_groups, -1)
    group = torch.arange(a.num_query_groups)[:, None]
    in_qkv = queries - group * per_group + group * (per_group + 2)
    key_value = group * (per_group + 2) + per_group + torch.arange(2)
    return _channels(torch.cat([in_qkv, key_value], dim=1).flatten(), a.kv_channels)


def _fc1_rows(ffn: Tensor | None, a: Architecture) -> Tensor | None:
    """Rows of linear_fc1: the neurons' gates above, their up projections below."""
    if ffn is None or not a.gated_linear_unit:
        return ffn
    import torch

    return torch.cat([ffn, ffn + a.ffn_hidden_size])


def taken(value: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Rows or columns of a tensor; by NumPy, whose one thread leaves the other cores to the checksums and the disk."""
    import numpy as np
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return torch.from_numpy(np.take(value.view(whole).numpy(), indices.numpy(), axis=axis)).view(value.dtype)


def _narrowed(tensor: Lazy, indices: tuple[Tensor | None, ...]) -> Lazy:
    """`tensor` with only the chosen rows and columns, cut when it is read."""
    if all(index is None for index in indices):
        return tensor
    shape = tuple(size if index is None else len(index) for size, index in zip(tensor.shape, indices))
    rows, columns = indices if len(indices) == 2 else (indices[0], None)

    def prepare() -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        value = tensor.read()
        chosen = value if rows is None else taken(value, rows, 0)
        return chosen, lambda part: part if columns is None else taken(part, columns, 1)

    return ByRows(shape, tensor.dtype, prepare)
