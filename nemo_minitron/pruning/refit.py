"""The stage that refits a compensated cut layer by layer before it is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config import PruneConfig
from nemo_minitron.jobs.progress import Progress
from nemo_minitron.launch.ranks import rank
from nemo_minitron.megatron.layout import Layout, layout_of
from nemo_minitron.pruning.calibration import (
    Calibration,
    calibration_of,
    check_block_samples,
    dealt,
    run_on_samples,
)
from nemo_minitron.pruning.folders import refit_folder
from nemo_minitron.pruning.measurements import Measurements, open_teacher, read_measurements
from nemo_minitron.pruning.refitted import save_refit
from nemo_minitron.pruning.sequential import SequentialRefit
from nemo_minitron.pruning.student import compensated_cut, compensation_of
from nemo_minitron.training.inputs import LOG

if TYPE_CHECKING:
    from torch import Tensor


def refit(config: PruneConfig, teacher: Checkpoint | None = None) -> Manifest:
    """Refits the student that `config` asks for (sequential.py) on prune.num_block_samples samples.

    The scores and the scan that it rests on have to be there.

    Args:
        teacher: none: it is opened.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: the folder holds a refit of another teacher or of other samples.
    """
    teacher = teacher or open_teacher(config)
    calibration = calibration_of(config, teacher)
    # One layer of each model is on every rank, whole.
    layout = dataclasses.replace(layout_of(config.trainer, config.model), tensor_parallel=1, pipeline_parallel=1)
    check_block_samples(config, layout, ". prune.refit=once needs none")
    measured = read_measurements(config, teacher)
    return run_on_samples(
        config,
        calibration,
        layout,
        lambda partial: write_refit(partial, config, teacher, measured, layout, calibration),
        stage="refit",
        function="nemo_minitron.pruning.refit:refit",
        output=refit_folder(config),
        num_samples=config.prune.num_block_samples,
        plan=dataclasses.asdict(measured.plan),
        compensation=compensation_of(config.prune, measured.plan),
        measured={name: Manifest.read(folder).key for name, folder in measured.folders.items()},
    )


def write_refit(
    partial: Path,
    config: PruneConfig,
    teacher: Checkpoint,
    measured: Measurements,
    layout: Layout,
    calibration: Calibration,
) -> dict[str, Any]:
    """Refits on this rank's share of the samples and writes the matrices; returns what the manifest says."""
    import time

    from nemo_minitron.megatron.forward import parallel_ranks
    from nemo_minitron.megatron.session import engine

    cut = compensated_cut(teacher, measured, config.prune)
    sequences, samples = calibration.sequences(config.prune.num_block_samples, config.seed)
    tensors: dict[str, Tensor] = {}
    report: list[dict[str, Any]] = []
    with engine(config.seed, partial / LOG, cuda=layout.cuda), parallel_ranks(layout, config.seed):
        started = time.perf_counter()
        every, layers = config.trainer.log_every_n_steps, cut.student.num_layers
        sequential = SequentialRefit(cut, teacher, layout, dealt(sequences), config.inference.batch_size)
        with Progress("refit", layers, unit="layer", every=every) as progress:
            for matrices, said in sequential.layers():
                tensors |= matrices if rank() == 0 else {}
                report += said
                progress.advance()
        seconds = time.perf_counter() - started
    if rank() == 0:
        save_refit(partial, tensors, cut, teacher.content)
    return {
        "metrics": {"samples": len(samples["starts"]), "error_left": _mean(report)},
        "timings": {"refit_seconds": seconds},
        "details": {"matrices": report, "samples": samples, "teacher": teacher.content},
    }


def _mean(report: list[dict[str, Any]]) -> dict[str, float]:
    """Kind of matrix -> mean over the layers of the held-out error that is left, 1 without a refit."""
    kinds = dict.fromkeys(entry["matrix"] for entry in report)
    parts = {kind: [entry["left"] for entry in report if entry["matrix"] == kind] for kind in kinds}
    return {kind: round(sum(values) / len(values), 4) for kind, values in parts.items()}
