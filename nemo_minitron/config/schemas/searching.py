"""Settings of `minitron search`."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from nemo_minitron.config.schemas.base import Config, at_least, one_of
from nemo_minitron.config.schemas.distillation import KDConfig
from nemo_minitron.config.schemas.hardware import TrainerConfig
from nemo_minitron.config.schemas.pruning import CHOICES, METHODS, PruneTargets
from nemo_minitron.config.schemas.training import ModelConfig, layout_problems, missing_data

SPEEDS = ("prefill", "decode")
BUDGETS = ("parameters", "non_embedding_parameters", "memory", "flops", *SPEEDS)
#: Numbers of each kind in words, for messages.
EXAMPLES = {
    "parameters": "60%, 82M or 4B",
    "non_embedding_parameters": "50% or 2.6B",
    "memory": "6GB or 60%",
    "flops": "50%",
    "prefill": "1.8x",
    "decode": "1.8x",
}
#: Number and unit.
AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)\s*(%|x|[KMGT]?B|[KM]|)")
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
WEIGHTS = ("fp32", "bf16", "fp8", "int8", "int4")
RANKED_BY = ("kd_loss", "lm_loss")
RANGES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


def parse_amount(name: str, given: Any, own: float) -> float:
    """A budget as a number: a share of the teacher's `own` (60%), a number (82e6, 82M, 6GB), or, for seconds a token,
    what a multiple of the teacher's speed leaves of them (1.8x).

    Raises:
        ValueError: it is neither.
    """
    problem = _amount_problem(name, given)
    if problem:
        raise ValueError(problem)
    if isinstance(given, int | float):
        return float(given)
    number, unit = chosen_match(given).groups()
    if unit == "x":
        return own / float(number)
    return float(number) / 100 * own if unit == "%" else float(number) * UNITS[unit]


def chosen_match(given: Any) -> re.Match[str]:
    """Number and unit of a budget that has no problem."""
    match = AMOUNT.fullmatch(str(given).strip())
    assert match is not None, "problems() refuses other texts"
    return match


def _amount_problem(name: str, given: Any) -> str | None:
    """What is wrong with a budget; None: nothing."""
    if isinstance(given, int | float) and not isinstance(given, bool):
        whole = 0 < given < math.inf and name not in SPEEDS
    else:
        match = AMOUNT.fullmatch(str(given).strip())
        whole = match is not None and (match[2] == "x") == (name in SPEEDS) and float(match[1]) > (name in SPEEDS)
    return None if whole else f"{name} = {given!r} is no budget: give {EXAMPLES[name]}"


@dataclasses.dataclass(kw_only=True)
class SearchSettings(Config):
    """The budget, the shapes that are looked at, and the rounds."""

    parameters: Any = None
    """Parameters, embeddings included: a share of the teacher's (60%) or a number (82M)."""
    non_embedding_parameters: Any = None
    """Parameters without embedding and output layer, as the Minitron papers count."""
    memory: Any = None
    """Bytes of a deployment: weights and KV cache (weights, batch_size, length), 6GB or a share."""
    flops: Any = None
    """Operations of a token's forward pass among `length`: a share (50%)."""
    prefill: Any = None
    """Speed of reading a prompt, as a multiple of the teacher's on this machine: 1.8x, above 1."""
    decode: Any = None
    """Speed of making tokens, as a multiple of the teacher's on this machine: 1.8x, above 1."""
    weights: str = "bf16"
    """Of memory: fp32, bf16, or fp8, int8, int4 linear layers with the rest in bf16."""
    batch_size: int = 1
    """Of memory and speed: sequences at once."""
    length: int | None = None
    """Of memory, flops and speed: tokens of a sequence; none: the teacher's, 1024 at most for speed."""
    tolerance: float = 0.05
    """How far below the tightest budget a student may lie, as a share of it; none lies above."""
    num_layers: Any = None
    """Layers that are looked at: one number, or [least, most]; none: all of the grid."""
    hidden_size: Any = None
    """Widths of the stream that are looked at, as num_layers."""
    ffn_hidden_size: Any = None
    """FFN sizes that are looked at, as num_layers."""
    num_attention_heads: Any = None
    """Attention heads that are looked at, as num_layers."""
    measured: int | None = 64
    """Shapes whose cut is made and measured; where there are more, those of least predicted loss (each size cut alone,
    their excess losses summed); none: all."""
    samples: int = 16
    """Held-out samples that a cut's loss is measured on, drawn from all of the validation text by prune.seed."""
    candidates: int = 16
    """Shapes that go on to distillation."""
    steps: int = 40
    """Steps of the first round of distillation; each further round has twice as many, for half of the candidates."""
    rank_by: str | None = None
    """Validation loss by which a round ranks: `kd_loss`, the distance from the teacher, or `lm_loss`, that of the text;
    none: kd_loss where there is KD."""
    finalists: int = 1
    """Shapes that are left at the end."""
    speed_rounds: int = 3
    """Rounds in which teacher and finalists are run to measure their speed; 0: it is not measured."""

    def given(self) -> list[str]:
        """The budgets that are set."""
        return [name for name in BUDGETS if getattr(self, name) is not None]

    @property
    def speeds(self) -> bool:
        """Whether a speed is asked for, so that layers have to be measured."""
        return any(name in SPEEDS for name in self.given())

    def problems(self) -> list[str]:
        problems = []
        if not self.given():
            problems.append(f"parameters is missing: give a budget, one or several of {', '.join(BUDGETS)}")
        problems += filter(None, (_amount_problem(name, getattr(self, name)) for name in self.given()))
        problems += one_of("weights", self.weights, WEIGHTS)
        problems += one_of("rank_by", self.rank_by or RANKED_BY[0], RANKED_BY)
        problems += at_least(
            1,
            batch_size=self.batch_size,
            length=self.length,
            measured=self.measured,
            samples=self.samples,
            candidates=self.candidates,
            steps=self.steps,
            finalists=self.finalists,
        )
        problems += at_least(0, speed_rounds=self.speed_rounds)
        if not 0 < self.tolerance < 1:
            problems.append(f"tolerance = {self.tolerance} must be above 0 and below 1")
        if self.finalists > self.candidates:
            problems.append(f"finalists = {self.finalists} is above candidates = {self.candidates}")
        for name in RANGES:
            problems += self._range_problems(name)
        return problems

    def _range_problems(self, name: str) -> list[str]:
        value = getattr(self, name)
        numbers = value if isinstance(value, list) else [value]
        if value is None or (len(numbers) in (1, 2) and all(type(number) is int and number > 0 for number in numbers)):
            if value is not None and numbers[0] > numbers[-1]:
                return [f"{name} = {value} runs backwards: give [{numbers[-1]},{numbers[0]}]"]
            return []
        return [f"{name} = {value!r} must be a whole number, or [least,most]"]

    def range(self, name: str) -> tuple[int, int] | None:
        """The least and the most of a size that is looked at; None: any."""
        value = getattr(self, name)
        if value is None:
            return None
        numbers = value if isinstance(value, list) else [value]
        return numbers[0], numbers[-1]


