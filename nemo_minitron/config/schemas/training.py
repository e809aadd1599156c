"""Settings of the stages that train or measure a model; those of distillation alone stand in `distillation`."""

import dataclasses
import math
from dataclasses import field
from typing import Any

from nemo_minitron.config.schemas.base import Config, at_least, one_of
from nemo_minitron.config.schemas.formats import format_problems, makes_file, output_format
from nemo_minitron.config.schemas.hardware import TrainerConfig
from nemo_minitron.config.schemas.instructions import InstructConfig, PeftConfig


@dataclasses.dataclass(kw_only=True)
class SchedConfig(Config):
    """Learning-rate schedule: linear warm-up, then cosine down to `min_lr`."""

    name: str = "CosineAnnealing"
    """Only CosineAnnealing."""
    warmup_steps: int = 1
    """Steps of linear warm-up."""
    constant_steps: int = 0
    """Steps at `min_lr` after the annealing."""
    min_lr: float = 1e-5
    """Learning rate at the end."""

    def problems(self) -> list[str]:
        problems = one_of("name", self.name, ("CosineAnnealing",))
        return problems + at_least(0, warmup_steps=self.warmup_steps, constant_steps=self.constant_steps)


@dataclasses.dataclass(kw_only=True)
class OptimConfig(Config):
    """Adam."""

    name: str = "distributed_fused_adam"
    """Kept for NeMo 24.07's overrides; Megatron's (distributed) Adam is what runs."""
    lr: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Adam's betas."""
    sched: SchedConfig = field(default_factory=SchedConfig)

    def problems(self) -> list[str]:
        problems = [] if self.lr > 0 else [f"lr = {self.lr} must be above 0"]
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas = {list(self.betas)} must be two numbers in [0, 1)")
        if self.sched.min_lr > self.lr:
            problems.append(f"sched.min_lr = {self.sched.min_lr} is above lr = {self.lr}")
        return problems


@dataclasses.dataclass(kw_only=True)
class ModelDataConfig(Config):
    """The tokenised data that a stage reads."""

    data_prefix: Any = None
    """Folder made by `minitron data`, or NeMo 24.07's form, {train:[1.0,prefix],validation:[prefix],test:[prefix]}."""
    instructions: str | None = None
    """finetune, distill: file or folder of instructions and answers, in place of data_prefix (see instruct.format)."""
    blend: Any = None
    """finetune, distill, prune, loss: several sources and the weights of their shares of the samples,
    {wiki:0.3,code:0.5,chat:0.2}. Names are paths, or folders in data_prefix where that is given; each is a folder that
    `minitron data` made, or a file or folder of instructions."""
    dynamic: bool = False
    """With blend: after each validation the shares follow the excess of each source's loss over its reference (Sheared
    LLaMA's dynamic batch loading); they count from the next validation on."""
    reference: Any = None
    """With dynamic: the lm_loss to reach on each source, {wiki:2.1,code:1.2,chat:1.6}; none: distill measures the
    teacher's once."""
    windows: str = "auto"
    """Of text: `shuffled`, Megatron's, documents shuffled and cut into samples anew in each pass; `fixed`, windows of
    the text as it lies, the same in each pass, in an order that the seed gives. auto: shuffled, but fixed where a
    teacher's answers are kept (teach, kd.teacher)."""
    packing: bool = False
    """Of instructions, in a blend too: as many whole rows a sample as it has room for, each of which sees itself alone,
    in place of one row and padding; needs model.micro_batch_size=1."""
    seq_length: int | None = None
    """Tokens a sample; none: model.encoder_seq_length, or else the model's own length."""
    num_workers: int = 2
    """Processes of the data loader."""
    index_mapping_dir: str | None = None
    """Where Megatron keeps the sample order; none: inside the output folder."""

    @property
    def names_text(self) -> bool:
        """Whether there is text to run a model on."""
        return bool(self.data_prefix or self.blend)

    def problems(self) -> list[str]:
        problems = at_least(0, num_workers=self.num_workers) + at_least(2, seq_length=self.seq_length)
        problems += one_of("windows", self.windows, ("auto", "shuffled", "fixed"))
        return problems + (self._no_blend_problems() if self.blend is None else self._blend_problems())

    def _no_blend_problems(self) -> list[str]:
        return [
            f"{name} goes with blend: name the sources, blend={{wiki:0.5,code:0.5}}"
            for name, given in (("dynamic", self.dynamic), ("reference", self.reference is not None))
            if given
        ]

    def _blend_problems(self) -> list[str]:
        """What is wrong with the sources of a blend, their weights and references."""
        if not isinstance(self.blend, dict) or not self.blend:
            return [
                f"blend = {self.blend!r} must be sources with weights; quoted, since shells take braces apart: "
                "'model.data.blend={wiki:0.3,code:0.7}'"
            ]
        problems = [
            f"blend: the weight of {name} is {weight!r}, and must be a number above 0"
            for name, weight in self.blend.items()
            if not _is_number(weight) or weight <= 0
        ]
        if self.instructions:
            problems.append("blend and instructions: give one; rows of instructions may be a source of the blend")
        if self.data_prefix is not None and not isinstance(self.data_prefix, str):
            problems.append(f"blend: data_prefix = {self.data_prefix!r} must be the folder in which the sources lie")
        if self.windows == "shuffled":
            problems.append("windows = shuffled: a blend reads text in fixed windows")
        if self.dynamic and len(self.blend) < 2:
            problems.append("dynamic: there is only one source in the blend, whose share is all")
        if self.reference is not None:
            problems += self._reference_problems()
        return problems

    def _reference_problems(self) -> list[str]:
        if not self.dynamic:
            return ["reference goes with dynamic=true"]
        known = isinstance(self.reference, dict) and set(self.reference) == set(self.blend)
        if not known or not all(map(_is_number, self.reference.values())):
            named = ",".join(f"{name}:2.0" for name in self.blend)
            return [f"reference = {self.reference!r} must be a loss for each source of the blend, {{{named}}}"]
        return []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def missing_data(data: ModelDataConfig) -> list[str]:
    """A problem unless tokenised data is named, and no other."""
    if data.blend is not None:
        return ["model.data.blend is for finetune, distill and prune; name tokenised data, model.data.data_prefix"]
    if data.instructions:
        return ["model.data.instructions is for finetune and distill; name tokenised data, model.data.data_prefix"]
    if data.packing:
        return ["model.data.packing packs rows of instructions, and text fills its samples already: leave it out"]
    return [] if data.data_prefix else ["model.data.data_prefix is missing: name the folder that `minitron data` made"]


