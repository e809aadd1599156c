"""Where the results of a flow's steps lie."""

from pathlib import Path

from nemo_minitron import config as c
from nemo_minitron.artifacts.stages import STAGES
from nemo_minitron.flow.teacher import given_checkpoint


def place(config: c.FlowConfig, kind: str, student: str | None = None) -> Path:
    """Where the result of a kind of step lies."""
    return Path(config.output_dir) / STAGES[kind].placed(student)


def checkpoint_place(config: c.FlowConfig, model: str, student: str | None = None) -> Path:
    """Where a model of the table lies, by its kind."""
    given = given_checkpoint(config)
    if model == "teacher" and given is not None:
        return Path(given)
    return place(config, MADE_BY[model], student)


#: Kind of model -> kind of the step that makes it.
MADE_BY = {
    "teacher": "pretrain",
    "corrected": "correct",
    "pruned": "prune",
    "distilled": "distill",
    "control": "retrain",
}
