"""The stage that refits a compensated cut layer by layer before it is written."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Manifest, TensorFile, save_tensors
from nemo_minitron.checkpoints import Checkpoint
from nemo_minitron.checkpoints.tensors import Computed, Lazy
from nemo_minitron.config import PruneConfig
from nemo_minitron.errors import EngineError
from nemo_minitron.progress import Progress
from nemo_minitron.pruning.compensated import CompensatedCut
from nemo_minitron.pruning.sequential import HOLD_OUT, SequentialRefit
from nemo_minitron.pruning.stage import COMPENSATION, check, compensated_cut, measured
from nemo_minitron.runtime.calibration import calibration_of, run_on_samples, scores_folder
from nemo_minitron.runtime.inputs import LOG
from nemo_minitron.runtime.launch import rank
from nemo_minitron.runtime.layout import Layout, layout_of

FILE = "refit.safetensors"


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
    layout = dataclasses.replace(layout_of(config.trainer, config.model), pipeline_parallel=1)
    _check_samples(config, layout)
    plan, found_scores, found_scan, inputs = measured(config, teacher, scores, scan)
    cut = compensated_cut(teacher, plan, found_scores, found_scan, config.prune)
    fingerprints = {name: Manifest.read(folder).key for name, folder in inputs.items() if name != "teacher"}
    return run_on_samples(
        config,
        calibration,
        layout,
        lambda partial: _work(partial, config, teacher, cut, layout, calibration),
        stage="refit",
        function="nemo_minitron.flow:refit",
        output=refit_folder(config),
        num_samples=config.prune.num_block_samples,
        plan=dataclasses.asdict(plan),
        compensation={name: getattr(config.prune, name) for name in COMPENSATION},
        measured=fingerprints,
    )


def _check_samples(config: PruneConfig, layout: Layout) -> None:
    ranks, count = layout.world_size, config.prune.num_block_samples
    if count < HOLD_OUT * ranks:
        raise EngineError(
            f"prune.num_block_samples = {count}: {HOLD_OUT} a rank are needed, {HOLD_OUT} x {ranks} = "
            f"{HOLD_OUT * ranks}; one in {HOLD_OUT} is held out. prune.refit=once needs none"
        )


def _work(
    partial: Path, config: PruneConfig, teacher: Checkpoint, cut: CompensatedCut, layout: Layout, calibration: Any
) -> dict[str, Any]:
    import time

    from megatron.core import parallel_state

    from nemo_minitron.runtime.engine import engine
    from nemo_minitron.runtime.ranks import parallel_ranks

    sequences, samples = calibration.sequences(config.prune.num_block_samples, config.seed)
    tensors: dict[str, Any] = {}
    report: list[dict[str, Any]] = []
    with engine(config.seed, partial / LOG, cuda=layout.cuda), parallel_ranks(layout, config.seed):
        ours = sequences[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
        started = time.perf_counter()
        every, layers = config.trainer.log_every_n_steps, cut.student.num_layers
        with Progress("refit", layers, unit="layer", every=every) as progress:
            for found, said in SequentialRefit(cut, teacher, layout, ours, config.inference.batch_size).layers():
                tensors |= found if rank() == 0 else {}
                report += said
                progress.advance()
        seconds = time.perf_counter() - started
    if rank() == 0:
        save_tensors(partial / FILE, tensors, {"teacher": teacher.content})
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


def refitted(student: dict[str, Lazy], folder: str | Path) -> tuple[dict[str, Lazy], dict[str, Any]]:
    """The student's tensors with the matrices of a refit in place of the cut's, and what is said of it."""
    file = TensorFile(Path(folder) / FILE)
    found = {
        name: Computed(student[name].shape, student[name].dtype, lambda name=name: file[name]) for name in file.names
    }
    manifest = Manifest.read(Path(folder))
    return student | found, {
        "refit": {"samples": manifest.metrics["samples"], "error_left": manifest.metrics["error_left"]}
    }
