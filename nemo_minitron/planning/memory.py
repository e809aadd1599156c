"""Peak memory of each rank: what a stage holds at its fullest moments, by kind. Megatron's and PyTorch's tensors alone;
interpreter, libraries and contexts are not in it.

Mixed precision holds bf16 parameters, fp32 gradients and fp32 main parameters with Adam's two moments (2 + 4 + 12 bytes
a parameter); fp32 holds parameters, gradients and the two moments (4 + 4 + 8). On GPUs the optimizer is distributed:
its share is divided by the data-parallel ranks.
"""

import dataclasses
from collections.abc import Iterator

from nemo_minitron.architecture import Architecture
from nemo_minitron.planning import loss
from nemo_minitron.planning.activations import (
    FP32,
    backward_work,
    forward_work,
    global_buffer,
    kept_at_the_end,
    kept_by_layer,
)
from nemo_minitron.planning.run import Run, largest_parameter, rank_parameters, stage_layers

FP64 = 8
#: Second moments stay on the GPU where they take no more than this share of what is free (importance.moments).
DEVICE_SHARE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at one moment, by kind.

    Attributes:
        moment: what the rank is doing.
        weights: parameters of the model that is trained or scored.
        gradients: their fp32 sums.
        optimizer: Adam's moments, and fp32 main parameters in mixed precision.
        teacher: parameters of the frozen teacher.
        activations: kept for the backward pass, of all micro batches in flight.
        loss: logits, the loss's buffers, gradients of the output layer.
        work: everything else that lives for a moment.
        statistics: sums of second moments while scoring.
    """

    moment: str
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    teacher: int = 0
    activations: int = 0
    loss: int = 0
    work: int = 0
    statistics: int = 0

    @property
    def total(self) -> int:
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "moment"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The fullest rank of a stage: its pipeline stage (0 the first) and what it holds at its peak."""

    pipeline_stage: int
    layers: int
    peak: Memory


def stage_memory(stage: str, teacher: Architecture, student: Architecture | None, run: Run) -> RankMemory:
    """The fullest rank of `stage`: finetune (of the teacher), distill, or prune (scoring; the cut streams)."""
    return max(all_ranks(stage, teacher, student, run), key=lambda rank: rank.peak.total)


def all_ranks(stage: str, teacher: Architecture, student: Architecture | None, run: Run) -> list[RankMemory]:
    """A rank of each pipeline stage, at its peak."""
    trained = student if student is not None and stage == "distill" else teacher
    layers = stage_layers(trained.num_layers, run.layout.pipeline_parallel)
    ranks = []
    for number, count in enumerate(layers):
        if stage == "prune":
            moments = _scoring(teacher, run, number, count)
        else:
            moments = _training(trained, teacher if stage == "distill" else None, run, number, count)
        peak = max(moments, key=lambda moment: moment.total)
        ranks.append(RankMemory(pipeline_stage=number, layers=count, peak=peak))
    return ranks


def optimizer_bytes(parameters: int, run: Run) -> int:
    """Of Adam's state on a rank that holds so many parameters."""
    each = 3 * FP32 if run.layout.bf16 else 2 * FP32
    shared = run.data_parallel * run.layout.context_parallel if run.layout.cuda else 1
    return each * parameters // shared


def _training(a: Architecture, teacher: Architecture | None, run: Run, stage: int, layers: int) -> Iterator[Memory]:
    """The fullest moments of a training step from the second on, when the optimizer's state exists."""
    layout, e = run.layout, run.bytes
    last = stage == layout.pipeline_parallel - 1
    parameters = rank_parameters(a, layout, stage)
    teacher_bytes = e * rank_parameters(teacher, layout, stage) if teacher else 0
    held = {
        "weights": e * parameters,
        "gradients": FP32 * parameters,
        "optimizer": optimizer_bytes(parameters, run),
        "teacher": teacher_bytes,
    }
    buffer = max(global_buffer(one, run) for one in (a, teacher or a))
    of_one = layers * kept_by_layer(a, run) + (kept_at_the_end(a, run) if last else 0)
    kept, waiting = int(of_one * run.in_flight(stage)), int(of_one * (run.in_flight(stage) - 1))
    if last:
        needed = loss.distillation(teacher, a, run) if teacher else loss.language_model(a, run)
        yield Memory(moment="loss", **held, activations=kept, loss=needed.most, work=buffer)
    yield Memory(moment="backward", **held, activations=kept, work=buffer + max(0, int(backward_work(a, run))))
    if teacher:
        work = buffer + int(forward_work(teacher, run))
        yield Memory(moment="teacher's forward", **held, activations=waiting, work=work)
    yield Memory(moment="optimizer step", **held, work=buffer + _adam_work(a, run, stage))
    if not layout.cuda:
        loading = held | {"gradients": 0, "optimizer": 0}
        yield Memory(moment="loading", **loading, work=teacher_bytes or e * parameters)


def _adam_work(a: Architecture, run: Run, stage: int) -> int:
    """torch's AdamW: two tensors as large as the largest parameter, one after the other on a CPU, all at once on CUDA;
    Transformer Engine's fused Adam needs none."""
    if not run.layout.cuda:
        return 2 * FP32 * largest_parameter(a, run.layout, stage)
    if run.transformer_engine:
        return 0
    return FP32 * rank_parameters(a, run.layout, stage) // (run.data_parallel * run.layout.context_parallel)


def _scoring(a: Architecture, run: Run, stage: int, layers: int) -> Iterator[Memory]:
    """Forward passes with ModelOpt's estimators, without logits; always Megatron's local layer spec. Sums of second
    moments that take more than their share of a GPU lie in the host's memory."""
    run = dataclasses.replace(run, transformer_engine=False)
    last = stage == run.layout.pipeline_parallel - 1
    weights = run.bytes * rank_parameters(a, run.layout, stage)
    work = global_buffer(a, run) + int(forward_work(a, run))
    statistics, product = moment_bytes(a, layers, last) if run.statistics else (0, 0)
    if run.layout.cuda and run.device_bytes and statistics >= DEVICE_SHARE * (run.device_bytes - weights):
        statistics = 0
    yield Memory(moment="forward", weights=weights, work=work + product, statistics=statistics)
    if statistics and not run.layout.cuda:
        widest = max(a.hidden_size, a.ffn_hidden_size, a.num_attention_heads * a.kv_channels)
        means = statistics * FP32 // FP64 + FP64 * widest**2
        yield Memory(moment="means", weights=weights, work=means, statistics=statistics)


def moment_bytes(a: Architecture, layers: int, last: bool) -> tuple[int, int]:
    """float64 sums of second moments of a rank's layers, and the largest product in float32 and float64."""
    h, f, heads = a.hidden_size, a.ffn_hidden_size, a.num_attention_heads * a.kv_channels
    elements = layers * (2 * h**2 + f**2 + heads**2) + (h**2 if last else 0)
    return FP64 * elements, (FP32 + FP64) * max(h, f, heads) ** 2
