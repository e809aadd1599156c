"""The stages of a flow by name: what each is called, and where in the run's folder its result lies.

A flow makes them (flow.steps), and a report finds them again by their folders. ``{student}`` stands for a student's
name.
"""

import dataclasses
from collections.abc import Collection, Iterable

EVALUATIONS = "evaluations"
#: Kind of model -> what the table calls it, in the order of the table: the teacher before and after correction, then
#: each student's.
MODELS = {
    "teacher": "teacher",
    "corrected": "teacher corrected",
    "pruned": "{student} pruned",
    "distilled": "{student} distilled",
    "control": "{student} control",
}
#: What a manifest says made a result, in the order of a flow -> the command that makes it again.
COMMANDS = {
    "data": "data",
    "finetune": "finetune",
    "score": "prune",
    "search": "search",
    "scan": "prune",
    "refit": "prune",
    "prune": "prune",
    "teach": "teach",
    "distill": "distill",
    "evaluate": "evaluate",
}
#: Those of them that train, and have steps to do.
TRAININGS = ("finetune", "distill")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A kind of stage.

    Attributes:
        name: what it is called.
        folder: where its result lies in the run's folder; empty: beside the scores, where the stage says.
    """

    name: str
    folder: str = ""

    @property
    def of_students(self) -> bool:
        """Whether every student has one of its own."""
        return "{student}" in self.name

    def named(self, student: str | None = None) -> str:
        """Its name, a student's where it is one of theirs."""
        return self.name.format(student=student)

    def placed(self, student: str | None = None) -> str:
        """Its folder, a student's where it is one of theirs."""
        return self.folder.format(student=student)

    def student_in(self, folder: str) -> str | None:
        """The student whose stage of this kind has its result in `folder`.

        Returns:
            '' where the stage is no student's; None where `folder` is another kind's.
        """
        if not self.of_students:
            return "" if folder == self.folder else None
        before, _, after = self.folder.partition("{student}")
        if not after or not folder.startswith(before) or not folder.endswith(after):
            return None
        return folder[len(before) : -len(after)] or None


def evaluation(model: str) -> Stage:
    """The evaluation of a model that the table calls `model`."""
    return Stage(f"evaluate {model}", f"{EVALUATIONS}/{model.replace(' ', '-')}")


#: Kind -> stage, as a flow with everything in it goes.
STAGES = {
    "broad": Stage("data (broad)", "data-broad"),
    "data": Stage("data", "data"),
    "pretrain": Stage("pretrain teacher", "teacher-pretrained"),
    "correct": Stage("teacher correction", "teacher"),
    "evaluate teacher": evaluation(MODELS["teacher"]),
    "evaluate corrected": evaluation(MODELS["corrected"]),
    "score": Stage("importance", "scores"),
    "teach": Stage("teacher's answers", "answers"),
    "search": Stage("search {student}", "{student}-search"),
    "scan": Stage("scan blocks for {student}"),
    "refit": Stage("refit {student}"),
    "prune": Stage("prune {student}", "{student}-pruned"),
    "evaluate pruned": evaluation(MODELS["pruned"]),
    "distill": Stage("distil {student}", "{student}-distilled"),
    "evaluate distilled": evaluation(MODELS["distilled"]),
    "retrain": Stage("retrain (LM loss alone) {student}", "{student}-control"),
    "evaluate control": evaluation(MODELS["control"]),
    "instruct": Stage("instruct {student}", "{student}-instruct"),
    "facts": evaluation("facts"),
}


def stage_name(folder: str, made_by: str) -> str:
    """What a flow calls the stage whose result lies in `folder`.

    Args:
        made_by: what its manifest says; it names what no flow has.
    """
    head, _, last = folder.rpartition("/")
    if head == EVALUATIONS:
        return evaluation(model_name(last)[0]).name
    for stage in STAGES.values():
        student = stage.student_in(folder)
        if student is not None:
            return stage.named(student)
    if made_by == "scan":
        return f"scan blocks ({folder.partition('.depth-')[2] or folder})"
    return f"{made_by} ({folder})" if folder else made_by


def model_name(folder: str) -> tuple[str, str | None, str]:
    """Name, student and kind of the model that an evaluation's folder is named after."""
    for kind in ("teacher", "corrected"):
        if folder == MODELS[kind].replace(" ", "-"):
            return MODELS[kind], None, kind
    student, _, kind = folder.rpartition("-")
    return (f"{student} {kind}", student, kind) if student else (folder, None, "")


def students_of(folders: Iterable[str], kinds: Collection[str]) -> list[str]:
    """The students whose stages of these kinds have their results among `folders`, each once, in order."""
    students = (STAGES[kind].student_in(folder) for folder in folders for kind in kinds)
    return list(dict.fromkeys(student for student in students if student))
