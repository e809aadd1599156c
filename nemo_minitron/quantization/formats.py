"""Which shapes a format can hold, told before any work: each problem with the equation that failed and what to do."""

import dataclasses
import math

from nemo_minitron.architecture import Architecture
from nemo_minitron.config import QuantizeConfig

#: Columns that share a scale in int4_awq.
GROUP = 128
#: FP8 and INT8 matrix products of NVIDIA's libraries take sizes that are multiples of this.
ALIGNED = 16
#: ModelOpt's name of the decoder in TensorRT-LLM's checkpoint, for the families that it can write one of.
DECODERS = {"llama": "llama", "mistral": "llama", "nemotron": "gpt"}
#: ModelOpt's configuration of each format.
MODELOPT = {"fp8": "FP8_DEFAULT_CFG", "int4_awq": "INT4_AWQ_CFG", "int8_sq": "INT8_SMOOTHQUANT_CFG"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A size of the model must be a multiple of `step`.

    Attributes:
        name: what the size is called.
        value: the size.
        setting: the pruning target that changes it.
        unit: how much the size changes with 1 more of the target.
        among: the targets are multiples of this.
        why: what needs it.
    """

    name: str
    value: int
    step: int
    setting: str
    unit: int = 1
    among: int = 1
    why: str

    def problem(self) -> str | None:
        """The equation that failed and the nearest legal targets, or None."""
        if self.value % self.step == 0:
            return None
        targets = nearest(self.value // self.unit, self.step, self.unit, self.among)
        named = " or ".join(f"prune.{self.setting}={target}" for target in targets)
        return (
            f"{self.why}: {self.name} {self.value} mod {self.step} = {self.value % self.step}; nearest legal: {named}"
        )


def nearest(target: int, step: int, unit: int = 1, among: int = 1) -> list[int]:
    """The targets below and above, multiples of `among`, of which `unit` times each is a multiple of `step`."""
    multiple = math.lcm(step // math.gcd(step, unit), among)
    below, above = target // multiple * multiple, (target // multiple + 1) * multiple
    return [above] if below == 0 else [below, above]


def shape_problems(a: Architecture, config: QuantizeConfig) -> list[str]:
    """What keeps a model of these sizes from being written as `config` asks for, or from being served so."""
    if config.export == "trtllm" and a.family not in DECODERS:
        return [
            f"export = trtllm: ModelOpt writes no TensorRT-LLM checkpoint of {a.family} models; known are "
            f"{', '.join(DECODERS)}. Give export=hf, which TensorRT-LLM 1.x loads"
        ]
    of_ranks = parallel_problems(a, config)
    rules = {"fp8": _aligned, "int8_sq": _aligned, "int4_awq": _grouped, "bf16": lambda a, config: []}[config.qformat]
    problems = [problem for rule in rules(a, config) if (problem := rule.problem())]
    if problems and config.qformat == "int4_awq":
        problems[-1] += "; or give qformat=fp8 or int8_sq, which have no groups"
    return of_ranks or problems


def parallel_problems(a: Architecture, config: QuantizeConfig) -> list[str]:
    """What the ranks of a server cannot share evenly."""
    sizes = {
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "ffn_hidden_size": a.ffn_hidden_size,
    }
    problems = [
        f"tp_size = {config.tp_size}: {name} {value} mod {config.tp_size} = {value % config.tp_size}; "
        f"give a tp_size that divides it ({_divisors(value)})"
        for name, value in sizes.items()
        if value % config.tp_size
    ]
    if a.num_layers % config.pp_size:
        problems.append(
            f"pp_size = {config.pp_size}: num_layers {a.num_layers} mod {config.pp_size} = "
            f"{a.num_layers % config.pp_size}; give a pp_size that divides it ({_divisors(a.num_layers)})"
        )
    return problems


def _divisors(value: int, most: int = 8) -> str:
    return ", ".join(str(number) for number in range(1, most + 1) if value % number == 0)


def _grouped(a: Architecture, config: QuantizeConfig) -> list[Rule]:
    """Inputs of every linear layer come in whole groups, on each rank; ModelOpt splits the hidden size too."""
    ranks = config.tp_size
    whole = ranks if config.export == "trtllm" else 1
    over = f" on each of {ranks} ranks" if ranks > 1 else ""
    why = f"int4_awq packs groups of {GROUP} input columns"
    return _rules(a, GROUP * whole, GROUP * ranks, why, over)


def _aligned(a: Architecture, config: QuantizeConfig) -> list[Rule]:
    """Sizes of the matrix products on each rank."""
    ranks = config.tp_size
    why = f"{config.qformat} kernels take sizes that are multiples of {ALIGNED}"
    return _rules(a, ALIGNED, ALIGNED * ranks, why, f" on each of {ranks} ranks" if ranks > 1 else "")


def _rules(a: Architecture, whole: int, shared: int, why: str, over: str) -> list[Rule]:
    """Rules of the three sizes that linear layers read: `whole` for the one on every rank, `shared` for split ones."""
    heads = f"heads x head size {a.num_attention_heads} x {a.kv_channels} ="
    ffn, width = "ffn_hidden_size", a.num_attention_heads * a.kv_channels
    return [
        Rule(
            name="hidden_size",
            value=a.hidden_size,
            step=whole,
            setting="hidden_size",
            why=why + (over if whole == shared else ""),
        ),
        Rule(name=ffn, value=a.ffn_hidden_size, step=shared, setting=ffn, why=why + over),
        Rule(
            name=heads,
            value=width,
            step=shared,
            setting="num_attention_heads",
            unit=a.kv_channels,
            among=a.num_query_groups,
            why=why + over,
        ),
    ]
