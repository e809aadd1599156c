"""The steps of a flow, as data: what runs, in which order, of what configuration, into which folder.

    data -> teacher -> teacher correction -> importance -> prune -> distil, with a control beside it -> table

Where the teacher's answers are kept (flow.answers), it gives them once, before any student is cut. Where there are
instructions, the distilled students are tuned on them at the end. Where a search finds a student's sizes, its steps are
planned for a shape of that budget first, and anew once the search has ended (flow.run).

The run, its dry run, its estimates of time, its report and the notebooks read this list. A new step is an entry of the
tables below; its name and its folder stand in artifacts.stages, where a report finds them again.
"""

import dataclasses
import functools
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import MANIFEST, Manifest
from nemo_minitron.artifacts.stages import STAGES
from nemo_minitron.flow import configs, details, work
from nemo_minitron.flow.answers import keeps_answers
from nemo_minitron.flow.models import (
    chosen,
    has_control,
    needs_scores,
    place,
    pretrains_on_broad,
    searches,
    with_own_tokenizer,
)
from nemo_minitron.planning.pace import Work

Configuration = TypeVar("Configuration", bound=c.Config)


@dataclasses.dataclass(frozen=True)
class Step(Generic[Configuration]):
    """One step of a flow.

    Attributes:
        kind: key of KINDS, and of artifacts.stages.STAGES.
        student: whose it is; None: the teacher's, or all models'.
        config: the configuration of the stage that it runs.
        output: the folder that it makes.
    """

    kind: str
    student: str | None
    config: Configuration
    output: Path

    @property
    def name(self) -> str:
        """What people call it."""
        return STAGES[self.kind].named(self.student)

    @property
    def done(self) -> bool:
        """Whether its folder holds a finished result; whether it is of this very step, the stage itself checks."""
        return (self.output / MANIFEST).is_file()

    def run(self) -> Manifest:
        """Makes the result, or finds it made."""
        function: Callable[[Any], Manifest] = pkgutil.resolve_name(KINDS[self.kind].function)
        return function(c.validated(self.config))

    def work(self, flow: c.FlowConfig, teacher: Architecture) -> Work:
        """How much there is to do."""
        return KINDS[self.kind].estimate(flow, teacher, self)

    def describe(self, flow: c.FlowConfig, teacher: Architecture) -> str:
        """The line of a dry run."""
        said = KINDS[self.kind].says(flow, teacher, self)
        return f"{self.name}: {said}" if said else self.name


