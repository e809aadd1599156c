"""Settings of `minitron plan`."""

import dataclasses
from dataclasses import field
from typing import Any

from nemo_minitron.config.schemas.base import Config, above_zero, at_least, one_of
from nemo_minitron.config.schemas.hardware import HardwareConfig

#: Samples a rank works on at once where the hardware leaves it open, before they are cut to what fits.
FREE_MICRO_BATCH = 8
PLAN_STAGES = ("finetune", "prune", "distill")


@dataclasses.dataclass(kw_only=True)
class PlanStudentConfig(Config):
    """The student: sizes that differ from the teacher's, or a model of its own."""

    model: str | None = None
    """A checkpoint, or the name of a known model; none: the teacher with the sizes below."""
    num_layers: int | None = None
    """Layers to keep."""
    hidden_size: int | None = None
    """Width of the residual stream to keep."""
    ffn_hidden_size: int | None = None
    """FFN neurons to keep."""
    num_attention_heads: int | None = None
    """Attention heads to keep."""

    def sizes(self) -> dict[str, int]:
        """The sizes that are given."""
        return {name: value for name, value in vars(self).items() if name != "model" and value is not None}

    def problems(self) -> list[str]:
        problems = at_least(1, **self.sizes())
        if self.model and self.sizes():
            problems.append(
                f"model and {', '.join(self.sizes())} are both given: name the student, or its sizes, not both"
            )
        return problems


@dataclasses.dataclass(kw_only=True)
class PlanConfig(Config):
    """What `minitron plan` works out, without loading anything."""

    model: str | None = None
    """The teacher: a checkpoint (its sizes alone are read), or the name of a known model (llama31_8b...)."""
    architecture: dict[str, Any] | None = None
    """Instead of model: fields of nemo_minitron.architecture.Architecture, or `known` and what differs from it."""
    student: PlanStudentConfig = field(default_factory=PlanStudentConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    stage: str = "all"
    """`finetune` (teacher correction), `prune` (its scoring; the cut needs one tensor's memory), `distill` or `all`."""
    seq_length: int | None = None
    """Tokens a sample; none: the model's own length, or as much of it as fits."""
    micro_batch_size: int | None = None
    """Samples a rank works on at once; none: the hardware's, or as many of them as fit."""
    global_batch_size: int = 128
    """Samples an optimizer step."""
    score_batch_size: int = 1
    """Samples a forward pass while scoring."""
    statistics: bool = True
    """While scoring, second moments are gathered (prune.method=compensated needs them)."""
    kd_form: str = "auto"
    """`fused` or `chunked`, as kd.form; auto: fused, without sequence parallel."""
    transformer_engine: bool = True
    """Whether Transformer Engine is installed on the GPUs; without it layers are PyTorch's."""
    tflops_per_gpu: float | None = None
    """TFLOP/s that a rank achieves on your machine, for estimates of time; none: no estimates."""
    tokens: float | None = None
    """Tokens of the training split (1e9), for the size of a teacher's answers and the hours of minitron teach."""
    layouts: bool = True
    """Also list every layout of that many ranks, and which fit."""
    json: bool = False
    """Print JSON."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that are planned: without a student, all but distill."""
        if self.stage != "all":
            return (self.stage,)
        return PLAN_STAGES if self.has_student else PLAN_STAGES[:2]

    @property
    def has_student(self) -> bool:
        return bool(self.student.model or self.student.sizes())

    @property
    def micro_batch(self) -> int:
        """Samples a rank works on at once."""
        return self.micro_batch_size or self.hardware.micro_batch_size or FREE_MICRO_BATCH

    def problems(self) -> list[str]:
        problems = one_of("stage", self.stage, (*PLAN_STAGES, "all"))
        problems += one_of("kd_form", self.kd_form, ("auto", "fused", "chunked"))
        problems += at_least(
            1,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            score_batch_size=self.score_batch_size,
        )
        if (self.model is None) == (self.architecture is None):
            problems.append(
                "model is missing: name a checkpoint or a known model, minitron plan MODEL, or give its sizes, "
                "architecture={num_layers:32,...}"
                if self.model is None
                else "model and architecture are both given: name one of them"
            )
        if self.stage == "distill" and not self.has_student:
            problems.append("student is missing: give its sizes, student.hidden_size=3072, or student.model=NAME")
        problems += above_zero(tokens=self.tokens)
        if self.tflops_per_gpu is not None and self.tflops_per_gpu <= 0:
            problems.append(f"tflops_per_gpu = {self.tflops_per_gpu} must be above 0")
        if self.kd_form == "fused" and self.hardware.sequence_parallel:
            problems.append("kd_form = fused takes no hardware.sequence_parallel: give kd_form=chunked, or leave it")
        return problems
