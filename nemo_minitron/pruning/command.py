"""The cut: teacher, plan and scores in, an ordinary smaller checkpoint out; tensor by tensor, of and in any format."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import DepthScan, ImportanceScores, Manifest, PruningPlan
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint, place_in, write_checkpoint
from nemo_minitron.checkpoints.tensors import Lazy
from nemo_minitron.config import PruneConfig, PruneTargets
from nemo_minitron.conversion.writing import check_room, progress
from nemo_minitron.errors import CheckpointError, MinitronError
from nemo_minitron.jobs.job import Job
from nemo_minitron.pruning.choice import choose_by_saliency
from nemo_minitron.pruning.compensated import FINAL, CompensatedCut, Settings
from nemo_minitron.pruning.cut import Kept, choose, cut
from nemo_minitron.pruning.plan import check_targets, plan_cut
from nemo_minitron.pruning.refitted import kept_by, refitted

#: Settings that shape a compensated student beyond its plan.
COMPENSATION = ("ridge", "merge_heads", "untie", "gain_tolerance", "choose_by", "refit")


def check(config: PruneConfig) -> Checkpoint:
    """Checks targets and teacher, and that the output is free or ours; returns the teacher."""
    teacher = open_checkpoint(config.model.restore_from_path, "teacher")
    check_targets(teacher.architecture, config.prune)
    if config.method == "compensated" and config.prune.width:
        _check_final_norm(teacher)
    return teacher


def _check_final_norm(teacher: Checkpoint) -> None:
    """Raises CheckpointError where the final norm lets nothing through, so that there are no directions to keep."""
    gain = teacher.tensors[f"{FINAL}.weight"].read().double()
    gain = gain + (1.0 if teacher.architecture.layernorm_zero_centered_gamma else 0.0)
    if not gain.isfinite().all() or not gain.any():
        what = "are all 0" if gain.isfinite().all() else "are not all finite"
        raise CheckpointError(
            f"the teacher {teacher.path}: the gains of its final norm ({FINAL}.weight) {what}, so that its output says "
            "nothing of its stream, and there is nothing to choose directions by; prune.method=minitron cuts it anyway"
        )


def prune(
    config: PruneConfig,
    scores_folder: str | Path | None,
    scan_folder: str | Path | None = None,
    refit_folder: str | Path | None = None,
) -> Manifest:
    """Cuts the teacher with the scores in `scores_folder`, the scan of blocks in `scan_folder` and the refit in
    `refit_folder` (None where the plan needs none).

    Raises:
        ConfigError: a target is off the grid, above the teacher, or names layers that are not there.
        CheckpointError: the teacher is missing, truncated, or disagrees with its own context.
        OutputExistsError: export.save_path was made from something else.
    """
    teacher = check(config)
    plan, scores, scan, inputs = measured(config, teacher, scores_folder, scan_folder)
    if refit_folder is not None:
        inputs["refit"] = refit_folder
    relevant: dict[str, Any] = {"plan": dataclasses.asdict(plan), "command": dataclasses.asdict(config)}
    if config.method == "compensated":
        relevant["compensation"] = {name: getattr(config.prune, name) for name in COMPENSATION}
    job = Job(
        stage="prune",
        output=Path(config.export.save_path),
        config=relevant,
        inputs=inputs,
        overwrite=config.overwrite,
        ignore=("overwrite", "command"),
        sampled=("teacher", "scores", "scan", "refit"),
    )
    return job.run(lambda partial: _work(partial, config, teacher, plan, scores, scan, refit_folder))


def measured(
    config: PruneConfig, teacher: Checkpoint, scores_folder: str | Path | None, scan_folder: str | Path | None
) -> tuple[PruningPlan, ImportanceScores | None, DepthScan | None, dict[str, Any]]:
    """The plan, what it rests on, and the folders that this comes from, the teacher's first.

    Raises:
        MinitronError: scores or scan are another teacher's, or lack what is needed.
    """
    inputs: dict[str, Any] = {"teacher": config.model.restore_from_path}
    scores = scan = None
    if config.prune.needs_scores:
        scores = ImportanceScores.load(scores_folder)
        check_scores(scores, teacher, scores_folder, statistics=config.method == "compensated" and config.prune.width)
        inputs["scores"] = scores_folder
    if config.needs_scan:
        scan = DepthScan.load(scan_folder)
        check_scan(scan, teacher, scan_folder)
        inputs["scan"] = scan_folder
    return plan_cut(teacher.architecture, config.prune, scores, scan, config.method), scores, scan, inputs


def check_scores(scores: ImportanceScores, teacher: Checkpoint, folder: str | Path | None, statistics: bool) -> None:
    """Raises MinitronError where the scores are not this teacher's, or lack the second moments that are needed."""
    a = teacher.architecture
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
    _check_teacher(scores.teacher, teacher, f"{folder}: scores")
    if statistics and not scores.moments:
        raise MinitronError(
            f"{folder} has no second moments (it was scored with prune.statistics=false), which "
            "prune.method=compensated needs: score again with statistics, or cut with prune.method=minitron"
        )


