"""Students whose sizes a search finds: the sizes, and until it has ended those that the plan's arithmetic stands on.

These are of the shape of the budget with all sizes in proportion, `uniform`, which every search measures too.
"""

import dataclasses

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture, PruningGrid, human
from nemo_minitron.artifacts import MANIFEST
from nemo_minitron.config.schemas.searching import SPEEDS, parse_amount
from nemo_minitron.errors import MinitronError
from nemo_minitron.flow.models import place
from nemo_minitron.report.stages import read_json
from nemo_minitron.search.budgets import Budget, budgets_of
from nemo_minitron.search.result import RESULT
from nemo_minitron.search.space import Space, nearest, proportional, sizes_of


def known_sizes(config: c.FlowConfig, teacher: Architecture, name: str) -> tuple[dict[str, int], str]:
    """The sizes of the student `name` as far as they are known, and why these.

    Raises:
        ConfigError: no shape meets the budgets, or they are none for this teacher.
        MinitronError: the search's result cannot be read.
    """
    found = found_shape(config, teacher, name)
    shape = found or assumed_shape(config, teacher, name)
    share = f"{shape.parameters() / teacher.parameters():.1%} of the parameters, {human(shape.parameters())}"
    if found:
        return _sizes(found, teacher), f"found by the search; {share}"
    return _sizes(shape, teacher), f"until the search has found them, all in proportion, for estimates; {share}"


def _sizes(shape: Architecture, teacher: Architecture) -> dict[str, int]:
    """What is cut; of a shape that is the teacher's own, its width stays as it is."""
    return sizes_of(shape, teacher) or {"hidden_size": teacher.hidden_size}


def found_shape(config: c.FlowConfig, teacher: Architecture, name: str) -> Architecture | None:
    """The winner of a search that has ended, for a teacher of these sizes; None: there is none yet."""
    folder = place(config, "search", name)
    if not (folder / MANIFEST).is_file():
        return None
    result = read_json(folder / RESULT)
    try:
        own, shape = (Architecture.from_dict(result[which]["architecture"]) for which in ("teacher", "winner"))
    except (KeyError, TypeError, ValueError, MinitronError):
        raise MinitronError(f"{folder / RESULT} names no winner: remove {folder}, and the flow searches anew") from None
    return None if sizes_of(own, teacher) else shape


def assumed_shape(config: c.FlowConfig, teacher: Architecture, name: str) -> Architecture:
    """The shape of the budget with all sizes in proportion, once the search is seen to have shapes to look at."""
    space, budgets = _space(config, teacher, name)
    settings = settings_of(config, name)
    if not settings.speeds:
        space.fitting(budgets, settings.tolerance)
    shape = nearest(proportional(space), budgets)
    assert shape is not None, "a space has a shape"
    return shape


def measured_shapes(config: c.FlowConfig, teacher: Architecture, name: str) -> int:
    """How many cuts a search measures, at most."""
    settings = settings_of(config, name)
    if settings.measured is not None:
        return settings.measured
    space, budgets = _space(config, teacher, name)
    return len(space.fitting(budgets, settings.tolerance))


def settings_of(config: c.FlowConfig, name: str) -> c.SearchSettings:
    """What a student asks of its search."""
    return c.SearchSettings(**config.prune.students[name]["search"])


def _space(config: c.FlowConfig, teacher: Architecture, name: str) -> tuple[Space, list[Budget]]:
    """The shapes of a search, and its budgets as far as arithmetic goes: n times the speed is 1/n of the operations."""
    settings = settings_of(config, name)
    budgets = budgets_of(dataclasses.replace(settings, prefill=None, decode=None), teacher)
    for speed in SPEEDS:
        given = getattr(settings, speed)
        if given is not None:
            share = f"{100 * parse_amount(speed, given, 1.0):f}%"
            budgets += budgets_of(c.SearchSettings(flops=share, length=settings.length), teacher)
    return Space.of(teacher, PruningGrid.of(config.prune), settings), budgets
