"""What a student may cost: parameters, bytes, operations, time; each a limit, compared with the teacher's own."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from nemo_minitron.architecture import Architecture, human
from nemo_minitron.config import SearchSettings
from nemo_minitron.config.schemas.searching import parse_amount
from nemo_minitron.errors import ConfigError
from nemo_minitron.planning.deployment import deployment_bytes
from nemo_minitron.planning.flops import forward_flops
from nemo_minitron.search.speeds import SpeedTable

#: What a shape costs in some kind.
Cost = Callable[[Architecture], float]


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit of one kind.

    Attributes:
        name: the setting's.
        limit: the most of it that a student may have.
        cost: what a shape has.
        unit: how people read it, `human` numbers behind it.
    """

    name: str
    limit: float
    cost: Cost
    unit: str = ""

    def share(self, shape: Architecture) -> float:
        """What the shape has of the limit: 1 where it is met exactly."""
        return self.cost(shape) / self.limit

    def shown(self, value: float) -> str:
        """A value as people read it."""
        return f"{human(value) if value >= 1 else format(value, '.3g')}{self.unit}"


def budgets_of(
    settings: SearchSettings, teacher: Architecture, speeds: Mapping[str, SpeedTable] | None = None
) -> list[Budget]:
    """The budgets that are given, for this teacher.

    Args:
        speeds: prefill and decode -> its table; needed where a speed is asked for.

    Raises:
        ConfigError: a budget is at or above what the teacher has.
    """
    length = settings.length or teacher.seq_length
    costs: dict[str, tuple[Cost, str]] = {
        "parameters": (Architecture.parameters, ""),
        "non_embedding_parameters": (Architecture.non_embedding_parameters, ""),
        "memory": (lambda shape: served_bytes(settings, teacher, shape), "B"),
        "flops": (lambda shape: forward_flops(shape, length), " operations a token"),
    }
    for name, table in (speeds or {}).items():
        costs[name] = (table.seconds, " s a pass")
    found, problems = [], []
    for name, (cost, unit) in costs.items():
        given = getattr(settings, name)
        if given is None:
            continue
        own = cost(teacher)
        budget = Budget(name, parse_amount(name, given, own), cost, unit)
        if budget.limit >= own:
            problems.append(f"search.{name} = {given} is no cut: the teacher has {budget.shown(own)}; give less")
        found.append(budget)
    if problems:
        raise ConfigError(problems, "minitron search")
    return found


def served_bytes(settings: SearchSettings, teacher: Architecture, shape: Architecture) -> float:
    """Weights and cache of a shape where it is served, which search.memory limits."""
    length = settings.length or teacher.seq_length
    return deployment_bytes(shape, settings.weights, batch=settings.batch_size, length=length)


def load(budgets: Sequence[Budget], shape: Architecture) -> float:
    """The fullest of the budgets: 1 where the tightest is met exactly, above 1 where one is exceeded."""
    return max(budget.share(shape) for budget in budgets)


def within(budgets: Sequence[Budget], shape: Architecture, tolerance: float) -> bool:
    """Whether a shape exceeds no budget, and comes within `tolerance` of the tightest.

    arXiv 2407.14679 takes shapes within 5 % on both sides; a limit of memory or of time is one, so here none is above.
    """
    return 1 - tolerance <= load(budgets, shape) <= 1
