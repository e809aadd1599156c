"""Scores a teacher's layers, channels, neurons and heads: one calibration pass through ModelOpt's estimators.

Where the installed ModelOpt does not take Megatron's local layers, the same sums are made here (estimators.py).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture, natural_divisor
from nemo_minitron.artifacts import ImportanceScores, Manifest
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.config import PruneConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.progress import Progress
from nemo_minitron.launch.ranks import rank
from nemo_minitron.megatron.layout import Layout, check_fits, layout_of
from nemo_minitron.packages.versions import modelopt_takes_local_layers
from nemo_minitron.pruning.calibration import Calibration, calibration_of, given, run_on_samples
from nemo_minitron.pruning.folders import scores_folder
from nemo_minitron.training.inputs import LOG

if TYPE_CHECKING:
    from torch import Tensor


def score(config: PruneConfig, teacher: Checkpoint | None = None) -> Manifest:
    """Makes the folder of importance scores, or finds it made already from the same teacher, data and samples.

    Without data, scores that are there already are taken as they are; the cut checks that they are of this teacher.

    Args:
        teacher: none: it is opened.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: the folder holds scores of another teacher or of other samples.
    """
    folder = scores_folder(config)
    if given(config, folder):
        return Manifest.read(folder)
    teacher = teacher or open_checkpoint(config.teacher, "teacher")
    calibration = calibration_of(config, teacher)
    layout = layout_of(config.trainer, config.model)
    check_fits(teacher.architecture, layout, "teacher")
    return run_on_samples(
        config,
        calibration,
        layout,
        lambda partial: write_scores(partial, config, teacher, layout, calibration),
        stage="score",
        function="nemo_minitron.pruning.importance.scoring:score",
        output=folder,
        num_samples=config.prune.num_samples,
        statistics=config.prune.statistics,
    )


def write_scores(
    partial: Path, config: PruneConfig, teacher: Checkpoint, layout: Layout, calibration: Calibration
) -> dict[str, Any]:
    """Runs the teacher over the samples and writes the scores; returns what their manifest says."""
    import time

    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.session import engine

    sequences, samples = calibration.sequences(config.prune.num_samples, config.seed)
    with engine(config.seed, partial / LOG, cuda=layout.cuda), parallel_ranks(layout, config.seed):
        model = load_model(teacher.architecture, layout, teacher, local_spec=True)
        started = time.perf_counter()
        every = config.trainer.log_every_n_steps
        with Progress("importance", len(sequences), unit="sample", every=every) as progress:
            scores, moments = collect(
                model, sequences, config.inference.batch_size, config.prune.statistics, progress=progress
            )
        _write(partial, scores, moments, teacher.content, samples)
        seconds = time.perf_counter() - started
    notes = [note for note in [singular(teacher.architecture, samples["tokens"])] if note and config.prune.statistics]
    for note in notes if rank() == 0 else []:
        print(f"score: {note}", file=sys.stderr)
    return {
        "metrics": {
            "samples": len(samples["starts"]),
            "tokens": samples["tokens"],
            "block_influence": [round(float(value), 6) for value in scores["block_influence"]],
        },
        "timings": {"calibration_seconds": seconds},
        "details": {
            "samples": samples,
            "notes": notes,
            "teacher": teacher.content,
            "architecture": teacher.architecture.to_dict(),
        },
    }


def singular(a: Architecture, tokens: int) -> str | None:
    """What to say where there are fewer tokens than channels, so that second moments are singular."""
    widths = {
        "hidden channels": a.hidden_size,
        "FFN neurons": a.ffn_hidden_size,
        "attention channels": a.num_attention_heads * a.kv_channels,
    }
    short = [f"{width} {name}" for name, width in widths.items() if tokens < width]
    if not short:
        return None
    return (
        f"{tokens} calibration tokens for {' and '.join(short)}: second moments are singular, the ridge fills them; "
        "give more prune.num_samples or a longer model.data.seq_length"
    )


def _write(
    partial: Path, scores: dict[str, Any], moments: dict[str, Tensor], teacher: str, samples: dict[str, Any]
) -> None:
    """Puts what the pipeline stages found into one file; every rank calls it."""
    import torch
    from megatron.core import parallel_state
    from safetensors.torch import load_file, save_file

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    parts = [partial / f"moments-{number}.safetensors" for number in range(stages)]
    if stages > 1:
        save_file(moments, str(parts[stage]))
        torch.distributed.barrier()
    if rank() == 0:
        if stages > 1:
            moments = {name: value for part in parts for name, value in load_file(str(part)).items()}
        ImportanceScores(**scores, moments=moments, teacher=teacher, samples=samples).save(partial)
        for part in parts:
            part.unlink(missing_ok=True)
    if stages > 1:
        torch.distributed.barrier()


def collect(
    model: Any, sequences: Tensor, batch: int, statistics: bool, *, progress: Progress | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs Minitron's estimators over token sequences [n, s + 1]; `model` cannot be used afterwards.

    Returns:
        scores by their names in ImportanceScores, of all pipeline stages, and with `statistics` the second moments of
        this stage's layers.
    """
    from nemo_minitron.megatron.forward import run_forward
    from nemo_minitron.pruning.importance.moments import gathered

    moments: dict[str, Tensor] = {}

    def calibrate(model: Any) -> None:
        with gathered(model) if statistics else contextlib.nullcontext() as sums:
            run_forward(model, sequences, batch, progress=progress)
        moments.update(sums.means() if sums else {})

    estimate = _by_modelopt if modelopt_takes_local_layers() else _by_hooks
    return _gather(estimate(model, calibrate)), moments


