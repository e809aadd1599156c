"""Ranks, layout and sequence that fit the hardware's memory, by the plan's arithmetic."""

from nemo_minitron.errors import EngineError
from nemo_minitron.flow.settle.state import State
from nemo_minitron.planning.fitting import best_layout, fits, lengths, peak, with_batch
from nemo_minitron.planning.layouts import Candidate, Models
from nemo_minitron.planning.run import Run


def settle_devices(state: State) -> None:
    gpus, cores = state.machine.gpus, state.machine.cores
    if state.cuda():
        state.choose("hardware.devices", gpus or 1, f"the GPUs of this machine, {gpus}")
    else:
        state.choose("hardware.devices", 1, f"no GPU here; one process on {cores} core{'s' if cores > 1 else ''}")


def settle_layout(state: State) -> None:
    """Layout, sequence and scoring ranks that fit; the micro batch waits for the global batch."""
    limit, whose = state.limit()
    models, run = state.models(), state.run()
    given = state.config.model.seq_length
    tried = [given] if given else list(lengths(state.longest()))
    for length in tried:
        run = with_batch(run, seq_length=length)
        candidate, scoring = _layout(state, models, run, limit)
        if candidate is not None and scoring:
            break
    else:
        raise EngineError(_nothing_fits(state, models, run, candidate, whose))
    run = candidate.run
    why = "as few ranks as hold a replica"
    state.choose("hardware.tensor_model_parallel_size", run.layout.tensor_parallel, why)
    state.choose("hardware.pipeline_model_parallel_size", run.layout.pipeline_parallel, why)
    state.choose("hardware.prune_pipeline_model_parallel_size", scoring, "as few ranks as hold the teacher")
    if length == state.longest():
        most = (
            "the teacher's own"
            if length == state.teacher.seq_length
            else f"of the teacher's {state.teacher.seq_length}"
        )
        why = f"{most}, as much as pays on a {'GPU' if state.cuda() else 'CPU'}; fits {whose}"
    else:
        why = f"the longest power of two that fits {whose}"
    state.choose("model.seq_length", length, why)


def _layout(state: State, models: Models, run: Run, limit: float | None) -> tuple[Candidate | None, int]:
    """The best layout, and the ranks that score; 0 where not all fits."""
    hardware = state.config.hardware
    fixed = {
        "tensor_parallel": hardware.tensor_model_parallel_size,
        "pipeline_parallel": hardware.pipeline_model_parallel_size,
    }
    candidate = best_layout(models, run, limit, {name: size for name, size in fixed.items() if size is not None})
    if candidate is None or candidate.problem is not None:
        return candidate, 0
    given, ranks = hardware.prune_pipeline_model_parallel_size, run.layout.world_size
    for scoring in [given] if given else range(1, min(ranks, state.teacher.num_layers) + 1):
        if fits(models, candidate.run, ("prune",), limit, (scoring, 1)):
            return candidate, scoring
    return candidate, 0


def _nothing_fits(state: State, models: Models, run: Run, candidate: Candidate | None, whose: str) -> str:
    """Why no sequence is short enough."""
    hardware = state.config.hardware
    ranks = f"{hardware.num_nodes} x {hardware.devices} rank(s)"
    if candidate is None or not candidate.possible:
        layout = run.layout
        what = candidate.problem if candidate else (
            f"{ranks} cannot be divided into tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel}"
        )  # fmt: skip
        return f"{what}; leave hardware.*_model_parallel_size open (null), or give sizes that divide the teacher"
    if candidate.problem:
        why = candidate.problem
    else:
        stage, total = peak(models, candidate.run, ("prune",))
        why = f"{stage} needs {total / 1e9:.1f} GB"
    return (
        f"nothing fits {whose}: {why}, with sequences of {run.seq_length} and micro batch "
        f"{run.layout.micro_batch_size} on {ranks}; take more or larger hardware (hardware=PRESET) or smaller "
        "students, or insist: give both model.seq_length and hardware.micro_batch_size"
    )