def always(*_: Any) -> bool:
    """Every flow has it."""
    return True


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of step.

    Attributes:
        function: `module:function` that runs it, from its configuration alone.
        configure: from the flow's configuration, and the student's name where each has one, to the step's.
        estimate: what there is to do (flow.work).
        says: what a dry run says of it (flow.details).
        wanted: whether this flow has it; takes what `configure` takes.
        output: `module:function` that makes its folder of its configuration, where artifacts.stages names none.
    """

    function: str
    configure: Callable[..., c.Config]
    estimate: Callable[[c.FlowConfig, Architecture, Any], Work]
    says: Callable[[c.FlowConfig, Architecture, Any], str] = details.nothing
    wanted: Callable[..., bool] = always
    output: str | None = None

    def step(self, kind: str, flow: c.FlowConfig, student: str | None) -> Step[Any] | None:
        """The step of this kind, where the flow has it."""
        whose = () if student is None else (student,)
        if not self.wanted(flow, *whose):
            return None
        config = self.configure(flow, *whose)
        output = place(flow, kind, student) if self.output is None else pkgutil.resolve_name(self.output)(config)
        return Step(kind, student, config, output)


def evaluation(model: str, wanted: Callable[..., bool] = always) -> Kind:
    """The validation and test loss of a model of the table."""
    configure = functools.partial(configs.loss_config, model=model)
    return Kind("nemo_minitron.evaluation.loss:evaluate_loss", configure, work.loss_work, wanted=wanted)


def ask(config: c.EvaluateConfig) -> Manifest:
    """An evaluation that prints nothing."""
    from nemo_minitron.evaluation.command import measure

    return chosen(measure(config)[1])


PREPARE = "nemo_minitron.data.command:prepare"
FINETUNE = "nemo_minitron.training.finetune:finetune"
DISTILL = "nemo_minitron.distillation.command:distill"
TEACH = "nemo_minitron.distillation.teach.command:teach"
IMPORTANCE = "nemo_minitron.pruning.importance"

#: Text and teacher, and what all students need of it.
TEACHER = {
    "broad": Kind(PREPARE, configs.broad_data_config, work.text_work, details.source, pretrains_on_broad),
    "data": Kind(PREPARE, configs.data_config, work.text_work, details.source),
    "pretrain": Kind(
        FINETUNE,
        configs.pretrain_config,
        work.training_work,
        details.training,
        lambda flow: flow.model.init == "random",
    ),
    "correct": Kind(FINETUNE, configs.correct_config, work.training_work, details.training),
    "evaluate teacher": evaluation("teacher"),
    "evaluate corrected": evaluation("corrected"),
    "score": Kind(f"{IMPORTANCE}.scoring:score", configs.score_config, work.score_work, details.scoring, needs_scores),
    "teach": Kind(TEACH, configs.teach_config, work.teach_work, details.teaching, keeps_answers),
}
#: From the teacher to each student.
STUDENT = {
    "search": Kind(
        "nemo_minitron.search.command:search", configs.search_config, work.search_work, details.searching, searches
    ),
    "scan": Kind(
        f"{IMPORTANCE}.scan:scan",
        configs.cut_config,
        work.scan_work,
        details.scanning,
        lambda flow, name: configs.cut_config(flow, name).needs_scan,
        output="nemo_minitron.pruning.folders:scan_folder",
    ),
    "refit": Kind(
        "nemo_minitron.pruning.refit:refit",
        configs.cut_config,
        work.refit_work,
        details.fitting,
        lambda flow, name: configs.cut_config(flow, name).refits,
        output="nemo_minitron.pruning.folders:refit_folder",
    ),
    "prune": Kind("nemo_minitron.pruning.student:cut_student", configs.cut_config, work.cut_work, details.targets),
    "evaluate pruned": evaluation("pruned"),
    "distill": Kind(DISTILL, configs.distill_config, work.training_work, details.training),
    "evaluate distilled": evaluation("distilled"),
    "retrain": Kind(DISTILL, configs.retrain_config, work.training_work, details.control, has_control),
    "evaluate control": evaluation("control", has_control),
}
#: What follows when all students are there: of each of them, and of all models.
TUNING = {
    "instruct": Kind(
        FINETUNE,
        configs.instruct_config,
        work.training_work,
        details.tuning,
        lambda flow, name: bool(flow.instruct.data),
    ),
}
KNOWLEDGE = {
    "facts": Kind(
        "nemo_minitron.flow.steps:ask",
        configs.facts_config,
        work.facts_work,
        details.questions,
        lambda flow: flow.data.source == "embedded" and flow.data.sources is None and flow.facts > 0,
    ),
}
KINDS = TEACHER | STUDENT | TUNING | KNOWLEDGE


def steps(flow: c.FlowConfig) -> list[Step[Any]]:
    """Every step of a flow with nothing left open, in order."""
    once, students = [None], list(flow.prune.students)
    groups: tuple[tuple[Sequence[str | None], dict[str, Kind]], ...] = (
        (once, TEACHER),
        (students, STUDENT),
        (students, TUNING),
        (once, KNOWLEDGE),
    )
    planned = [
        kind.step(name, flow, student) for owners, kinds in groups for student in owners for name, kind in kinds.items()
    ]
    return [step for step in planned if step is not None]


def steps_to_run(flow: c.FlowConfig) -> list[Step[Any]]:
    """As steps, once the teacher is there: its tokenizer is the text's where none is named."""
    return steps(with_own_tokenizer(flow))
