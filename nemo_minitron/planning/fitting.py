"""What fits: the longest sequence and the largest micro batch with which every stage stays within a rank's memory."""

import dataclasses
from collections.abc import Iterator

from nemo_minitron.planning.layouts import Candidate, Models, candidates, scoring_run
from nemo_minitron.planning.memory import stage_memory
from nemo_minitron.planning.run import Run

#: Shorter sequences are not offered.
SHORTEST = 128


def lengths(longest: int) -> Iterator[int]:
    """`longest`, then the powers of two below it, down to SHORTEST."""
    yield longest
    length = 1 << (longest - 1).bit_length() - 1
    while SHORTEST <= length < longest:
        yield length
        length //= 2


def halves(size: int) -> Iterator[int]:
    """`size`, then its halves as long as they are whole."""
    yield size
    while size > 1 and size % 2 == 0:
        size //= 2
        yield size


def with_batch(run: Run, *, seq_length: int | None = None, micro_batch: int | None = None) -> Run:
    """`run` with another sequence length or micro batch."""
    layout = dataclasses.replace(run.layout, micro_batch_size=micro_batch or run.layout.micro_batch_size)
    return dataclasses.replace(run, layout=layout, seq_length=seq_length or run.seq_length)


def peak(models: Models, run: Run, stages: tuple[str, ...], scoring: tuple[int, int] = (1, 1)) -> tuple[str, int]:
    """The stage that needs most of a rank, and its bytes.

    Args:
        scoring: ranks that share the layers while scoring, and samples a forward pass.
    """
    needed = {}
    for stage in stages:
        used = scoring_run(run, *scoring) if stage == "prune" else run
        needed[stage] = stage_memory(stage, models.teacher, models.student, used).peak.total
    return max(needed.items(), key=lambda item: item[1])


def fits(
    models: Models, run: Run, stages: tuple[str, ...], limit: float | None, scoring: tuple[int, int] = (1, 1)
) -> bool:
    """Whether every stage stays within `limit` bytes of a rank; None: it does."""
    return limit is None or peak(models, run, stages, scoring)[1] <= limit


def best_layout(models: Models, run: Run, limit: float | None, fixed: dict[str, int]) -> Candidate | None:
    """The best layout for training, with its `problem` where `run` does not fit in it or cannot be divided so; None:
    the ranks make none with what is given.

    Args:
        fixed: tensor_parallel and pipeline_parallel, as far as they are given.
    """
    stages = ("finetune", "distill") if models.student else ("finetune",)
    listed = candidates(models, run, stages, limit, auto=True)
    given = (one for one in listed if all(getattr(one.run.layout, name) == size for name, size in fixed.items()))
    return next(given, None)
