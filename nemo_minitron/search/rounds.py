"""Rounds of short distillations: the better half of the candidates goes on, for twice the steps, with its weights.

Successive halving (arXiv 1502.07943), over candidates that the first Minitron paper ranks after a short retraining
(arXiv 2407.14679, section 4: ranks settled near step 300). Every candidate of a round reads the same batches; each
round reads others than those before it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest


@dataclasses.dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: from 1.
        candidates: how many take part.
        steps: optimizer steps of each.
    """

    number: int
    candidates: int
    steps: int


def schedule(candidates: int, finalists: int, steps: int) -> list[Round]:
    """Half of the candidates stay after each round, rounded up, until `finalists` are left; steps double.

    With as many finalists as candidates there is one round, which ranks them.
    """
    rounds = [Round(1, candidates, steps)]
    left = halved(candidates, finalists)
    while left > finalists:
        rounds.append(Round(len(rounds) + 1, left, rounds[-1].steps * 2))
        left = halved(left, finalists)
    return rounds


def halved(candidates: int, finalists: int) -> int:
    """How many of so many candidates stay."""
    return max(finalists, -(-candidates // 2))


def total_steps(rounds: Sequence[Round]) -> int:
    """Optimizer steps of all candidates together."""
    return sum(one.candidates * one.steps for one in rounds)


def round_seed(one: Round, seed: int) -> int:
    """Of the order of a round's samples; no other round has it."""
    return seed + one.number


def round_config(
    config: c.SearchConfig, one: Round, student: Path, output: Path, answers: Path | None
) -> c.DistillConfig:
    """The distillation of one candidate in one round.

    Args:
        student: its weights so far.
        answers: the teacher's, kept; None: the teacher runs.
    """
    kd, teacher = config.kd, config.model.restore_from_path
    if answers is not None:
        kd, teacher = dataclasses.replace(kd, teacher=str(answers)), None
    return c.DistillConfig(
        seed=round_seed(one, config.seed),
        trainer=dataclasses.replace(config.trainer, max_steps=one.steps, val_check_interval=one.steps),
        model=dataclasses.replace(
            config.model,
            restore_from_path=str(student),
            kd_teacher_restore_from_path=teacher,
            nemo_path=str(output),
            data=dataclasses.replace(config.model.data, windows="fixed"),
            optim=with_steps(config.model.optim, one.steps),
        ),
        monitor="last",
        kd=kd,
    )


def with_steps(optim: c.OptimConfig, steps: int) -> c.OptimConfig:
    """The optimizer with a warm-up of a quarter of a round at most: its state begins anew in each."""
    warmup = min(optim.sched.warmup_steps, max(1, steps // 4))
    return dataclasses.replace(optim, sched=dataclasses.replace(optim.sched, warmup_steps=warmup))


def reached(manifest: Manifest) -> dict[str, float]:
    """The validation losses at the end of a round, by name."""
    return {name: value for name, value in manifest.metrics["validation"][-1].items() if name != "step"}


def kendall_tau(first: Mapping[str, float], second: Mapping[str, float]) -> float | None:
    """Kendall's tau-b between two rankings of what both have; None where fewer than two are shared, or all tie."""
    names = sorted(first.keys() & second.keys())
    pairs = [(a, b) for index, a in enumerate(names) for b in names[index + 1 :]]
    signs = [(_sign(first[a] - first[b]), _sign(second[a] - second[b])) for a, b in pairs]
    together = sum(one * other for one, other in signs)
    untied = [sum(1 for pair in signs if pair[which]) for which in (0, 1)]
    return together / (untied[0] * untied[1]) ** 0.5 if all(untied) else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