def _by_hooks(model: Any, calibrate: Callable[[Any], None]) -> dict[str, Any]:
    """This stage's scores by our own estimators."""
    from nemo_minitron.pruning.importance.estimators import estimated

    with estimated(model) as estimates:
        calibrate(model)
    return estimates.scores()


def _by_modelopt(model: Any, calibrate: Callable[[Any], None]) -> dict[str, Any]:
    """This stage's scores by ModelOpt.

    It scores inside its search: it is asked for the model's own sizes, so it cuts nothing. It scores only what its grid
    has other sizes of, so the grid has to be finer than the model.
    """
    import modelopt.torch.prune as mtp
    import torch
    from modelopt.torch.prune.plugins.mcore_minitron import MCoreMinitronConfig

    from nemo_minitron.megatron.modelopt_norms import local_norms_prunable

    local: dict[str, Any] = {}

    def run(dynamic: Any) -> None:
        calibrate(dynamic)
        layers = dynamic.decoder.layers
        local.update(
            numbers=[layer.layer_number for layer in layers],
            hidden=torch.stack(list(dynamic._activations.values())).cpu(),
            ffn=torch.stack([layer.mlp._activations for layer in layers]).cpu(),
            heads=torch.stack([layer.self_attention._activations for layer in layers]).cpu(),
            block_influence=torch.tensor([float(layer._scores) for layer in layers], dtype=torch.float64),
        )

    own = {name: getattr(model.config, name) for name in ("hidden_size", "ffn_hidden_size", "num_layers")}
    finer = {
        f"{name}_divisor": max(1, min(natural_divisor(name, own[name]), own[name] // 2))
        for name in ("hidden_size", "ffn_hidden_size")
    }
    with local_norms_prunable():
        mtp.prune(
            model,
            mode=[("mcore_minitron", with_values(MCoreMinitronConfig(), finer))],
            constraints={"export_config": own},
            dummy_input=None,
            config={"forward_loop": run},
        )
    return local


def with_values(rules: Any, values: dict[str, Any]) -> Any:
    """ModelOpt's configuration, a tree of rules, with these values wherever it has such names."""
    for name, value in rules.items():
        if isinstance(value, dict):
            with_values(value, values)
        elif name in values:
            rules[name] = values[name]
    return rules


def _gather(local: dict[str, Any]) -> dict[str, Any]:
    """The scores of all pipeline stages, in order of the layers; raises MinitronError where one is not finite.

    Args:
        local: this stage's, with the numbers of its layers.
    """
    import torch
    from megatron.core import parallel_state

    stages = [local]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        stages = [{}] * parallel_state.get_pipeline_model_parallel_world_size()
        torch.distributed.all_gather_object(stages, local, group=parallel_state.get_pipeline_model_parallel_group())
        stages.sort(key=lambda stage: stage["numbers"][0])
    scores = {name: torch.cat([stage[name] for stage in stages]) for name in ImportanceScores.names()}
    for name, values in scores.items():
        bad = (~values.flatten(1).isfinite().all(dim=1) if values.ndim > 1 else ~values.isfinite()).nonzero().flatten()
        if len(bad):
            layer = int(bad[0]) // 2 if name == "hidden" else int(bad[0])
            raise MinitronError(
                f"layer {layer + 1}: importance of {name} is not finite; `minitron inspect --values` tells whether the "
                "weights are"
            )
    return scores
