"""What a dry run says of each kind of step, beside its name.

Every function takes the flow's configuration, the teacher's sizes and the step.
"""

from typing import TYPE_CHECKING, Any

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture, human
from nemo_minitron.flow.models import chosen, searches, without_sizes

if TYPE_CHECKING:
    from nemo_minitron.flow.steps import Step


def nothing(flow: c.FlowConfig, teacher: Architecture, step: "Step[Any]") -> str:
    """The name says all."""
    return ""


def source(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.DataConfig]") -> str:
    """Where the text comes from."""
    sources = step.config.sources
    return step.config.source if sources is None else ", ".join(f"{name}: {path}" for name, path in sources.items())


def training(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.FinetuneConfig] | Step[c.DistillConfig]") -> str:
    """Length, learning rates and layout of a training."""
    trainer, model, tokens = step.config.trainer, step.config.model, chosen(flow.model.seq_length)
    total = trainer.max_steps * model.global_batch_size * tokens
    return (
        f"{trainer.max_steps} steps x {model.global_batch_size} x {tokens} = {human(total)} tokens, "
        f"lr {model.optim.lr:g} to {model.optim.sched.min_lr:g}, {trainer.num_nodes * trainer.devices} rank(s), "
        f"tensor {model.tensor_model_parallel_size} x pipeline {model.pipeline_model_parallel_size}, "
        f"precision {trainer.precision}"
    )


def teaching(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.TeachConfig]") -> str:
    """How many tokens, and why once."""
    from nemo_minitron.flow.answers import decided

    return f"to {human(chosen(step.config.teach.tokens))} tokens, once for all students ({decided(flow).why})"


def tuning(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.FinetuneConfig]") -> str:
    """A training, and what it trains."""
    scheme = step.config.peft.scheme
    return training(flow, teacher, step) if scheme == "none" else f"{scheme}, {training(flow, teacher, step)}"


def control(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.FinetuneConfig] | Step[c.DistillConfig]") -> str:
    """What the control is for."""
    from_cut = " from the cut, without those of the search" if searches(flow, chosen(step.student)) else ""
    return f"to compare, the same steps{from_cut}"


def searching(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.SearchConfig]") -> str:
    """The budget and the rounds."""
    from nemo_minitron.search.rounds import schedule

    settings, tokens = step.config.search, chosen(flow.model.seq_length)
    budgets = ", ".join(f"{name} {getattr(settings, name)}" for name in settings.given())
    rounds = schedule(settings.candidates, settings.finalists, settings.steps)
    each = ", ".join(f"{one.candidates} of {one.steps} steps" for one in rounds)
    return f"{budgets}; candidates in rounds: {each} x {step.config.model.global_batch_size} x {tokens}"


def scoring(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.PruneConfig]") -> str:
    """How much text the teacher is scored on."""
    return f"{step.config.prune.num_samples} samples of {flow.model.seq_length} tokens"


def fitting(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.PruneConfig]") -> str:
    """How much text blocks are left out on, and the student is refitted on."""
    return f"{step.config.prune.num_block_samples} samples of {flow.model.seq_length} tokens"


def scanning(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.PruneConfig]") -> str:
    """As fitting, and what choosing the layers costs."""
    from nemo_minitron.pruning.importance.scan import cost

    samples = fitting(flow, teacher, step)
    if not step.config.prune.chooses_by_maps:
        return samples
    return f"{samples}; {cost(teacher.num_layers, step.config, chosen(flow.model.seq_length))}"


def targets(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.PruneConfig]") -> str:
    """What is cut, in the flow's own words."""
    given, words = flow.prune.students[chosen(step.student)], []
    if searches(flow, chosen(step.student)):
        given, words = without_sizes(given), ["the search's winner"]
    return ", ".join([*words, *(f"{key}={value}" for key, value in given.items() if key != "search")])


def questions(flow: c.FlowConfig, teacher: Architecture, step: "Step[c.EvaluateConfig]") -> str:
    """How much every model is asked."""
    return f"{flow.facts} questions about the text, to every model"
