"""A search, resolved against its teacher: what is looked at, and how long. Reads sizes, no weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture, PruningGrid, human
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.megatron.layout import layout_of
from nemo_minitron.search.budgets import Budget, budgets_of
from nemo_minitron.search.rounds import Round, schedule
from nemo_minitron.search.space import Space, name_of, rivals, sizes_of
from nemo_minitron.search.speeds import SpeedTable, speed_length, tables_in
from nemo_minitron.training.inputs import stated_path


@dataclasses.dataclass(frozen=True)
class Task:
    """A search, resolved against its teacher.

    Attributes:
        shapes: all within the budgets.
        rivals: what -> the shape of that kind nearest to the budgets.
        rounds: of distillation.
        speeds: prefill and decode -> times of layers, where a speed is asked for.
    """

    config: c.SearchConfig
    teacher: Checkpoint
    space: Space
    budgets: list[Budget]
    shapes: list[Architecture]
    rivals: dict[str, Architecture]
    rounds: list[Round]
    speeds: Mapping[str, SpeedTable] = dataclasses.field(default_factory=dict)

    @property
    def speed_length(self) -> int:
        """Tokens of the prompt whose speed is meant."""
        return speed_length(self.config.search, self.teacher.architecture)

    @property
    def finalists(self) -> int:
        """How many shapes are left at the end."""
        return min(self.config.search.finalists, self.rounds[0].candidates)

    def student(self, shape: Architecture) -> Architecture:
        """The architecture of a shape's cut: with an output matrix of its own where the cut gives it one."""
        cut = self.config.prune
        if cut.untie and cut.method == "compensated":
            return shape.with_sizes(share_embeddings_and_output_weights=False)
        return shape

    def by_name(self) -> dict[str, Architecture]:
        """Name -> shape, of those within the budgets and the rivals."""
        return {name_of(shape): shape for shape in (*self.shapes, *self.rivals.values())}

    def describe(self) -> str:
        """The space and the rounds, a line each."""
        limits = ", ".join(f"{budget.name} {budget.shown(budget.limit)}" for budget in self.budgets)
        settings = self.config.search
        lines = [
            f"search: {len(self.space)} shapes on the grid, {len(self.shapes)} within "
            f"{settings.tolerance:.0%} of {limits}"
        ]
        if settings.measured is not None and settings.measured < len(self.shapes):
            alone = len(self.alone())
            lines.append(
                f"  cuts: {alone} of one size alone, then the {settings.measured} shapes of least predicted loss"
            )
        else:
            lines.append(f"  cuts: all {len(self.shapes)} shapes")
        lines += [f"  round {one.number}: {one.candidates} candidates, {one.steps} steps each" for one in self.rounds]
        lines += [f"  {what}: {name_of(shape)}, {human(shape.parameters())}" for what, shape in self.rivals.items()]
        return "\n".join(lines)

    def alone(self) -> list[Architecture]:
        """The shapes that differ from the teacher in one size, and have one that some shape of the search has."""
        own = self.teacher.architecture
        parts = {(size, value) for shape in self.shapes for size, value in sizes_of(shape, own).items()}
        return [own.with_sizes(**{size: value}) for size, value in sorted(parts)]


def resolved(config: c.SearchConfig, speeds_file: Path | None = None) -> Task:
    """Opens the teacher and works out budgets, shapes and rounds; reads no weights.

    Where a speed is asked for, layers of random weights are measured first.

    Args:
        speeds_file: where their times are kept.
    """
    path = stated_path(config.model.restore_from_path, "model.restore_from_path")
    teacher = open_checkpoint(path, "teacher")
    space = Space.of(teacher.architecture, PruningGrid.of(config.prune), config.search)
    speeds: Mapping[str, SpeedTable] = {}
    if config.search.speeds:
        speeds = tables_in(speeds_file, space, config.search, layout_of(config.trainer, config.model), config.seed)
    budgets = budgets_of(config.search, teacher.architecture, speeds)
    shapes = space.fitting(budgets, config.search.tolerance)
    candidates = min(config.search.candidates, len(shapes))
    finalists = min(config.search.finalists, candidates)
    rounds = schedule(candidates, finalists, config.search.steps)
    return Task(config, teacher, space, budgets, shapes, rivals(space, budgets), rounds, speeds)
