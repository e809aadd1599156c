"""The cut: teacher, plan and scores in, an ordinary smaller checkpoint out; tensor by tensor, of and in any format."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Manifest, PruningPlan
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint, place_in, write_checkpoint
from nemo_minitron.checkpoints.tensors import Lazy
from nemo_minitron.config import PruneConfig, PruneTargets
from nemo_minitron.conversion.writing import check_room, progress
from nemo_minitron.jobs.job import Job
from nemo_minitron.pruning.choice import Costs, choose_by_saliency
from nemo_minitron.pruning.compensated import ColumnMaps, CompensatedCut, Settings
from nemo_minitron.pruning.cut import Kept, choose, cut
from nemo_minitron.pruning.folders import refit_folder
from nemo_minitron.pruning.measurements import Measurements, open_teacher, read_measurements
from nemo_minitron.pruning.refitted import kept_by, refitted

#: Settings that shape a compensated student beyond its plan.
COMPENSATION = ("ridge", "merge_heads", "untie", "gain_tolerance", "choose_by", "refit")


@dataclasses.dataclass(frozen=True)
class Shared:
    """What cuts of one teacher have in common, as long as they differ in their sizes alone: costs and columns' maps."""

    costs: Costs
    maps: ColumnMaps


def compensation_of(targets: PruneTargets, plan: PruningPlan) -> dict[str, Any]:
    """What tells compensated cuts of a plan apart, and refits made for them.

    `norms` says of students with rotated streams what their norms keep: those of versions before kept 1, and no refit
    of such a cut fits one of these.
    """
    rotated = targets.untie or plan.student["hidden_size"] != plan.teacher["hidden_size"]
    settings = {name: getattr(targets, name) for name in COMPENSATION}
    if targets.refit == "sequential":
        settings["refit"] = None  # which means it wherever there is a refit
    return settings | ({"norms": "size of the teacher's gain"} if rotated else {})


def cut_student(config: PruneConfig, teacher: Checkpoint | None = None) -> Manifest:
    """Cuts the teacher by the scores, the scan and the refit that lie where `config` says.

    Args:
        teacher: none: it is opened.

    Raises:
        ConfigError, CheckpointError: as open_teacher.
        MinitronError: what the cut rests on is missing, or another teacher's.
        OutputExistsError: export.save_path was made from something else.
    """
    teacher = teacher or open_teacher(config)
    measured = read_measurements(config, teacher)
    inputs: dict[str, Any] = {"teacher": config.teacher, **measured.folders}
    if config.refits:
        inputs["refit"] = refit_folder(config)
    relevant: dict[str, Any] = {"plan": dataclasses.asdict(measured.plan), "command": dataclasses.asdict(config)}
    if config.method == "compensated":
        relevant["compensation"] = compensation_of(config.prune, measured.plan)
    job = Job(
        stage="prune",
        output=Path(config.export.save_path),
        config=relevant,
        inputs=inputs,
        overwrite=config.overwrite,
        ignore=("overwrite", "command"),
        sampled=("teacher", "scores", "scan", "refit"),
    )
    return job.run(lambda partial: write_student(partial, config, teacher, measured))


def write_student(partial: Path, config: PruneConfig, teacher: Checkpoint, measured: Measurements) -> dict[str, Any]:
    """Writes the student into `partial`; returns what its manifest says."""
    import time

    plan, scan = measured.plan, measured.scan
    student = Architecture.from_dict(plan.student)
    place = place_in(partial, config.output, config.target_format)
    started = time.perf_counter()
    tensors, compensation = student_tensors(teacher, measured, config)
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
    teacher: Checkpoint, measured: Measurements, config: PruneConfig
) -> tuple[Mapping[str, Lazy], dict[str, Any]]:
    """The student's tensors, each made when it is read; and what the manifest says of the compensation."""
    plan = measured.plan
    if plan.method == "minitron":
        return cut(teacher.tensors, plan, choose(measured.scores, teacher.architecture, plan.width)), {}
    if not config.refits:
        made = compensated_cut(teacher, measured, config.prune)
        return made.cut(), made.summary()
    folder = refit_folder(config)
    made = compensated_cut(teacher, measured, config.prune, kept_by(folder))
    tensors, said = refitted(made.cut(), folder)
    return tensors, made.summary() | said


def compensated_cut(
    teacher: Checkpoint,
    measured: Measurements,
    targets: PruneTargets,
    chosen: Kept | None = None,
    shared: Shared | None = None,
) -> CompensatedCut:
    """The compensated cut that `targets` ask for.

    Args:
        chosen: neurons and heads that were chosen for it before.
        shared: what it has in common with other cuts of this teacher.
    """
    plan, scores, scan = measured.plan, measured.scores, measured.scan
    moments = scores.moments if scores else {}
    kept = choose(scores, teacher.architecture, plan.width)
    if chosen is None and targets.choose_by == "saliency":
        heads = not targets.merge_heads  # their residual is merged in the order of the published importance
        costs = shared.costs if shared else Costs(teacher.tensors, moments, targets.ridge)
        chosen = choose_by_saliency(costs, plan, heads=heads)
    if chosen is not None:
        kept = dataclasses.replace(kept, **{name: value for name, value in vars(chosen).items() if value is not None})
    settings = Settings(ridge=targets.ridge, merge_heads=targets.merge_heads, gain_tolerance=targets.gain_tolerance)
    maps = shared.maps if shared else None
    return CompensatedCut(teacher.tensors, plan, kept, moments, scan.folds if scan else {}, settings, maps)
