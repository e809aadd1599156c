"""The shapes of a search: every combination of sizes on the grid, those within the budget, and its rivals."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from nemo_minitron.architecture import PRUNABLE, Architecture, PruningGrid
from nemo_minitron.config import SearchSettings
from nemo_minitron.errors import ConfigError
from nemo_minitron.published import KNOWN
from nemo_minitron.search.budgets import Budget, load, within

#: How names of shapes state each size.
LETTERS = dict(zip(PRUNABLE, "lhfa"))
#: What a known model has in common with a teacher that it may have been cut from.
ALIKE = ("family", "num_query_groups", "kv_channels", "vocab_size", "share_embeddings_and_output_weights")
PUBLISHED_TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Space:
    """The sizes that may be combined.

    Attributes:
        teacher: whose sizes are the largest.
        choices: size -> legal values, ascending.
    """

    teacher: Architecture
    choices: dict[str, list[int]]

    @classmethod
    def of(cls, teacher: Architecture, grid: PruningGrid, settings: SearchSettings) -> "Space":
        """The grid of the teacher, within the ranges of the settings.

        Raises:
            ConfigError: a range holds no legal value: the nearest are named.
        """
        choices, problems = {}, []
        for name in PRUNABLE:
            legal, given = grid.choices(teacher, name), settings.range(name)
            choices[name] = legal if given is None else [size for size in legal if given[0] <= size <= given[1]]
            if not choices[name] and given is not None:
                near = sorted(legal, key=lambda size: min(abs(size - end) for end in given))[:2]
                problems.append(
                    f"search.{name} = {getattr(settings, name)} holds no size of the grid (multiples of "
                    f"{grid.step(teacher, name)} up to {legal[-1]}); nearest {' and '.join(map(str, sorted(near)))}"
                )
        if problems:
            raise ConfigError(problems, "minitron search")
        return cls(teacher, choices)

    def __len__(self) -> int:
        count = 1
        for values in self.choices.values():
            count *= len(values)
        return count

    def shapes(self) -> Iterator[Architecture]:
        """Every combination, the teacher's own too where no range leaves it out."""
        for sizes in itertools.product(*self.choices.values()):
            yield self.teacher.with_sizes(**dict(zip(self.choices, sizes)))

    def with_own(self, *names: str) -> "Space":
        """The shapes of it that have the teacher's own sizes of these names; none where a range leaves those out."""
        own = {name: [size for size in self.choices[name] if size == getattr(self.teacher, name)] for name in names}
        return Space(self.teacher, self.choices | own)

    def fitting(self, budgets: Sequence[Budget], tolerance: float) -> list[Architecture]:
        """The shapes within the budgets.

        Raises:
            ConfigError: there is none: the nearest shapes are named, or that all are too large or too small.
        """
        found = [shape for shape in self.shapes() if within(budgets, shape, tolerance)]
        if found:
            return found
        loads = sorted(((load(budgets, shape), shape) for shape in self.shapes()), key=lambda pair: abs(pair[0] - 1))
        near = "; ".join(f"{name_of(shape)} at {share:.0%}" for share, shape in loads[:3])
        if loads[0][0] > 1 and min(share for share, _ in loads) > 1:
            hint = "the budget is below the smallest shape"
        else:
            hint = "no shape is near the tightest budget"
        raise ConfigError(
            [f"{hint}: of {len(loads)} shapes none lies within {tolerance:.0%} below it; nearest: {near} of it. "
             "Give another budget, search.tolerance, or wider ranges"],
            "minitron search",
        )  # fmt: skip


def sizes_of(shape: Architecture, teacher: Architecture) -> dict[str, int]:
    """The sizes of a shape that differ from the teacher's."""
    return {name: getattr(shape, name) for name in PRUNABLE if getattr(shape, name) != getattr(teacher, name)}


def name_of(shape: Architecture) -> str:
    """What a shape is called: l24-h448-f1152-a9."""
    return "-".join(f"{letter}{getattr(shape, name)}" for name, letter in LETTERS.items())


def nearest(shapes: Iterable[Architecture], budgets: Sequence[Budget]) -> Architecture | None:
    """The largest shape within the budgets; where none is, the one that is nearest."""

    def distance(shape: Architecture) -> tuple[bool, float, int]:
        share = load(budgets, shape)
        return share > 1, abs(share - 1), shape.parameters()

    return min(shapes, key=distance, default=None)


def rivals(space: Space, budgets: Sequence[Budget]) -> dict[str, Architecture]:
    """The shapes that a search has to beat: what -> the one of that kind nearest to the budget.

    `uniform` has every size in proportion, `depth` fewer layers alone, `width` all layers; `published` is a known model
    of the teacher's kind, of the same size within PUBLISHED_TOLERANCE.
    """
    widths = [name for name in PRUNABLE if name != "num_layers"]
    near = [shape for shape in published(space) if abs(load(budgets, shape) - 1) <= PUBLISHED_TOLERANCE]
    kinds = {
        "uniform": proportional(space),
        "depth": space.with_own(*widths).shapes(),
        "width": space.with_own("num_layers").shapes(),
        "published": near,
    }
    found = {what: nearest(shapes, budgets) for what, shapes in kinds.items()}
    return {what: shape for what, shape in found.items() if shape is not None}


def published(space: Space) -> list[Architecture]:
    """The shapes of the space that known models have which differ from the teacher in prunable sizes alone."""
    known = [
        {name: getattr(model, name) for name in PRUNABLE}
        for model in KNOWN.values()
        if all(getattr(model, name) == getattr(space.teacher, name) for name in ALIKE)
    ]
    inside = [sizes for sizes in known if all(size in space.choices[name] for name, size in sizes.items())]
    shapes = [space.teacher.with_sizes(**sizes) for sizes in inside]
    return [shape for shape in shapes if sizes_of(shape, space.teacher)]


def proportional(space: Space, steps: int = 400) -> list[Architecture]:
    """Shapes whose sizes are all the same share of the teacher's, each rounded to its grid, smallest first."""
    shapes = []
    for step in range(1, steps + 1):
        sizes = {
            name: min(values, key=lambda size: (abs(size - step / steps * getattr(space.teacher, name)), size))
            for name, values in space.choices.items()
        }
        shapes.append(space.teacher.with_sizes(**sizes))
    return [shape for shape, _ in itertools.groupby(shapes)]
