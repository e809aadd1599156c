"""The compensated cut as a transform of tensors: each is changed when it is read, and no model is loaded.

Legend: h hidden, f FFN, n heads, g query groups, d head size, v vocabulary rows; ' of the student.

With P [h, h'] the directions of the stream that stay (arithmetic.stream_basis; with tied embeddings made of one
rotation a group of channels of like final gain, arithmetic.gain_groups; the identity where hidden_size stays), G a
norm's gain and r its root mean square, D the map that stands in for a dropped block (zero but before one), X_f and X_n
the columns' maps::

    embedding    [v, h']    E P
    reads        [k, h']    W diag(G / r) M    qkv, fc1, output layer; M: arithmetic.reader_map
    attention    [h', n'd]  P^T W X_n
    MLP          [h', f']   P^T (I + D)^T W X_f
    norms        [h']       g r                one number a norm (g: arithmetic.norm_gain)
    q, k norms   [d]        as they are        each head's own channels, which nothing rotates or drops

Rows of qkv and fc1 are those of the heads and neurons that stay. What is done to the rows of a matrix and what to its
columns commutes, so the order of the parts does not matter: each refits to the teacher's own activations, which the
others are there to keep.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PruningPlan
from nemo_minitron.checkpoints.names import EMBEDDING, LAYERS, OUTPUT, QK_NORMS
from nemo_minitron.checkpoints.tensors import ByRows, Computed, Lazy
from nemo_minitron.pruning import arithmetic
from nemo_minitron.pruning.cut import Kept, layer_indices

if TYPE_CHECKING:
    from torch import Tensor

FINAL = "decoder.final_layernorm"
INPUT_NORM, MLP_NORM = "self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How the parts that are refitted are.

    Attributes:
        ridge: lambda over the mean of the diagonal of what is inverted.
        refit_readers: whether the matrices that read the stream are.
        gain_tolerance: how far final gains that a rotation mixes may lie from each other, with tied embeddings
            (arithmetic.gain_groups).
        final_norm_weight: weight of the final norm's moments among those that choose the directions; the others have 1.
        merge_heads: merge the residual of dropped heads into the queries instead of refitting linear_proj.
        rotate: rotate the stream even where no channel goes, which changes nothing but rounding.
    """

    ridge: float = 1e-3
    refit_readers: bool = True
    gain_tolerance: float = 0.1
    final_norm_weight: float = 20.0
    merge_heads: bool = False
    rotate: bool = False


class ColumnMaps:
    """Maps of columns (arithmetic.columns_map) by matrix and number of columns that stay.

    Cuts that choose by the same costs keep the same of the same number. Older ones are forgotten where all of them
    would take more than `limit` bytes.
    """

    def __init__(self, limit: int = 0):
        self.limit, self.known = limit, dict[tuple[str, int], "Tensor"]()

    def of(self, name: str, moments: Tensor, keep: Tensor, ridge: float) -> Tensor:
        """The map of the matrix that reads what `name` has the moments of."""
        key = (name, len(keep))
        if key in self.known:
            return self.known[key]
        made = arithmetic.columns_map(moments, keep, ridge)
        if self.limit:
            self.known[key] = made
            while sum(one.nbytes for one in self.known.values()) > self.limit:
                self.known.pop(next(iter(self.known)))
        return made


