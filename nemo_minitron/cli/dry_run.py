"""What would be done, in words: what `--dry-run` prints of a single stage."""

import dataclasses
import os
from typing import Any

import yaml

from nemo_minitron.architecture import human
from nemo_minitron.config import DistillConfig, ModelConfig, PruneConfig, StageConfig, TeachConfig


def describe_stage(config: StageConfig | PruneConfig) -> str:
    """What a single stage would read, run and write, in words; opens nothing and touches nothing."""
    lines = ["reads"]
    for role, path in _inputs(config):
        there = "" if not isinstance(path, str) or os.path.exists(path) else "  (not there)"
        lines.append(f"  {role}: {path}{there}")
    state = "there already" if os.path.lexists(config.output) else "new"
    what = "a teacher's answers" if isinstance(config, TeachConfig) else config.target_format
    lines += ["writes", f"  {config.output}: {what}, {state}"]
    trainer, model = config.trainer, config.model
    sizes = {
        kind: getattr(model, f"{kind}_model_parallel_size", getattr(model, f"{kind}_parallel_size", 1))
        for kind in ("tensor", "pipeline", "context")
    }
    world = trainer.num_nodes * trainer.devices
    layout = " x ".join(f"{kind} {size}" for kind, size in sizes.items())
    lines += [
        "runs",
        f"  {world} rank(s) = {trainer.num_nodes} node(s) x {trainer.devices}, {layout}, precision {trainer.precision}",
    ]
    if isinstance(model, ModelConfig) and not isinstance(config, TeachConfig):
        length = model.data.seq_length or model.encoder_seq_length
        tokens = (
            f"{length} = {human(trainer.max_steps * model.global_batch_size * length)}" if length else "the model's"
        )
        lines.append(f"  {trainer.max_steps} steps x {model.global_batch_size} samples x {tokens} tokens")
    return "\n".join(
        [*lines, "", "configuration:", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).rstrip()]
    )


def _inputs(config: StageConfig | PruneConfig) -> list[tuple[str, Any]]:
    """Role and path of what a stage's configuration names."""
    model = config.model
    named = [
        ("checkpoint", model.restore_from_path),
        ("teacher", getattr(model, "kd_teacher_restore_from_path", None)),
        ("tokenizer", getattr(model, "tokenizer", None)),
        ("data", model.data.data_prefix),
        ("instructions", model.data.instructions),
        ("blend", model.data.blend),
        ("scores", getattr(getattr(config, "prune", None), "scores_path", None)),
    ]
    if isinstance(config, DistillConfig):
        named += [("answers", folder) for folder in config.kd.folders]
    return [(role, path) for role, path in named if path]
