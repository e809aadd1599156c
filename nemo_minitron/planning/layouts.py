"""Layouts: how given ranks can be shared out, what stands in the way of each, and what each needs."""

import dataclasses
from collections.abc import Iterator

from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import EngineError
from nemo_minitron.megatron.layout import Layout, check_fits
from nemo_minitron.planning.memory import RankMemory, stage_memory
from nemo_minitron.planning.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The models of a plan."""

    teacher: Architecture
    student: Architecture | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout of the ranks at hand.

    Attributes:
        run: the layout and what goes with it.
        stages: stage -> its fullest rank; empty where the layout is not possible.
        problem: why it is not possible, or does not fit; None where it does.
        micro_batch: the largest micro batch, of 1, 2, 4..., with which every stage fits; 0: none.
    """

    run: Run
    stages: dict[str, RankMemory]
    problem: str | None = None
    micro_batch: int = 0

    @property
    def total(self) -> int:
        """Bytes of the fullest rank of the stage that needs most."""
        return max((rank.peak.total for rank in self.stages.values()), default=0)

    @property
    def possible(self) -> bool:
        return bool(self.stages)


def layout_problems(models: Models, run: Run, stages: tuple[str, ...]) -> list[str]:
    """What stands in the way of running `stages` with this layout, each with the equation that failed."""
    layout = run.layout
    per_replica = layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel
    if layout.world_size % per_replica:
        return [
            f"world size {layout.world_size} = {layout.devices} x {layout.num_nodes} is not a multiple of tensor "
            f"{layout.tensor_parallel} x pipeline {layout.pipeline_parallel} = {per_replica}"
        ]
    problems = []
    samples = layout.micro_batch_size * run.data_parallel
    if layout.global_batch_size % samples:
        problems.append(
            f"global_batch_size {layout.global_batch_size} is not a multiple of micro batch {layout.micro_batch_size} "
            f"x data parallel {run.data_parallel} = {samples}"
        )
    roles = {"model" if models.student is None else "teacher": models.teacher}
    if "distill" in stages and models.student is not None:
        roles["student"] = models.student
    return problems + [problem for role, one in roles.items() if (problem := _unfit(one, layout, role))]


def _unfit(architecture: Architecture, layout: Layout, role: str) -> str | None:
    """What the engine says of a model that cannot be divided so."""
    try:
        check_fits(architecture, layout, role)
    except EngineError as error:
        return str(error)
    return None


def layouts(run: Run) -> Iterator[Run]:
    """Every tensor x pipeline x data parallel layout of the ranks; tensor parallel stays within a node."""
    layout = run.layout
    for tensor in _divisors(layout.devices):
        for pipeline in _divisors(layout.world_size // tensor):
            sequence = layout.sequence_parallel and tensor > 1
            changed = dataclasses.replace(
                layout, tensor_parallel=tensor, pipeline_parallel=pipeline, sequence_parallel=sequence
            )
            yield dataclasses.replace(run, layout=changed)


def candidates(models: Models, run: Run, stages: tuple[str, ...], limit: float | None, auto: bool) -> list[Candidate]:
    """Every layout with what it needs, best first: those that fit, by how few ranks share a replica (they exchange
    least); then those that fit with a smaller micro batch; then those that do not.

    Args:
        limit: bytes that a rank holds; None: everything fits.
        auto: whether the distillation loss is fused wherever it can be, that is without sequence parallel.
    """
    listed = []
    for one in layouts(run):
        chosen = dataclasses.replace(one, fused_loss=not one.layout.sequence_parallel) if auto else one
        listed.append(_candidate(models, chosen, stages, limit))
    return sorted(listed, key=_rank)


def _rank(candidate: Candidate) -> tuple[int, int, int, int]:
    layout = candidate.run.layout
    tier = 0 if candidate.problem is None else 1 if candidate.micro_batch else 2 if candidate.possible else 3
    return tier, layout.tensor_parallel * layout.pipeline_parallel, layout.pipeline_parallel, candidate.total


def _candidate(models: Models, run: Run, stages: tuple[str, ...], limit: float | None) -> Candidate:
    smallest = dataclasses.replace(run, layout=dataclasses.replace(run.layout, micro_batch_size=1))
    problems = layout_problems(models, smallest, stages)
    if problems:
        return Candidate(run=run, stages={}, problem=problems[0])
    micro_batch = largest_micro_batch(models, run, stages, limit) if limit is not None else 0
    problems = layout_problems(models, run, stages)
    if problems:
        return Candidate(run=run, stages={}, problem=problems[0], micro_batch=micro_batch)
    needed = {stage: stage_memory(stage, models.teacher, models.student, run) for stage in stages}
    problem = None
    if limit is not None:
        over = {stage: rank.peak for stage, rank in needed.items() if rank.peak.total > limit}
        if over:
            stage, peak = max(over.items(), key=lambda item: item[1].total)
            kind, most = max(peak.by_kind().items(), key=lambda item: item[1])
            problem = f"{stage} needs {peak.total / 1e9:.1f} GB, {most / 1e9:.1f} of it {kind}"
    return Candidate(run=run, stages=needed, problem=problem, micro_batch=micro_batch)


def largest_micro_batch(models: Models, run: Run, stages: tuple[str, ...], limit: float) -> int:
    """The largest micro batch, a power of two, that divides the global batch and with which every stage fits."""
    largest, size = 0, 1
    while run.layout.global_batch_size % (size * run.data_parallel) == 0:
        tried = dataclasses.replace(run, layout=dataclasses.replace(run.layout, micro_batch_size=size))
        if any(stage_memory(s, models.teacher, models.student, tried).peak.total > limit for s in stages):
            break
        largest, size = size, size * 2
    return largest


def scoring_candidates(models: Models, run: Run, batch: int, limit: float | None) -> list[Candidate]:
    """Every number of ranks that can share the layers while scoring, with what it needs; fewest first."""
    listed = []
    for stages in range(1, min(run.layout.world_size, models.teacher.num_layers) + 1):
        one = scoring_run(run, stages, batch)
        listed.append(_candidate(models, one, ("prune",), limit))
    return sorted(listed, key=_rank)


def scoring_run(run: Run, stages: int, batch: int) -> Run:
    """The run that scores: one rank a pipeline stage, no tensor parallel."""
    nodes = -(-stages // run.layout.devices)
    layout = dataclasses.replace(
        run.layout, tensor_parallel=1, pipeline_parallel=stages, context_parallel=1, sequence_parallel=False,
        devices=stages if nodes == 1 else run.layout.devices, num_nodes=nodes, micro_batch_size=batch,
        global_batch_size=batch,
    )  # fmt: skip
    return dataclasses.replace(run, layout=layout)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
