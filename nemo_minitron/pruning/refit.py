"""The stage that refits a compensated cut layer by layer before it is written."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

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
    scores_folder,
)
from nemo_minitron.pruning.command import COMPENSATION, check, compensated_cut, measured
from nemo_minitron.pruning.compensated import CompensatedCut
from nemo_minitron.pruning.refitted import save_refit
from nemo_minitron.pruning.sequential import SequentialRefit
from nemo_minitron.training.inputs import LOG


def refit_folder(config: PruneConfig) -> Path:
    """Where a refit lies: beside the scores, named by what is cut."""
    told = json.dumps(dataclasses.asdict(config.prune), sort_keys=True, default=str)
    scores = scores_folder(config)
    return scores.with_name(f"{scores.name}.refit-{hashlib.sha256(told.encode()).hexdigest()[:12]}")


def refit(config: PruneConfig, scores: str | Path | None, scan: str | Path | None = None) -> Manifest:
    """Refits the student that `config` asks for (sequential.py) on prune.num_block_samples samples.

    Args:
        scores, scan: folders, as pruning.stage.prune takes them.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: the folder holds a refit of another teacher or of other samples.
    """
    teacher = check(config)
    calibration = calibration_of(config, teacher)
    # One layer of each model is on every rank, whole.
    layout = dataclasses.replace(layout_of(config.trainer, config.model), tensor_parallel=1, pipeline_parallel=1)
    check_block_samples(config, layout, ". prune.refit=once needs none")
    plan, found_scores, found_scan, inputs = measured(config, teacher, scores, scan)
    fingerprints = {name: Manifest.read(folder).key for name, folder in inputs.items() if name != "teacher"}
    return run_on_samples(
        config,
        calibration,
        layout,
        lambda partial: _work(
            partial,
            config,
            teacher,
            compensated_cut(teacher, plan, found_scores, found_scan, config.prune),
            layout,
            calibration,
        ),
        stage="refit",
        function="nemo_minitron.flow.run:refit",
        output=refit_folder(config),
        num_samples=config.prune.num_block_samples,
        plan=dataclasses.asdict(plan),
        compensation={name: getattr(config.prune, name) for name in COMPENSATION},
        measured=fingerprints,
    )


def _work(
    partial: Path,
    config: PruneConfig,
    teacher: Checkpoint,
    cut: CompensatedCut,
    layout: Layout,
    calibration: Calibration,
) -> dict[str, Any]:
    import time

    from nemo_minitron.megatron.forward import parallel_ranks
    from nemo_minitron.megatron.session import engine

    sequences, samples = calibration.sequences(config.prune.num_block_samples, config.seed)
    tensors: dict[str, Any] = {}
    report: list[dict[str, Any]] = []
    with engine(config.seed, partial / LOG, cuda=layout.cuda), parallel_ranks(layout, config.seed):
        started = time.perf_counter()
        every, layers = config.trainer.log_every_n_steps, cut.student.num_layers
        sequential = SequentialRefit(cut, teacher, layout, dealt(sequences), config.inference.batch_size)
        with Progress("refit", layers, unit="layer", every=every) as progress:
            for found, said in sequential.layers():
                tensors |= found if rank() == 0 else {}
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