def check_scan(scan: DepthScan, teacher: Checkpoint, folder: str | Path | None) -> None:
    """Raises MinitronError where the scan is not this teacher's."""
    _check_teacher(scan.teacher, teacher, f"{folder}: a scan")
    size = teacher.architecture.hidden_size
    for layer, fold in scan.folds.items():
        if tuple(fold.shape) != (size, size):
            raise MinitronError(
                f"{folder}: a scan of another teacher: the map after layer {layer} is {tuple(fold.shape)}, not "
                f"{(size, size)}"
            )


def _check_teacher(made_of: str, teacher: Checkpoint, what: str) -> None:
    if made_of and made_of != teacher.content:
        raise MinitronError(
            f"{what} of another teacher: made from weights {made_of[:12]}, {teacher.path} has {teacher.content[:12]}; "
            "give another prune.scores_path, or remove it to score again"
        )


def _work(
    partial: Path,
    config: PruneConfig,
    teacher: Checkpoint,
    plan: PruningPlan,
    scores: ImportanceScores | None,
    scan: DepthScan | None,
    refit_folder: str | Path | None,
) -> dict[str, Any]:
    import time

    student = Architecture.from_dict(plan.student)
    place = place_in(partial, config.output, config.target_format)
    started = time.perf_counter()
    tensors, compensation = student_tensors(teacher, plan, scores, scan, config, refit_folder)
    check_room(config.output, sum(tensor.nbytes for tensor in tensors.values()))
    with progress(tensors, "prune") as watched:
        write_checkpoint(place, config.target_format, student, watched, teacher.tokenizer_files, teacher.generation)
    seconds = time.perf_counter() - started
    open_checkpoint(place, "student")
    details: dict[str, Any] = {"plan": dataclasses.asdict(plan), "architecture": plan.student}
    if compensation:
        details["compensation"] = compensation
    if scan is not None:
        details["depth"] = {"blocks": scan.blocks, **scan.report}
    return {
        "metrics": {
            "method": plan.method,
            "parameters": student.parameters(),
            "non_embedding_parameters": student.non_embedding_parameters(),
            "teacher_parameters": teacher.architecture.parameters(),
            "dropped_layers": plan.drop_layers,
        },
        "timings": {"cut_seconds": seconds},
        "details": details,
    }


def student_tensors(
    teacher: Checkpoint,
    plan: PruningPlan,
    scores: ImportanceScores | None,
    scan: DepthScan | None,
    config: PruneConfig,
    refit_folder: str | Path | None,
) -> tuple[Mapping[str, Lazy], dict[str, Any]]:
    """The student's tensors, each made when it is read; and what the manifest says of the compensation."""
    if plan.method == "minitron":
        return cut(teacher.tensors, plan, choose(scores, teacher.architecture, plan.width)), {}
    if refit_folder is None:
        made = compensated_cut(teacher, plan, scores, scan, config.prune)
        return made.cut(), made.summary()
    made = compensated_cut(teacher, plan, scores, scan, config.prune, kept_by(refit_folder))
    tensors, said = refitted(made.cut(), refit_folder)
    return tensors, made.summary() | said


def compensated_cut(
    teacher: Checkpoint,
    plan: PruningPlan,
    scores: ImportanceScores | None,
    scan: DepthScan | None,
    targets: PruneTargets,
    chosen: Kept | None = None,
) -> CompensatedCut:
    """The compensated cut that `targets` ask for.

    Args:
        chosen: neurons and heads that were chosen for it before.
    """
    moments = scores.moments if scores else {}
    kept = choose(scores, teacher.architecture, plan.width)
    if chosen is None and targets.choose_by == "saliency":
        heads = not targets.merge_heads  # their residual is merged in the order of the published importance
        chosen = choose_by_saliency(teacher.tensors, plan, moments, targets.ridge, heads=heads)
    if chosen is not None:
        kept = dataclasses.replace(kept, **{name: value for name, value in vars(chosen).items() if value is not None})
    settings = Settings(ridge=targets.ridge, merge_heads=targets.merge_heads, gain_tolerance=targets.gain_tolerance)
    return CompensatedCut(teacher.tensors, plan, kept, moments, scan.folds if scan else {}, settings)
