"""Scores a teacher's layers, channels, neurons and heads: one calibration pass through ModelOpt's estimators."""

import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import ImportanceScores, Manifest
from nemo_minitron.checkpoints import Checkpoint, open_checkpoint
from nemo_minitron.config import PruneConfig, missing_data
from nemo_minitron.data.module import check_fits as check_data
from nemo_minitron.data.module import paths, resolve_prefixes
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs import Job
from nemo_minitron.runtime.inputs import LOG, data_files
from nemo_minitron.runtime.launch import run_stage
from nemo_minitron.runtime.layout import Layout, check_fits, layout_of


def scores_folder(config: PruneConfig) -> Path:
    """Where the scores of a teacher lie: prune.scores_path, or beside the teacher's checkpoint."""
    if config.prune.scores_path:
        return Path(config.prune.scores_path)
    teacher = Path(config.model.restore_from_path)
    return teacher.with_name(f"{teacher.name}.scores")


def score(config: PruneConfig) -> Manifest:
    """Makes the folder of importance scores, or finds it made already from the same teacher, data and samples.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: the folder holds scores of another teacher or of other samples.
    """
    teacher = open_checkpoint(config.model.restore_from_path, "teacher")
    problems = missing_data(config.model.data)
    if problems:
        raise ConfigError([f"{problems[0]}, to score the teacher on; only prune.drop_layers alone needs none"], "prune")
    prefixes = resolve_prefixes(config.model.data.data_prefix)
    length = config.model.data.seq_length or config.model.encoder_seq_length or teacher.architecture.seq_length
    check_data({"train": prefixes["train"]}, seq_length=length, vocab_size=teacher.architecture.vocab_size)
    layout = layout_of(config.trainer, config.model)
    check_fits(teacher.architecture, layout, "teacher")
    job = Job(
        stage="score",
        output=scores_folder(config),
        config={
            "num_samples": config.prune.num_samples,
            "seq_length": length,
            "bf16": layout.bf16,
            "layout": dataclasses.asdict(layout),
            "command": dataclasses.asdict(config),
        },
        inputs={"teacher": config.model.restore_from_path, **data_files({"data": prefixes["train"]})},
        seed=config.seed,
        overwrite=config.overwrite,
        ignore=("overwrite", "layout", "command"),
    )
    return run_stage(
        job,
        lambda partial: _work(partial, config, teacher, layout, paths(prefixes["train"]), length),
        stage="nemo_minitron.importance.scoring:score",
        config=config,
        trainer=config.trainer,
        resumable=False,
    )


def _work(
    partial: Path, config: PruneConfig, teacher: Checkpoint, layout: Layout, prefixes: list[str], length: int
) -> dict[str, Any]:
    import time

    from nemo_minitron.data.samples import random_sequences
    from nemo_minitron.runtime.engine import engine
    from nemo_minitron.runtime.ranks import load_model, parallel_ranks

    sequences, starts = random_sequences(prefixes, config.prune.num_samples, length, config.seed)
    with engine(config.seed, partial / LOG), parallel_ranks(layout, config.seed):
        model = load_model(teacher.architecture, layout, teacher, local_spec=True)
        started = time.perf_counter()
        scores = collect(model, sequences, config.inference.batch_size)
        seconds = time.perf_counter() - started
        scores.save(partial)
    return {
        "metrics": {
            "samples": len(starts),
            "tokens": int(sequences[:, :-1].numel()),
            "block_influence": [round(float(value), 6) for value in scores.block_influence],
        },
        "timings": {"calibration_seconds": seconds},
        "details": {"sample_starts": starts, "architecture": teacher.architecture.to_dict()},
    }


def collect(model: Any, sequences: Any, batch: int) -> ImportanceScores:
    """Runs ModelOpt's Minitron estimators over token sequences [n, s + 1]; `model` cannot be used afterwards.

    ModelOpt scores inside its search: it is asked for the model's own sizes, so it cuts nothing.
    """
    import modelopt.torch.prune as mtp

    from nemo_minitron.runtime.modelopt_norms import local_norms_prunable
    from nemo_minitron.runtime.ranks import run_forward

    found: list[ImportanceScores] = []

    def calibrate(dynamic: Any) -> None:
        run_forward(dynamic, sequences, batch)
        found.append(_gather(dynamic))

    own = {name: getattr(model.config, name) for name in ("hidden_size", "ffn_hidden_size", "num_layers")}
    with local_norms_prunable():
        mtp.prune(
            model,
            mode="mcore_minitron",
            constraints={"export_config": own},
            dummy_input=None,
            config={"forward_loop": calibrate},
        )
    return found[0]


def _gather(model: Any) -> ImportanceScores:
    """The estimators' sums, in order of the layers, of all pipeline stages."""
    import torch
    from megatron.core import parallel_state

    layers = model.decoder.layers
    local = {
        "numbers": [layer.layer_number for layer in layers],
        "hidden": torch.stack(list(model._activations.values())).cpu(),
        "ffn": torch.stack([layer.mlp._activations for layer in layers]).cpu(),
        "heads": torch.stack([layer.self_attention._activations for layer in layers]).cpu(),
        "block_influence": torch.tensor([float(layer._scores) for layer in layers], dtype=torch.float64),
    }
    stages = [local]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        stages = [None] * parallel_state.get_pipeline_model_parallel_world_size()
        torch.distributed.all_gather_object(stages, local, group=parallel_state.get_pipeline_model_parallel_group())
        stages.sort(key=lambda stage: stage["numbers"][0])
    return ImportanceScores(**{name: torch.cat([stage[name] for stage in stages]) for name in ImportanceScores.names()})