@dataclasses.dataclass(kw_only=True)
class ModelConfig(Config):
    """Checkpoints, parallel layout, batches and optimizer (NeMo 24.07's `model`)."""

    restore_from_path: str | None = None
    """Checkpoint to start from; for distill: the student."""
    kd_teacher_restore_from_path: str | None = None
    """Distill: the teacher's checkpoint."""
    init: str = "checkpoint"
    """`checkpoint`, or `random`: start from random weights of `architecture`."""
    architecture: dict[str, Any] | None = None
    """With init=random: fields of nemo_minitron.architecture.Architecture, or `known`, a known model (minitron_8b), and
    what differs from it; vocab_size null: from the tokenizer."""
    tokenizer: str | None = None
    """Directory with the tokenizer; none: the checkpoint's, or else the data folder's."""
    nemo_path: str | None = None
    """Output folder; none: exp_manager.exp_dir/exp_manager.name."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each matrix."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers."""
    context_parallel_size: int = 1
    """Ranks that share each sequence; needs Transformer Engine."""
    sequence_parallel: bool = False
    """Split activations of norms over the tensor-parallel ranks; needs Transformer Engine."""
    micro_batch_size: int = 1
    """Samples a rank works on at once."""
    global_batch_size: int = 128
    """Samples an optimizer step."""
    encoder_seq_length: int | None = None
    """Tokens a sample; data.seq_length wins."""
    data: ModelDataConfig = field(default_factory=ModelDataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def problems(self) -> list[str]:
        problems = at_least(
            1,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            context_parallel_size=self.context_parallel_size,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
        )
        problems += one_of("init", self.init, ("checkpoint", "random"))
        if self.init == "checkpoint" and not self.restore_from_path:
            problems.append("restore_from_path is missing: name the checkpoint to start from, or init=random")
        if self.init == "random" and not self.architecture:
            problems.append("architecture is missing: init=random needs the sizes of the model")
        return problems


@dataclasses.dataclass(kw_only=True)
class ExpManagerConfig(Config):
    """Where results go."""

    exp_dir: str = "runs"
    """Folder of runs."""
    name: str = "run"
    """Name of this run's folder."""


@dataclasses.dataclass(kw_only=True)
class StageConfig(Config):
    """What all that trains or measures a model shares."""

    seed: int = 1234
    """Seed of weights, data order and calibration."""
    overwrite: bool = False
    """Replace an output that was made from something else."""
    to: str | None = None
    """Format of the result: nemo2, nemo1, hf, bridge or gguf; none: *.nemo is an archive (NeMo-1 layout), *.gguf a GGUF
    file, else a NeMo-2 directory."""
    monitor: str | None = None
    """Validation loss whose best step becomes the result: lm_loss, kd_loss..., or `last`. None: kd_loss where there is
    a teacher, lm_loss otherwise."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)

    @property
    def metric(self) -> str:
        """The validation loss by which the best step is chosen."""
        return self.monitor or "lm_loss"

    @property
    def output(self) -> str:
        """The folder that the stage makes."""
        return self.model.nemo_path or f"{self.exp_manager.exp_dir}/{self.exp_manager.name}"

    @property
    def target_format(self) -> str:
        """The format of the result."""
        return output_format(self.output, self.to)

    @property
    def fixed_windows(self) -> bool:
        """Whether text is read in windows that are the same in each pass."""
        return self.model.data.windows == "fixed"

    def problems(self) -> list[str]:
        problems = layout_problems(self.trainer, self.model) + self.data_problems()
        return problems + format_problems(self.output, self.to)

    def data_problems(self) -> list[str]:
        """What is wrong with the data that is named."""
        return missing_data(self.model.data)


def layout_problems(trainer: TrainerConfig, model: ModelConfig) -> list[str]:
    """What is wrong with the parallel layout: each problem with the equation that failed."""
    problems = []
    world = trainer.devices * trainer.num_nodes
    sizes = (model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size)
    per_replica = sizes[0] * sizes[1] * sizes[2]
    if per_replica < 1 or world % per_replica:
        problems.append(
            f"world size {world} = trainer.devices {trainer.devices} x trainer.num_nodes {trainer.num_nodes} must be a "
            f"multiple of tensor {sizes[0]} x pipeline {sizes[1]} x context {sizes[2]} parallel = {per_replica}"
        )
        return problems
    samples = model.micro_batch_size * (world // per_replica)
    if samples < 1 or model.global_batch_size % samples:
        problems.append(
            f"model.global_batch_size {model.global_batch_size} must be a multiple of micro_batch_size "
            f"{model.micro_batch_size} x data parallel {world // per_replica} = {samples}"
        )
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        problems.append("model.sequence_parallel needs tensor_model_parallel_size above 1")
    return problems


def packing_problems(model: ModelConfig) -> list[str]:
    """What keeps samples from being packed."""
    problems = []
    if model.micro_batch_size > 1:
        problems.append(
            f"model.data.packing needs model.micro_batch_size=1, not {model.micro_batch_size}: a sample holds several "
            "rows already; raise model.data.seq_length for more"
        )
    if model.context_parallel_size > 1:
        problems.append(
            "model.data.packing takes no model.context_parallel_size: ranks that share a sequence would cut its rows"
        )
    return problems


@dataclasses.dataclass(kw_only=True)
class TrainingConfig(StageConfig):
    """What finetune and distill share: text or instructions to train on."""

    instruct: InstructConfig = field(default_factory=InstructConfig)

    def data_problems(self) -> list[str]:
        data = self.model.data
        if data.blend is not None:
            packing = packing_problems(self.model) if data.packing else []
            return packing + (self._dynamic_problems() if data.dynamic else [])
        if not data.instructions:
            return missing_data(data)
        problems = ["model.data.data_prefix and model.data.instructions: give one"] if data.data_prefix else []
        return problems + (packing_problems(self.model) if data.packing else [])

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher runs beside the model."""
        return False

    def _dynamic_problems(self) -> list[str]:
        problems = []
        if self.model.data.reference is None and not self.has_teacher:
            problems.append(
                "model.data.dynamic needs a loss to reach on each source where there is no teacher to measure: "
                "model.data.reference={wiki:2.1,code:1.2}"
            )
        return problems + dynamic_problems(self.trainer.max_steps, self.trainer.val_check_interval)


def dynamic_problems(max_steps: int, val_check_interval: int) -> list[str]:
    """A problem where a run ends before any shares that follow a validation count."""
    if max_steps > 2 * val_check_interval:
        return []
    return [
        f"dynamic shares that follow a validation first count after 2 x val_check_interval = {2 * val_check_interval} "
        f"steps, and max_steps = {max_steps}: validate more often, or train longer"
    ]


@dataclasses.dataclass(kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Teacher correction, training from random weights, or instruction tuning; of all weights or of adapters."""

    peft: PeftConfig = field(default_factory=PeftConfig)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.peft.scheme != "none" and self.model.init == "random":
            problems.append("peft.scheme = lora trains adapters of a checkpoint: init=random has none")
        if self.peft.keep_adapter and makes_file(self.target_format):
            problems.append(f"peft.keep_adapter leaves a folder beside the weights, but {self.output} is an archive")
        if (
            self.peft.keep_adapter
            and self.model.tensor_model_parallel_size * self.model.pipeline_model_parallel_size > 1
        ):
            problems.append("peft.keep_adapter needs tensor_model_parallel_size = pipeline_model_parallel_size = 1")
        return problems


@dataclasses.dataclass(kw_only=True)
class LossConfig(StageConfig):
    """Token loss and perplexity of a checkpoint."""

    splits: list[str] = field(default_factory=lambda: ["validation", "test"])
    """Splits to measure."""
    limit_batches: int = 32
    """Global batches of each split, from its start; of a blend, whose sources are text, as many windows of each."""

    def data_problems(self) -> list[str]:
        data = self.model.data
        if data.blend is None:
            return missing_data(data)
        return ["model.data.dynamic is for finetune and distill"] if data.dynamic else []

    def problems(self) -> list[str]:
        problems = super().problems() + at_least(1, limit_batches=self.limit_batches)
        for split in self.splits:
            problems += one_of("splits", split, ("train", "validation", "test"))
        return problems