@dataclasses.dataclass(kw_only=True)
class SearchCutConfig(Config):
    """How candidates are cut: prune's settings but for the sizes."""

    method: str = "compensated"
    """`minitron` or `compensated`, as in prune."""
    ridge: float = 1e-3
    """As in prune."""
    choose_by: str = "saliency"
    """As in prune."""
    gain_tolerance: float = 0.1
    """As in prune."""
    untie: bool = False
    """As in prune."""
    num_samples: int = 256
    """Calibration samples of the scores, which serve every shape."""
    num_block_samples: int = 32
    """Samples on which maps in place of dropped layers are fitted."""
    scores_path: str | None = None
    """As in prune; losses of cuts are kept beside it, and no further search of the same teacher measures them again."""
    seed: int | None = None
    """Seed of calibration samples; none: the search's."""
    hidden_size_divisor: int | None = None
    """Grid of hidden_size; none: as in prune."""
    ffn_hidden_size_divisor: int | None = None
    """Grid of ffn_hidden_size; none: as in prune."""
    num_layers_divisor: int = 2
    """Grid of num_layers."""

    def problems(self) -> list[str]:
        problems = one_of("method", self.method, METHODS) + one_of("choose_by", self.choose_by, CHOICES)
        problems += at_least(
            1,
            num_samples=self.num_samples,
            num_block_samples=self.num_block_samples,
            hidden_size_divisor=self.hidden_size_divisor,
            ffn_hidden_size_divisor=self.ffn_hidden_size_divisor,
            num_layers_divisor=self.num_layers_divisor,
        )
        if not 0 < self.ridge < 1:
            problems.append(f"ridge = {self.ridge} must be above 0 and below 1")
        return problems

    def targets(self, sizes: Mapping[str, int]) -> PruneTargets:
        """prune's targets for a shape of these sizes."""
        fields: dict[str, Any] = {**dataclasses.asdict(self), **sizes}
        del fields["seed"]
        return PruneTargets(**fields, refit="once" if self.method == "compensated" else None)


@dataclasses.dataclass(kw_only=True)
class SearchConfig(Config):
    """From a budget to the best student: shapes, cuts, short distillations in rounds, finalists."""

    output: str = "???"
    """Folder to make: the winner's checkpoint, search.json, a table."""
    seed: int = 1234
    """Seed of the order of training samples, and of calibration samples where prune.seed is none."""
    overwrite: bool = False
    """Replace an output that was made from something else."""
    dry_run: bool = False
    """Print the space and the rounds, and touch nothing."""
    search: SearchSettings = field(default_factory=SearchSettings)
    prune: SearchCutConfig = field(default_factory=SearchCutConfig)
    kd: KDConfig = field(default_factory=KDConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    @property
    def calibration_seed(self) -> int:
        return self.seed if self.prune.seed is None else self.prune.seed

    @property
    def ranked_by(self) -> str:
        """The validation loss by which a round ranks."""
        return self.search.rank_by or self.kd.metric

    def problems(self) -> list[str]:
        problems = layout_problems(self.trainer, self.model)
        if self.ranked_by == "kd_loss" and not self.kd.kd_weight:
            problems.append("search.rank_by = kd_loss needs KD, and kd.kd_weight is 0: give search.rank_by=lm_loss")
        if not self.dry_run:
            problems += missing_data(self.model.data)
        if self.output == "???" and not self.dry_run:
            problems.append("output is missing: name the folder to make, output=DIR")
        if self.kd.folders or self.kd.fill:
            problems.append(
                "kd.teacher, kd.teachers and kd.fill: a search has its teacher answer once by itself; leave them"
            )
        if self.model.init != "checkpoint":
            problems.append("model.init: a search starts from a teacher's checkpoint, model.restore_from_path")
        return problems
