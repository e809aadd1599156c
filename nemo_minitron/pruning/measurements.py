"""What a cut rests on, opened and checked: the teacher, its scores, its scan of blocks, and the plan that follows."""

import dataclasses
from pathlib import Path

from nemo_minitron.artifacts import DepthScan, ImportanceScores, PruningPlan
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.config import PruneConfig
from nemo_minitron.errors import CheckpointError, MinitronError
from nemo_minitron.pruning.compensated import FINAL
from nemo_minitron.pruning.folders import scan_folder, scores_folder
from nemo_minitron.pruning.plan import check_targets, plan_cut


def open_teacher(config: PruneConfig) -> Checkpoint:
    """The teacher.

    Raises:
        ConfigError: a target is off the grid, above the teacher, or names layers that are not there.
        CheckpointError: the teacher is missing, damaged, or has nothing to choose directions by.
    """
    teacher = open_checkpoint(config.teacher, "teacher")
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


@dataclasses.dataclass(frozen=True)
class Measurements:
    """What was measured of a teacher, as far as the cut needs it, and what is to be cut for it.

    Attributes:
        folders: role (``scores``, ``scan``) -> the folder that it was read from.
    """

    plan: PruningPlan
    scores: ImportanceScores | None
    scan: DepthScan | None
    folders: dict[str, Path]


def read_measurements(config: PruneConfig, teacher: Checkpoint) -> Measurements:
    """Reads the scores and the scan that `config` needs, and plans the cut.

    Raises:
        MinitronError: they are missing, another teacher's, or lack what is needed.
    """
    scores = scan = None
    folders = {}
    if config.prune.needs_scores:
        folders["scores"] = scores_folder(config)
        scores = ImportanceScores.load(folders["scores"])
        moments = config.method == "compensated" and config.prune.width
        check_scores(scores, teacher, folders["scores"], statistics=moments)
    if config.needs_scan:
        folders["scan"] = scan_folder(config)
        scan = DepthScan.load(folders["scan"])
        check_scan(scan, teacher, folders["scan"])
    plan = plan_cut(teacher.architecture, config.prune, scores, scan, config.method)
    return Measurements(plan, scores, scan, folders)


def check_scores(scores: ImportanceScores, teacher: Checkpoint, folder: Path, statistics: bool) -> None:
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


def check_scan(scan: DepthScan, teacher: Checkpoint, folder: Path) -> None:
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
