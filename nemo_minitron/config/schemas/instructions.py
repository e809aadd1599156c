"""Settings of instruction tuning: how the rows are read, and which weights train."""

import dataclasses
from dataclasses import field

from nemo_minitron.config.schemas.base import Config, at_least, one_of

ROW_FORMATS = ("auto", "lmflow", "nemo", "alpaca")
TEMPLATES = ("auto", "plain", "alpaca", "chat")
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclasses.dataclass(kw_only=True)
class InstructConfig(Config):
    """How the rows of model.data.instructions become samples."""

    format: str = "auto"
    """Of the rows: `lmflow` ({type, instances}), `nemo` (input and output, or messages), `alpaca` (instruction, input,
    output); auto: each file's own content says it."""
    template: str = "auto"
    """`plain`, `alpaca`, or `chat`, the tokenizer's chat template; auto: chat where the tokenizer has one, else alpaca
    for alpaca's rows and plain for others."""
    answers_only: bool = True
    """Train and validate on the answers' tokens alone; false: on prompts too. text_only rows count whole."""
    too_long: str = "truncate"
    """Of rows longer than the sequence: `truncate` cuts the start of the prompt (and cuts text_only rows into pieces),
    `drop` leaves the row out. A row whose last answer alone is too long is left out."""
    validation_share: float = 0.05
    """Rows kept for validation, drawn by the seed, where there is no validation file."""

    def problems(self) -> list[str]:
        problems = one_of("format", self.format, ROW_FORMATS) + one_of("template", self.template, TEMPLATES)
        problems += one_of("too_long", self.too_long, ("truncate", "drop"))
        if not 0 < self.validation_share < 1:
            problems.append(f"validation_share = {self.validation_share} must be above 0 and below 1")
        return problems


@dataclasses.dataclass(kw_only=True)
class PeftConfig(Config):
    """Which weights train: all, or NeMo's LoRA adapters, which are merged into the result."""

    scheme: str = "none"
    """`none`: all weights; `lora`: low-rank adapters on frozen weights (NeMo's llm.peft.LoRA)."""
    dim: int = 32
    """Rank of the adapters."""
    alpha: int = 32
    """The adapters' product is scaled by alpha / dim."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    target_modules: list[str] = field(default_factory=lambda: list(TARGETS))
    """Of linear_qkv, linear_proj, linear_fc1, linear_fc2: the layers that get adapters."""
    keep_adapter: bool = False
    """Also leave the adapter in the result's folder adapter/, as Hugging Face PEFT reads it."""

    def problems(self) -> list[str]:
        problems = one_of("scheme", self.scheme, ("none", "lora")) + at_least(1, dim=self.dim, alpha=self.alpha)
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout = {self.dropout} must be from 0 to below 1")
        for module in self.target_modules:
            problems += one_of("target_modules", module, TARGETS)
        if not self.target_modules:
            problems.append(f"target_modules is empty: name some of {', '.join(TARGETS)}")
        if self.keep_adapter and self.scheme == "none":
            problems.append("keep_adapter needs scheme=lora")
        return problems
