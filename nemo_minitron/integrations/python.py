"""The stages as functions, for a program: what `nemo_minitron` offers under the same names.

Each takes a command's configuration, from `compose` or from the classes in `nemo_minitron.config`, and checks it first.
Unlike the commands, `evaluate` and `plan` return what they work out and print nothing.
"""

from typing import Any

from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest


def prune(config: c.PruneConfig) -> Manifest | None:
    """Cuts a teacher as `minitron prune` does; None on any rank but the first.

    Raises:
        MinitronError: of the kinds in nemo_minitron.errors.
    """
    from nemo_minitron.pruning.command import prune

    return prune(c.validated(config, "prune"))


def distill(config: c.DistillConfig) -> Manifest:
    """Trains a student on its teacher's logits as `minitron distill` does; raises as prune."""
    from nemo_minitron.distillation.command import distill

    return distill(c.validated(config, "distill"))


def search(config: c.SearchConfig) -> Manifest | None:
    """Finds the best student of a budget as `minitron search` does; None of a dry run; raises as prune."""
    from nemo_minitron.search.command import search

    return search(c.validated(config, "search"))


def finetune(config: c.FinetuneConfig) -> Manifest:
    """Trains a model as `minitron finetune` does; raises as prune."""
    from nemo_minitron.training.finetune import finetune

    return finetune(c.validated(config, "finetune"))


def convert(config: c.ConvertConfig) -> Manifest:
    """Converts a checkpoint as `minitron convert` does; raises as prune."""
    from nemo_minitron.conversion.convert import convert

    return convert(c.validated(config, "convert"))


def quantize(config: c.QuantizeConfig) -> Manifest:
    """Quantises a checkpoint as `minitron quantize` does; raises as prune."""
    from nemo_minitron.quantization.command import quantize

    return quantize(c.validated(config, "quantize"))


def evaluate(config: c.EvaluateConfig) -> dict[str, Any]:
    """Measures checkpoints on tasks as `minitron evaluate` does; returns its results.json. Raises as prune."""
    from nemo_minitron.evaluation.command import measure

    return measure(c.validated(config, "evaluate"))[0]


def plan(config: c.PlanConfig) -> dict[str, Any]:
    """What each stage needs on each rank, as `minitron plan --json` prints it; raises as prune."""
    from nemo_minitron.planning.command import work_out

    return work_out(c.validated(config, "plan"))
