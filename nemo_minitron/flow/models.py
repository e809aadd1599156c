"""The models of a flow: the teacher, its students, their sizes, what is wrong with them, and where each lies.

The teacher is a checkpoint that is given, or random weights of stated sizes that are pretrained here.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture, padded_vocab_size
from nemo_minitron.artifacts.stages import STAGES
from nemo_minitron.config.schemas.flow import COUNTS, SEARCHED
from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.pruning.plan import plan_cut, target_problems
from nemo_minitron.published import stated_fields

Value = TypeVar("Value")
#: Sizes whose grid the settings of a flow's cuts may give, NAME_divisor.
GRID = ("hidden_size", "ffn_hidden_size", "num_layers")
#: Kind of model -> kind of the step that makes it.
MADE_BY = {
    "teacher": "pretrain",
    "corrected": "correct",
    "pruned": "prune",
    "distilled": "distill",
    "control": "retrain",
}


def chosen(value: Value | None) -> Value:
    """`value`, that is settled by now."""
    assert value is not None, "still open: settle the flow's configuration first"
    return value


def place(config: c.FlowConfig, kind: str, student: str | None = None) -> Path:
    """Where the result of a kind of step lies."""
    return Path(config.output_dir) / STAGES[kind].placed(student)


def checkpoint_place(config: c.FlowConfig, model: str, student: str | None = None) -> Path:
    """Where a model of the table lies, by its kind."""
    given = given_checkpoint(config)
    if model == "teacher" and given is not None:
        return Path(given)
    return place(config, MADE_BY[model], student)


def given_checkpoint(config: c.FlowConfig) -> str | None:
    """The checkpoint that the teacher is; None where it is made here."""
    return config.model.restore_from_path if config.model.init == "checkpoint" else None


def pretrains_on_broad(config: c.FlowConfig) -> bool:
    """Whether the teacher is made here, on a corpus of its own."""
    return config.model.init == "random" and config.data.source == "embedded" and config.data.sources is None


def check_teacher(config: c.FlowConfig) -> None:
    """Checks, before any work, that a teacher that is to come from a checkpoint is there."""
    path = given_checkpoint(config)
    if path is None:
        return
    if not Path(path).exists():
        sources = (config.model.download or "").split(" or ")
        where = f" Get it, {' or '.join(f'`minitron download {source} {path}`' for source in sources)}, or"
        raise CheckpointError(
            f"the teacher model.restore_from_path={path} does not exist.{where if config.model.download else ''} name "
            "its place, model.restore_from_path=PATH"
        )
    if config.data.tokenizer is None:
        from nemo_minitron.checkpoints.checkpoint import open_checkpoint

        if open_checkpoint(path, "teacher").tokenizer is None:
            raise ConfigError("the teacher's checkpoint has no tokenizer: give it, data.tokenizer=DIR", "flow")


def teacher_architecture(config: c.FlowConfig) -> Architecture:
    """The teacher's sizes: those of its checkpoint where that is here, those of the preset otherwise."""
    path = given_checkpoint(config)
    if path is not None and Path(path).exists():
        from nemo_minitron.checkpoints.checkpoint import open_checkpoint

        return open_checkpoint(path, "teacher").architecture
    if not config.model.architecture:
        check_teacher(config)
    fields = stated_fields(config.model.architecture, "flow")
    if fields.get("vocab_size") is None:
        fields["vocab_size"] = padded_vocab_size(config.data.vocab_size)
    return Architecture.from_settings(fields, "flow")


def with_own_tokenizer(config: c.FlowConfig) -> c.FlowConfig:
    """The configuration with the tokenizer of the teacher's checkpoint, where none is named.

    Out of an archive it is copied to the user's cache: for a flow that runs, not for one that is only planned.
    """
    path = given_checkpoint(config)
    if path is None or config.data.tokenizer is not None:
        return config
    from nemo_minitron.checkpoints.checkpoint import open_checkpoint

    tokenizer = open_checkpoint(path, "teacher").tokenizer
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))


