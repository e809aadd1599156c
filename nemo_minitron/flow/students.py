"""The students of a flow: what is cut for each, the sizes that it has then, and what is wrong with it."""

from typing import Any

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import ConfigError
from nemo_minitron.flow.places import place
from nemo_minitron.pruning.plan import plan_cut, target_problems


def student_targets(config: c.FlowConfig, name: str) -> c.PruneTargets:
    """The targets of the student `name`, on the flow's grid."""
    prune = config.prune
    targets: dict[str, Any] = {"method": prune.method, "depth_by": prune.depth_by} | prune.students[name]
    targets |= {"num_samples": prune.num_samples, "num_block_samples": prune.num_block_samples}
    return c.PruneTargets(
        **targets,
        scores_path=str(place(config, "score")),
        hidden_size_divisor=prune.hidden_size_divisor,
        ffn_hidden_size_divisor=prune.ffn_hidden_size_divisor,
        num_layers_divisor=prune.num_layers_divisor,
    )


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
