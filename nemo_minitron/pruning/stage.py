"""The cut: teacher, plan and scores in, an ordinary smaller checkpoint out; tensor by tensor, of and in any format."""

import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import ImportanceScores, Manifest, PruningPlan
from nemo_minitron.checkpoints import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.convert import check_room, progress
from nemo_minitron.checkpoints.write import place_in, write_checkpoint
from nemo_minitron.config import PruneConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs import Job
from nemo_minitron.pruning.cut import choose, cut
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
        sampled=("teacher",),
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

    student = Architecture.from_dict(plan.student)
    place = place_in(partial, config.output, config.target_format)
    started = time.perf_counter()
    tensors = cut(teacher.tensors, plan, choose(scores, teacher.architecture, plan.width))
    check_room(config.output, sum(tensor.nbytes for tensor in tensors.values()))
    with progress(tensors, "prune") as watched:
        write_checkpoint(place, config.target_format, student, watched, teacher.tokenizer_files, teacher.generation)
    seconds = time.perf_counter() - started
    open_checkpoint(place, "student")
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