def searches(config: c.FlowConfig, name: str) -> bool:
    """Whether a search finds the sizes of the student `name`."""
    return config.prune.students[name].get("search") is not None


def candidates_cut(config: c.FlowConfig, name: str) -> c.SearchCutConfig:
    """How the candidates of a search for the student `name` are cut, and so the student itself."""
    prune = config.prune
    given = {key: value for key, value in prune.students[name].items() if key in SEARCHED[1:] and value is not None}
    fields: dict[str, Any] = {"method": prune.method or c.SearchCutConfig.method} | given
    return c.SearchCutConfig(**fields, **_cut_of_all(config))


def _cut_of_all(config: c.FlowConfig) -> dict[str, Any]:
    """What the cuts of all students have of the flow: scores, samples and grid."""
    names = ("num_samples", "num_block_samples", *(f"{size}_divisor" for size in GRID))
    return {name: getattr(config.prune, name) for name in names} | {"scores_path": str(place(config, "score"))}


def as_asked(config: c.FlowConfig) -> dict[str, Any]:
    """The configuration as plain values, such that it can be asked for: without the sizes of students that a search
    finds."""
    told = dataclasses.asdict(config)
    students = told["prune"]["students"]
    for name in filter(lambda name: searches(config, name), students):
        students[name] = without_sizes(students[name])
    return told


def without_sizes(targets: Mapping[str, Any]) -> dict[str, Any]:
    """A student's targets but for its sizes."""
    return {key: value for key, value in targets.items() if key not in COUNTS}


def student_targets(config: c.FlowConfig, name: str) -> c.PruneTargets:
    """The targets of the student `name`, on the flow's grid; where a search finds its sizes, those that are known."""
    prune = config.prune
    if searches(config, name):
        sizes = {key: value for key, value in prune.students[name].items() if key in COUNTS}
        return candidates_cut(config, name).targets(sizes)
    targets: dict[str, Any] = {"method": prune.method, "depth_by": prune.depth_by} | prune.students[name]
    return c.PruneTargets(**targets, **_cut_of_all(config))


def student_architecture(config: c.FlowConfig, teacher: Architecture, name: str) -> Architecture:
    """The sizes of the student `name`; which layers go is not needed for that."""
    targets = student_targets(config, name)
    layers, targets.num_layers = targets.num_layers, None
    method = targets.method or "compensated"
    student = Architecture.from_dict(plan_cut(teacher, targets, None, method=method).student)
    return student.with_sizes(num_layers=layers)


def model_architecture(config: c.FlowConfig, teacher: Architecture, student: str | None) -> Architecture:
    """The sizes of a student, or of the teacher where none is named."""
    return teacher if student is None else student_architecture(config, teacher, student)


def student_models(config: c.FlowConfig) -> tuple[str, ...]:
    """Kinds of the models of each student, in the order of the table."""
    return ("pruned", "distilled", "control") if config.distill.control else ("pruned", "distilled")


def needs_scores(config: c.FlowConfig) -> bool:
    """Whether importance decides what is cut of any student."""
    return any(student_targets(config, name).needs_scores for name in config.prune.students)


def has_control(config: c.FlowConfig, name: str) -> bool:
    """Whether the student `name` is retrained without the teacher, too."""
    return config.distill.control


def check_students(config: c.FlowConfig, teacher: Architecture) -> None:
    """Raises one ConfigError with everything that is wrong with the students' targets."""
    problems = []
    for name in config.prune.students:
        problems += [f"prune.students.{name}: {problem}" for problem in student_problems(config, teacher, name)]
    if problems:
        raise ConfigError(problems, "flow")


def student_problems(config: c.FlowConfig, teacher: Architecture, name: str) -> list[str]:
    """Everything that is wrong with the targets of the student `name`."""
    targets = student_targets(config, name)
    return c.all_problems(targets) or target_problems(teacher, targets)
