"""The cut: teacher, plan and scores in, an ordinary smaller checkpoint out."""

import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import ImportanceScores, Manifest, PruningPlan
from nemo_minitron.checkpoints import Checkpoint, open_checkpoint
from nemo_minitron.config import PruneConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs import Job
from nemo_minitron.pruning.plan import check_targets, plan_cut


def check(config: PruneConfig) -> Checkpoint:
    """Checks targets and teacher, and that the output is free or ours; returns the teacher."""
    teacher = open_checkpoint(config.model.restore_from_path, "teacher")
    check_targets(teacher.architecture, config.prune)
    return teacher


def prune(config: PruneConfig, scores_folder: str | Path | None) -> Manifest:
    """Cuts the teacher with the scores in `scores_folder` (None where the plan needs none).

    Raises:
        ConfigError: a target is off the grid, above the teacher, or names layers that are not there.
        CheckpointError: the teacher is missing, truncated, or disagrees with its own context.
        OutputExistsError: export.save_path was made from something else.
    """
    teacher = check(config)
    scores = None
    inputs: dict[str, Any] = {"teacher": config.model.restore_from_path}
    if config.prune.needs_scores:
        scores = ImportanceScores.load(scores_folder)
        check_scores(scores, teacher.architecture, scores_folder)
        inputs["scores"] = scores_folder
    plan = plan_cut(teacher.architecture, config.prune, scores)
    relevant = {"plan": dataclasses.asdict(plan), "command": dataclasses.asdict(config)}
    job = Job(
        stage="prune",
        output=Path(config.export.save_path),
        config=relevant,
        inputs=inputs,
        overwrite=config.overwrite,
        ignore=("overwrite", "command"),
    )
    return job.run(lambda partial: _work(partial, config, teacher, plan, scores))


def check_scores(scores: ImportanceScores, architecture: Architecture, folder: str | Path | None) -> None:
    """Raises MinitronError where the scores' shapes are not those of the teacher."""
    a = architecture
    expected = {
        "hidden": (2 * a.num_layers, a.hidden_size),
        "ffn": (a.num_layers, a.ffn_hidden_size),
        "heads": (a.num_layers, a.num_attention_heads * a.kv_channels),
        "block_influence": (a.num_layers,),
    }
    for name, shape in expected.items():
        if tuple(getattr(scores, name).shape) != shape:
            raise MinitronError(
                f"{folder}: scores of another teacher: {name} is {tuple(getattr(scores, name).shape)}, "
                f"this teacher needs {shape}; give another prune.scores_path"
            )


def _work(
    partial: Path, config: PruneConfig, teacher: Checkpoint, plan: PruningPlan, scores: ImportanceScores | None
) -> dict[str, Any]:
    import time

    import torch

    from nemo_minitron.pruning.cut import cut
    from nemo_minitron.runtime.engine import engine
    from nemo_minitron.runtime.inputs import LOG
    from nemo_minitron.runtime.layout import Layout
    from nemo_minitron.runtime.ranks import load_model, parallel_ranks
    from nemo_minitron.runtime.weights import save_checkpoint

    student = Architecture.from_dict(plan.student)
    layout = Layout(cuda=torch.cuda.is_available(), bf16=teacher.dtype == "bfloat16")
    with engine(config.seed, partial / LOG), parallel_ranks(layout, max(config.seed, 1)):
        model = load_model(teacher.architecture, layout, teacher, local_spec=True)
        started = time.perf_counter()
        cut(model, plan, scores, config.prune)
        seconds = time.perf_counter() - started
        save_checkpoint(
            model,
            student,
            partial,
            output=config.output,
            to=config.to,
            tokenizer=teacher.tokenizer_files,
            generation=teacher.generation,
        )
    return {
        "metrics": {
            "parameters": student.parameters(),
            "non_embedding_parameters": student.non_embedding_parameters(),
            "teacher_parameters": teacher.architecture.parameters(),
            "dropped_layers": plan.drop_layers,
        },
        "timings": {"cut_seconds": seconds},
        "details": {"plan": dataclasses.asdict(plan), "architecture": plan.student},
    }
