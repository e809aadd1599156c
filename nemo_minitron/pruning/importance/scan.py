"""Scans the blocks of layers that a depth cut may leave out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import parse_layers, runs
from nemo_minitron.artifacts import DepthScan, ImportanceScores, Manifest
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.config import PruneConfig
from nemo_minitron.launch.ranks import rank
from nemo_minitron.megatron.layout import Layout, check_fits, layout_of
from nemo_minitron.pruning.calibration import (
    HOLD_OUT,
    Calibration,
    calibration_of,
    check_block_samples,
    given,
    run_on_samples,
)
from nemo_minitron.pruning.folders import scan_folder, scores_folder
from nemo_minitron.pruning.importance.blocks import blocks_of, choice_cost, scan_blocks, scan_layers
from nemo_minitron.training.inputs import LOG

if TYPE_CHECKING:
    from torch import Tensor


def scan(config: PruneConfig, teacher: Checkpoint | None = None) -> Manifest:
    """Makes the scan of blocks that `config` needs, or finds it made.

    Every contiguous block of as many layers as prune.num_layers leaves out (prune.depth_by=block_loss), each layer in
    rounds (compensated_loss), or just the layers that are named, or chosen by block influence.

    Args:
        teacher: none: it is opened.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: the folder holds a scan of another teacher or of other samples.
    """
    teacher = teacher or open_checkpoint(config.teacher, "teacher")
    folder = scan_folder(config)
    if given(config, folder):
        return Manifest.read(folder)
    drop = _named(config)
    calibration = calibration_of(config, teacher)
    layout = layout_of(config.trainer, config.model)
    check_fits(teacher.architecture, layout, "teacher")
    check_block_samples(config, layout)
    return run_on_samples(
        config,
        calibration,
        layout,
        lambda partial: write_scan(partial, config, teacher, layout, calibration, drop),
        stage="scan",
        function="nemo_minitron.pruning.importance.scan:scan",
        output=folder,
        num_samples=config.prune.num_block_samples,
        drop_layers=drop,
        **_choice(config),
    )


def _choice(config: PruneConfig) -> dict[str, Any]:
    """What tells choices by maps apart."""
    targets = config.prune
    settings = {"depth_samples": targets.depth_samples, "depth_beam": targets.depth_beam}
    return settings if targets.chooses_by_maps else {}


def cost(num_layers: int, config: PruneConfig, length: int) -> str:
    """What choosing layers by maps will run, in words, of a teacher of `num_layers` and samples of `length` tokens."""
    targets = config.prune
    kept = num_layers if targets.num_layers is None else targets.num_layers
    count, held_out = num_layers - kept, targets.num_block_samples // HOLD_OUT
    samples = min(targets.depth_samples, held_out)
    forwards = choice_cost(num_layers, count, targets.depth_beam)
    fits = (1 + (count - 1) * targets.depth_beam) * (targets.num_block_samples - held_out) if count else 0
    return (
        f"choosing {count} of {num_layers} layers with their maps in place: {forwards} layer forwards on each of "
        f"{samples} x {length} tokens ({forwards * samples / num_layers:.0f} samples through the whole teacher), and "
        f"{fits} samples through it to fit maps"
    )


def _named(config: PruneConfig) -> list[int] | None:
    """The layers that are given, or chosen by block influence (1-based); None: the scan shall choose."""
    if config.prune.drop_layers:
        return sorted(set(parse_layers(config.prune.drop_layers)))
    if config.prune.chooses_block:
        return None
    scores = ImportanceScores.load(scores_folder(config))
    return sorted(scores.layers_by_importance()[config.prune.num_layers :])


def write_scan(
    partial: Path,
    config: PruneConfig,
    teacher: Checkpoint,
    layout: Layout,
    calibration: Calibration,
    drop: list[int] | None,
) -> dict[str, Any]:
    """Runs the teacher over the samples and writes the scan; returns what its manifest says."""
    import time

    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.session import engine

    sequences, samples = calibration.sequences(config.prune.num_block_samples, config.seed)
    if rank() == 0 and config.prune.chooses_by_maps:
        print(f"scan: {cost(teacher.architecture.num_layers, config, calibration.length)}", file=sys.stderr)
    with engine(config.seed, partial / LOG, cuda=layout.cuda), parallel_ranks(layout, config.seed):
        model = load_model(teacher.architecture, layout, teacher, local_spec=True)
        started = time.perf_counter()
        result = _scan(model, sequences, config, drop)
        seconds = time.perf_counter() - started
    if rank() == 0:
        dataclasses.replace(result, teacher=teacher.content).save(partial)
    report = {name: value for name, value in result.report.items() if isinstance(value, int | float | str)}
    return {
        "metrics": {"samples": len(samples["starts"]), "dropped_layers": result.drop_layers, **report},
        "timings": {"scan_seconds": seconds},
        "details": {"blocks": result.blocks, "report": result.report, "samples": samples, "teacher": teacher.content},
    }


def _scan(model: Any, sequences: Tensor, config: PruneConfig, drop: list[int] | None) -> DepthScan:
    targets, batch, layers = config.prune, config.inference.batch_size, model.config.num_layers
    every = config.trainer.log_every_n_steps
    if drop:
        return scan_blocks(model, sequences, batch, runs(drop), choose=False, every=every)
    count = layers - targets.num_layers
    if config.prune.chooses_by_maps:
        beam, samples = targets.depth_beam, targets.depth_samples
        return scan_layers(model, sequences, batch, count, samples=samples, beam=beam, every=every)
    return scan_blocks(model, sequences, batch, blocks_of(layers, count), choose=True, every=every)
