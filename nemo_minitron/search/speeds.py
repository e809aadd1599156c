"""Seconds a token of every shape of a space, from layers that are measured once.

    t(l, h, f, a) = l (attention(h, a) + mlp(h, f) + norms(h)) + outer(h)

Each h with each f, and each h with each a, is in one layer that is measured; norms and outer are medians over those.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import write_json
from nemo_minitron.config import SearchSettings
from nemo_minitron.evaluation.layers import PartTimes
from nemo_minitron.jobs.progress import Progress
from nemo_minitron.launch.ranks import first_makes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nemo_minitron.megatron.layout import Layout
    from nemo_minitron.search.space import Space

KINDS = ("prefill", "decode")
#: Rounds of each layer, and layers between two lines of progress.
ROUNDS, LINES = 3, 20
#: Tokens of a prompt where none are given, at most.
LENGTH = 1024
#: Measures a layer: its shape -> times by kind (evaluation.layers.time_parts).
Measure = Callable[[Architecture], Mapping[str, PartTimes]]


@dataclasses.dataclass(frozen=True)
class SpeedTable:
    """Times of the parts of a model by the sizes that they depend on, for one kind (prefill or decode).

    Attributes:
        attention: (hidden size, heads) -> seconds of a layer's.
        mlp: (hidden size, FFN) -> seconds of a layer's.
        norms, outer: hidden size -> seconds of a layer's, of the model's.
    """

    attention: dict[tuple[int, int], float]
    mlp: dict[tuple[int, int], float]
    norms: dict[int, float]
    outer: dict[int, float]

    def seconds(self, shape: Architecture) -> float:
        """Of a forward pass of the shape."""
        h = shape.hidden_size
        layer = self.attention[h, shape.num_attention_heads] + self.mlp[h, shape.ffn_hidden_size] + self.norms[h]
        return shape.num_layers * layer + self.outer[h]

    def to_list(self) -> list[list[list[Any]]]:
        """As JSON holds it."""
        return [[[key, value] for key, value in part.items()] for part in vars(self).values()]

    @classmethod
    def from_list(cls, parts: list[list[list[Any]]]) -> SpeedTable:
        """From what `to_list` gave."""
        return cls(*({_key(key): value for key, value in part} for part in parts))


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def tables_in(
    file: Path | None, space: Space, settings: SearchSettings, layout: Layout, seed: int
) -> dict[str, SpeedTable]:
    """The tables of a space, measured once and kept in `file`; None: kept nowhere."""
    import torch

    from nemo_minitron.evaluation.layers import time_parts

    measure = functools.partial(
        time_parts,
        device=device_of(layout),
        dtype=torch.bfloat16 if runs_in_bf16(layout) else torch.float32,
        batch=settings.batch_size,
        length=speed_length(settings, space.teacher),
        rounds=ROUNDS,
        seed=seed,
    )
    if file is None:
        return tables(space, measure, every=LINES)

    def make() -> None:
        write_json(file, {kind: table.to_list() for kind, table in tables(space, measure, every=LINES).items()})

    first_makes(file, make)
    kept = json.loads(file.read_text(encoding="utf-8"))
    return {kind: SpeedTable.from_list(parts) for kind, parts in kept.items()}


def device_of(layout: Layout) -> str:
    """Where speeds are measured."""
    return "cuda:0" if layout.cuda else "cpu"


def runs_in_bf16(layout: Layout) -> bool:
    """Whether speeds are measured in bf16; a CPU's are in float32."""
    return layout.cuda and layout.bf16


def speed_length(settings: SearchSettings, teacher: Architecture) -> int:
    """Tokens of the prompt that prefill reads and decode stands behind."""
    return settings.length or min(LENGTH, teacher.seq_length)


def widths(space: Space) -> Iterator[Architecture]:
    """Layers to measure, so that every pair of sizes is in one; the teacher's own among them."""
    teacher, choices = space.teacher, space.choices
    own = {name: getattr(teacher, name) for name in choices}
    hidden = sorted({*choices["hidden_size"], own["hidden_size"]})
    ffn = sorted({*choices["ffn_hidden_size"], own["ffn_hidden_size"]})
    heads = sorted({*choices["num_attention_heads"], own["num_attention_heads"]})
    for h in hidden:
        for number in range(max(len(ffn), len(heads))):
            sizes = {"ffn_hidden_size": ffn[number % len(ffn)], "num_attention_heads": heads[number % len(heads)]}
            yield teacher.with_sizes(hidden_size=h, **sizes)


def tables(space: Space, measure: Measure, every: int) -> dict[str, SpeedTable]:
    """Measures the layers of a space: prefill and decode -> its table.

    Args:
        every: layers between two lines of progress in a log.
    """
    shapes, times = [*widths(space)], list[Mapping[str, PartTimes]]()
    with Progress("measure layers", len(shapes), unit="layer", every=every) as progress:
        for shape in shapes:
            times.append(measure(shape))
            progress.advance()
    return {kind: _table([(shape, taken[kind]) for shape, taken in zip(shapes, times)]) for kind in KINDS}


def _table(measured: list[tuple[Architecture, PartTimes]]) -> SpeedTable:
    attention: dict[Any, list[float]] = {}
    mlp: dict[Any, list[float]] = {}
    norms: dict[Any, list[float]] = {}
    outer: dict[Any, list[float]] = {}
    for shape, parts in measured:
        h = shape.hidden_size
        attention.setdefault((h, shape.num_attention_heads), []).append(parts.attention)
        mlp.setdefault((h, shape.ffn_hidden_size), []).append(parts.mlp)
        norms.setdefault(h, []).append(parts.norms)
        outer.setdefault(h, []).append(parts.outer)
    return SpeedTable(*(_medians(one) for one in (attention, mlp, norms, outer)))


def _medians(values: dict[Any, list[float]]) -> dict[Any, float]:
    return {key: statistics.median(one) for key, one in values.items()}