class CompensatedCut:
    """One cut of one teacher.

    Args:
        tensors: the teacher's, by canonical name.
        kept: neurons and heads that stay; `hidden` is not looked at.
        moments: the teacher's second moments (ImportanceScores.moments); those of what is not cut may be missing.
        folds: layer before a dropped block (1-based, as text) -> D [h, h].
        maps: columns' maps of other cuts of this teacher, and where this one's go.
    """

    def __init__(
        self,
        tensors: Mapping[str, Lazy],
        plan: PruningPlan,
        kept: Kept,
        moments: Mapping[str, Tensor],
        folds: Mapping[str, Tensor],
        settings: Settings,
        maps: ColumnMaps | None = None,
    ):
        self.maps = maps or ColumnMaps()
        self.tensors, self.kept, self.moments, self.folds, self.settings = tensors, kept, moments, folds, settings
        self.teacher, self.student = Architecture.from_dict(plan.teacher), Architecture.from_dict(plan.student)
        dropped = set(plan.drop_layers)
        self.precise = next(iter(tensors.values())).dtype == "float32"
        self.stay = [number for number in range(self.teacher.num_layers) if number + 1 not in dropped]
        self._scales: dict[int, float] = {}
        self._sizes: dict[int, float] = {}
        narrower = self.student.hidden_size != self.teacher.hidden_size
        self.basis = self._basis() if narrower or self.unties or settings.rotate else None

    @property
    def unties(self) -> bool:
        """Whether the student gets an output matrix that the teacher has not."""
        return self.teacher.share_embeddings_and_output_weights and not self.student.share_embeddings_and_output_weights

    def norms(self) -> list[int]:
        """Numbers of the norms that stay, as in ImportanceScores.moments."""
        return [2 * layer + part for layer in self.stay for part in (0, 1)] + [2 * self.teacher.num_layers]

    @property
    def tied(self) -> bool:
        """Whether the student's output matrix is its embedding."""
        return self.student.share_embeddings_and_output_weights

    @property
    def centred(self) -> bool:
        return self.teacher.normalization == "LayerNorm"

    @property
    def directions(self) -> Tensor:
        """The basis where there is one, which is wherever it is asked for."""
        assert self.basis is not None
        return self.basis

    def _basis(self) -> Tensor:
        norms = self.norms()
        weights = [1.0] * (len(norms) - 1) + [self.settings.final_norm_weight]
        sums = [w * self.moments[f"stream.{norm}"].double() for w, norm in zip(weights, norms)]
        pooled = functools.reduce(operator.add, sums) / sum(weights)
        groups = self.groups if self.tied and not self.centred else None
        return arithmetic.stream_basis(pooled, self.student.hidden_size, self.centred, groups)

    @functools.cached_property
    def groups(self) -> list[Tensor]:
        """The channels that a rotation may mix where the output matrix is the embedding."""
        return arithmetic.gain_groups(self._gain(2 * self.teacher.num_layers), self.settings.gain_tolerance)

    def kept_energy(self) -> float:
        """Share of the normalised stream's energy that lies in the directions that stay, mean over the norms."""
        gains = [self._scale(norm) for norm in self.norms()]
        share = self.student.hidden_size / self.teacher.hidden_size
        return sum(gain**2 for gain in gains) / len(gains) * share

    def _scale(self, norm: int) -> float:
        """The student's gain of a norm."""
        if norm not in self._scales:
            self._scales[norm] = arithmetic.norm_gain(self.moments[f"stream.{norm}"], self.directions)
        return self._scales[norm]

    def summary(self) -> dict[str, Any]:
        """What was done, for the manifest."""
        heads = "cut with their residual merged into the queries" if self.settings.merge_heads else "cut, proj refitted"
        parts = {
            "hidden": "rotated, readers refitted" if self.basis is not None else None,
            "kept_energy": self.kept_energy() if self.basis is not None else None,
            "output_matrix": self._output_matrix(),
            "ffn": "cut, fc2 refitted" if self.kept.ffn is not None else None,
            "heads": heads if self.kept.heads is not None else None,
            "depth": [f"layer {layer} stands in" for layer in self.folds] or None,
            "ridge": self.settings.ridge,
        }
        return {name: value for name, value in parts.items() if value is not None}

    def _output_matrix(self) -> str | None:
        if self.unties:
            return "untied"
        if not self.tied or self.basis is None:
            return None
        if self.centred:
            return "tied: the final norm's gain is its best diagonal"
        return (
            f"tied: rotated within {len(self.groups)} groups of channels of like final gain, the largest of "
            f"{max(map(len, self.groups))} of {self.teacher.hidden_size}"
        )

    def cut(self) -> dict[str, Lazy]:
        """The student's tensors by canonical name."""
        new_number = {old: new for new, old in enumerate(self.stay)}
        tensors: dict[str, Lazy] = {}
        for name, tensor in self.tensors.items():
            if not name.startswith(LAYERS):
                tensors[name] = self._outer(name, tensor)
                continue
            number, inner = name.removeprefix(LAYERS).split(".", 1)
            if int(number) in new_number:
                tensors[f"{LAYERS}{new_number[int(number)]}.{inner}"] = self._inner(inner, int(number), tensor)
        if self.unties:
            shape = (self.student.vocab_size, self.student.hidden_size)
            output = functools.partial(self._read, self.tensors[EMBEDDING], 2 * self.teacher.num_layers, None)
            tensors[OUTPUT] = ByRows(shape, self.tensors[EMBEDDING].dtype, output)
        return tensors

    def _outer(self, name: str, tensor: Lazy) -> Lazy:
        """Embedding, final norm, output layer."""
        last = 2 * self.teacher.num_layers
        if self.basis is None:
            return tensor
        if name == EMBEDDING:
            shape = (self.student.vocab_size, self.student.hidden_size)
            return ByRows(shape, tensor.dtype, lambda: (tensor.read(), self._times(self.directions)))
        if name == OUTPUT:
            return self._reader(tensor, last, None, tensor.shape[0])
        if self.tied and name.endswith("weight"):
            return _computed((self.student.hidden_size,), tensor.dtype, self._tied_gain)
        return self._norm(name, tensor, last, self.tensors.get(OUTPUT, self.tensors[EMBEDDING]), None)

    def _inner(self, inner: str, layer: int, tensor: Lazy) -> Lazy:
        """A tensor inside a layer that stays."""
        module, _, kind = inner.rpartition(".")
        rows = layer_indices("self_attention.linear_qkv.bias", layer, self.teacher, self.kept)[0]
        ffn_rows = layer_indices("mlp.linear_fc1.bias", layer, self.teacher, self.kept)[0]
        path = f"{LAYERS}{layer}."
        if "layer_norm_" in inner:
            first = inner.startswith(INPUT_NORM)
            reader = self.tensors[path + ("self_attention.linear_qkv.weight" if first else "mlp.linear_fc1.weight")]
            norm = 2 * layer + (0 if first else 1)
            return (
                tensor if self.basis is None else self._norm(inner, tensor, norm, reader, rows if first else ffn_rows)
            )
        if module in QK_NORMS:
            return tensor
        if module == "self_attention.linear_qkv":
            if self.kept.heads is not None and self.settings.merge_heads:
                tensor = self._merged(tensor, layer)
            if kind == "bias":
                return _taken(tensor, rows)
            return self._reader(tensor, 2 * layer, rows, self.student.qkv_rows())
        if module == "mlp.linear_fc1":
            if kind == "bias":
                return _taken(tensor, ffn_rows)
            size = self.student.ffn_hidden_size * (2 if self.student.gated_linear_unit else 1)
            return self._reader(tensor, 2 * layer + 1, ffn_rows, size)
        return self._writer(module, kind, layer, tensor)

    def _reader(self, tensor: Lazy, norm: int, rows: Tensor | None, size: int) -> Lazy:
        """A matrix that reads the stream."""
        if self.basis is None:
            return _taken(tensor, rows)
        shape = (size, self.student.hidden_size)
        return ByRows(shape, tensor.dtype, functools.partial(self._read, tensor, norm, rows))

    def _read(self, tensor: Lazy, norm: int, rows: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The rows that stay, and what makes the student's of them."""
        weight = tensor.read()
        return weight if rows is None else weight[rows], self._times(
            self._relative_gain(norm)[:, None] * self._map(norm)
        )

    def _times(self, matrix: Tensor) -> Callable[[Tensor], Tensor]:
        """Multiplication by `matrix` from the right, in float32 for teachers of 16 bits, else in float64."""
        matrix = self._working(matrix)
        return lambda rows: rows.to(matrix.dtype) @ matrix

    def _working(self, tensor: Tensor) -> Tensor:
        return tensor.double() if self.precise else tensor.float()

    def _map(self, norm: int) -> Tensor:
        """What a reader of this norm is multiplied by [h, h'].

        With LayerNorm no stream has a mean, so what readers make of one is free: it is what makes room for the bias.
        """
        matrix = self.directions
        if self.settings.refit_readers:
            matrix = arithmetic.reader_map(self.moments[f"stream.{norm}"], self.directions, self.settings.ridge)
        if self.centred:
            matrix = matrix + (self.teacher.hidden_size * self.student.hidden_size) ** -0.5
        return matrix

    def _gain(self, norm: int, kind: str = "weight") -> Tensor:
        """The teacher's gain (or bias) of a norm [h], float64."""
        if norm == 2 * self.teacher.num_layers:
            name = f"{FINAL}.{kind}"
        else:
            name = f"{LAYERS}{norm // 2}.{INPUT_NORM if norm % 2 == 0 else MLP_NORM}{kind}"
        value = self.tensors[name].read().double()
        return value + self._shift if kind == "weight" else value

    def _size(self, norm: int) -> float:
        """Root mean square of the teacher's gain of a norm.

        The student's norm keeps it, and its readers' weights stay as large as the teacher's: Adam's steps, which do not
        follow the size of weights, are then as large beside them.
        """
        if norm not in self._sizes:
            self._sizes[norm] = float(self._gain(norm).square().mean()) ** 0.5 or 1.0
        return self._sizes[norm]

    def _relative_gain(self, norm: int) -> Tensor:
        """The teacher's gain of a norm in units of its size [h], which readers take over."""
        return self._gain(norm) / self._size(norm)

    @property
    def _shift(self) -> float:
        """What checkpoints leave out of a norm's gain (layernorm1p)."""
        return 1.0 if self.teacher.layernorm_zero_centered_gamma else 0.0

    def _norm(self, name: str, tensor: Lazy, norm: int, reader: Lazy, rows: Tensor | None) -> Lazy:
        """A norm's gain, one number for all channels, or its bias."""
        import torch

        size = self.student.hidden_size

        def gain() -> Tensor:
            return torch.full((size,), self._scale(norm) * self._size(norm) - self._shift, dtype=torch.float64)

        def bias() -> Tensor:
            weight, made = self._read(reader, norm, rows)
            return arithmetic.input_bias(weight, self._gain(norm, "bias"), made(weight))

        return _computed((size,), tensor.dtype, bias if name.endswith("bias") else gain)

    def _tied_gain(self) -> Tensor:
        last = 2 * self.teacher.num_layers
        if self.centred:
            moments, embedding = self.moments[f"stream.{last}"], self.tensors[EMBEDDING].read()
            gain = arithmetic.tied_gain(embedding, self._gain(last), moments, self.directions)
        else:
            gain = arithmetic.grouped_gain(self._gain(last), self.directions)
        return gain * self._scale(last) - self._shift

    def _writer(self, module: str, kind: str, layer: int, tensor: Lazy) -> Lazy:
        """A matrix that writes to the stream, or its bias."""
        attention = module == "self_attention.linear_proj"
        indices = layer_indices(f"{module}.weight", layer, self.teacher, self.kept)[1]
        fold = None if attention or layer + 1 in self.stay else self.folds.get(str(layer + 1))
        if self.basis is None and fold is None and (indices is None or kind == "bias"):
            return tensor
        if attention:
            size = self.student.num_attention_heads * self.student.kv_channels
        else:
            size = self.student.ffn_hidden_size
        shape = (self.student.hidden_size,) if kind == "bias" else (self.student.hidden_size, size)
        return _computed(
            shape, tensor.dtype, functools.partial(self._written, tensor, kind, attention, layer, indices, fold)
        )

    def _written(
        self, tensor: Lazy, kind: str, attention: bool, layer: int, indices: Tensor | None, fold: Tensor | None
    ) -> Tensor:
        value = self._working(tensor.read())
        if indices is not None and kind == "weight":
            if attention and self.settings.merge_heads:
                value = value[:, indices]
            else:
                name = f"{'attention' if attention else 'ffn'}.{layer}"
                columns = self.maps.of(name, self.moments[name], indices, self.settings.ridge)
                value = value @ self._working(columns)
        if fold is not None:
            value = value + self._working(fold).T @ value
        return value if self.basis is None else self._working(self.directions).T @ value

    def _merged(self, tensor: Lazy, layer: int) -> Lazy:
        """linear_qkv (or its bias) with the residual of dropped heads in the queries of those that stay."""
        a = self.teacher
        per_group = a.num_attention_heads // a.num_query_groups
        assert self.kept.heads is not None and self.kept.ranking is not None
        kept = self.kept.heads[layer].view(a.num_query_groups, -1)  # [g, n'/g]
        rankings = self.kept.ranking[layer]  # [g, n/g]

        def read() -> Tensor:
            value = tensor.read().double()
            parts = value.view(a.num_query_groups, per_group + 2, a.kv_channels, -1).clone()
            for group in range(a.num_query_groups):
                ranking = rankings[group]
                stay = kept.shape[1]
                parts[group, ranking[:stay]] = arithmetic.merged_queries(parts[group, :per_group], ranking, stay)
            return parts.reshape(value.shape)

        return _computed(tensor.shape, tensor.dtype, read)


def _computed(shape: tuple[int, ...], dtype: str, function: Callable[[], Tensor]) -> Computed:
    """What `function` returns, in the teacher's precision."""
    import torch

    return Computed(tuple(shape), dtype, lambda: function().to(getattr(torch, dtype)))


def _taken(tensor: Lazy, rows: Tensor | None) -> Lazy:
    """The rows of a tensor that stay."""
    if rows is None:
        return tensor
    return Computed((len(rows), *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[rows])
