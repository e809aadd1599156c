"""What a search says of its finalists: losses on validation and test text, bytes where they are served, and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.data.module import paths
from nemo_minitron.jobs.progress import Progress
from nemo_minitron.launch.ranks import rank
from nemo_minitron.megatron.layout import layout_of
from nemo_minitron.search.budgets import served_bytes
from nemo_minitron.search.speeds import device_of, runs_in_bf16
from nemo_minitron.search.task import Task
from nemo_minitron.training.inputs import LOG

if TYPE_CHECKING:
    from nemo_minitron.search.speeds import SpeedTable

TEACHER = "teacher"
SPLITS = ("validation", "test")
#: Tokens that decode makes in a round, as layers are timed for the table.
NEW_TOKENS = 8


def measured_finals(
    partial: Path, task: Task, places: Mapping[str, Path], prefixes: dict[str, list], length: int
) -> list[dict[str, Any]]:
    """The teacher and each finalist: `name`, `parameters`, `validation_loss`, `test_loss`, `memory_bytes`, `speed`.

    Args:
        places: name -> checkpoint, the best first.
        length: tokens a sample.

    Returns:
        the teacher first; `speed` is empty where none is measured (search.speed_rounds=0), on a GPU or a CPU as the
        rounds are.
    """
    checkpoints = {TEACHER: task.teacher} | {name: open_checkpoint(path) for name, path in places.items()}
    losses = losses_of(partial, task, checkpoints, prefixes, length)
    speeds = speeds_of(task, checkpoints) if task.config.search.speed_rounds and rank() == 0 else {}
    found = []
    for name, checkpoint in checkpoints.items():
        shape = checkpoint.architecture
        found.append(
            {
                "name": name,
                "parameters": shape.parameters(),
                **{f"{split}_loss": losses[name].get(split) for split in SPLITS},
                "memory_bytes": served_bytes(task.config.search, task.teacher.architecture, shape),
                "speed": speeds.get(name, {}),
            }
        )
    return found


def losses_of(
    partial: Path, task: Task, checkpoints: Mapping[str, Checkpoint], prefixes: dict[str, list], length: int
) -> dict[str, dict[str, float]]:
    """Name -> split -> nats a token, on as much of each split as a validation reads."""
    from nemo_minitron.data.samples import consecutive_sequences
    from nemo_minitron.evaluation.loss import mean_loss
    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.session import engine

    config = task.config
    layout = layout_of(config.trainer, config.model)
    limit = config.trainer.limit_val_batches * config.model.global_batch_size
    text = {
        split: consecutive_sequences(paths(prefixes[split]), length, limit) for split in SPLITS if split in prefixes
    }
    losses: dict[str, dict[str, float]] = {}
    with (
        engine(config.seed, partial / LOG, cuda=layout.cuda),
        parallel_ranks(layout, config.seed),
        Progress("evaluate finalists", len(checkpoints), unit="model", every=1) as progress,
    ):
        for name, checkpoint in checkpoints.items():
            model = load_model(checkpoint.architecture, layout, checkpoint)
            losses[name] = {
                split: mean_loss(model, sequences, config.model.micro_batch_size) for split, sequences in text.items()
            }
            progress.advance(1, model=name)
    return losses


def speeds_of(task: Task, checkpoints: Mapping[str, Checkpoint]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Name -> prefill, decode -> tokens a second, the share of the teacher's, and what the table of layers says of it.

    Every model is run whole, in turns with the others (`minitron benchmark`).
    """
    from nemo_minitron.evaluation.speed import measure

    results = measure(benchmark_config(task, checkpoints), list(checkpoints.values()))
    own, speeds = task.teacher.architecture, {}
    for entry in results["models"]:
        shape = checkpoints[entry["name"]].architecture
        speeds[entry["name"]] = {
            kind: {
                "tokens_per_second": entry[f"{kind}_tokens_per_second"]["median"],
                "of_teacher": entry["ratios"][f"{kind}_tokens_per_second"],
                "predicted": predicted(task.speeds.get(kind), own, shape),
            }
            for kind in ("prefill", "decode")
        }
    return speeds


def benchmark_config(task: Task, checkpoints: Mapping[str, Checkpoint]) -> c.BenchmarkConfig:
    """`minitron benchmark` of these, at the batch and the length that the table of layers has."""
    settings, layout = task.config.search, layout_of(task.config.trainer, task.config.model)
    longest = task.teacher.architecture.seq_length
    return c.validated(
        c.BenchmarkConfig(
            models=[str(checkpoint.path) for checkpoint in checkpoints.values()],
            names=list(checkpoints),
            device=device_of(layout),
            dtype="bf16" if runs_in_bf16(layout) else "32",
            batch_size=settings.batch_size,
            prompt_tokens=max(1, min(task.speed_length, longest - NEW_TOKENS)),
            new_tokens=NEW_TOKENS,
            rounds=settings.speed_rounds,
            warmup_rounds=1,
            seed=task.config.seed,
        )
    )


def predicted(table: SpeedTable | None, teacher: Architecture, shape: Architecture) -> float | None:
    """How many times as fast as the teacher a shape is by the table; None without one."""
    return None if table is None else table.seconds(teacher) / table.seconds(shape)


def errors_of(finals: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Kind of speed -> the largest relative error of the table over the finalists, where there is a table."""
    found: dict[str, float] = {}
    for entry in finals:
        for kind, speed in entry["speed"].items():
            if entry["name"] != TEACHER and speed["predicted"] is not None:
                error = abs(speed["predicted"] / speed["of_teacher"] - 1)
                found[kind] = max(found.get(kind, 0.0), error)
    return found
