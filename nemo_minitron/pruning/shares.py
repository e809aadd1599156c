"""Students as shares of their teacher: the shape on the pruning grid that is nearest to so much of it.

`layers=60%` is the number of layers nearest to 0.6 l. `parameters=60%` is of all parameters, embeddings included:
hidden size and FFN are scaled alike, h' = x h and f' = x f, each rounded to its grid, and of the shapes that x = 0 .. 1
goes through the one with the nearest number of parameters is taken. Head size and query groups stay, and so do the
heads unless they are named.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.architecture import Architecture, PruningGrid, parse_layers

SHARES = ("parameters", "layers")
#: What a share goes with: not with the sizes that it decides.
DECIDES = {"parameters": ("hidden_size", "ffn_hidden_size"), "layers": ("num_layers", "drop_layers")}
PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def parse_share(text: Any) -> float:
    """0.6 of `60%`.

    Raises:
        ValueError: it is no share in percent, or none above 0 and up to 100.
    """
    percent = PERCENT.fullmatch(str(text))
    if percent is None:
        raise ValueError(f"{text!r} is not a share in percent, such as 60%")
    share = float(percent[1]) / 100
    if not 0 < share <= 1:
        raise ValueError(f"{text} is not a share of the teacher: above 0% and up to 100%")
    return share


def share_problems(targets: Mapping[str, Any]) -> list[str]:
    """What is wrong with the shares among a student's targets, whatever its teacher."""
    problems = []
    for name in SHARES:
        if targets.get(name) is None:
            continue
        try:
            parse_share(targets[name])
        except ValueError as error:
            problems.append(f"{name} = {error}")
        both = [size for size in DECIDES[name] if targets.get(size) is not None]
        if both:
            problems.append(
                f"{name} and {' and '.join(both)} are given: the share decides {' and '.join(DECIDES[name])}"
            )
    return problems


def sizes_of(targets: Mapping[str, Any], teacher: Architecture, grid: PruningGrid) -> dict[str, Any]:
    """`targets` with its shares replaced by the sizes that they stand for.

    Args:
        targets: without problems of share_problems; what else is in it is right for this teacher.
    """
    sizes = {name: value for name, value in targets.items() if name not in SHARES}
    if targets.get("layers") is not None:
        layers = nearest(grid.choices(teacher, "num_layers"), parse_share(targets["layers"]) * teacher.num_layers)
        sizes |= {"num_layers": layers}
    if targets.get("parameters") is not None:
        heads = sizes.get("num_attention_heads")
        kept = teacher.with_sizes(num_layers=_layers(sizes, teacher), num_attention_heads=heads)
        if sizes.get("untie") and sizes.get("method") != "minitron":
            kept = kept.with_sizes(share_embeddings_and_output_weights=False)
        student = nearest_width(kept, grid, parse_share(targets["parameters"]) * teacher.parameters())
        sizes |= {"hidden_size": student.hidden_size, "ffn_hidden_size": student.ffn_hidden_size}
    return sizes


def nearest(choices: Sequence[int], value: float) -> int:
    """The choice nearest to `value`; of two as near, the smaller."""
    return min(choices, key=lambda choice: (abs(choice - value), choice))


def nearest_width(model: Architecture, grid: PruningGrid, parameters: float) -> Architecture:
    """The shape in proportion to `model` whose number of parameters is nearest; of two as near, the smaller."""
    return min(in_proportion(model, grid), key=lambda shape: (abs(shape.parameters() - parameters), shape.parameters()))


def in_proportion(model: Architecture, grid: PruningGrid) -> list[Architecture]:
    """Every shape with hidden size and FFN of `model` scaled alike and rounded to their grids, smallest first.

    The rounded sizes change where x h or x f is half-way between two choices, so one x between each two such places is
    tried.
    """
    choices = {name: grid.choices(model, name) for name in ("hidden_size", "ffn_hidden_size")}
    turns = {
        (low + high) / 2 / getattr(model, name)
        for name, values in choices.items()
        for low, high in itertools.pairwise(values)
    }
    scales = [(low + high) / 2 for low, high in itertools.pairwise(sorted({0.0, *turns, 1.0}))]
    shapes = [
        {name: nearest(values, scale * getattr(model, name)) for name, values in choices.items()} for scale in scales
    ]
    return [model.with_sizes(**shape) for shape, _ in itertools.groupby(shapes)]


def _layers(sizes: Mapping[str, Any], teacher: Architecture) -> int:
    """Layers that are left."""
    if sizes.get("num_layers") is not None:
        return sizes["num_layers"]
    return teacher.num_layers - len(parse_layers(sizes.get("drop_layers")))
