"""Settings of the stages that run a model: finetune, distill, evaluate."""

import dataclasses
from dataclasses import field
from typing import Any

from nemo_minitron.config.schemas.base import Config, at_least, one_of
from nemo_minitron.config.schemas.formats import format_problems, makes_file, output_format
from nemo_minitron.config.schemas.instructions import InstructConfig, PeftConfig


@dataclasses.dataclass(kw_only=True)
class TrainerConfig(Config):
    """Hardware and length of a run (NeMo 24.07's `trainer`)."""

    devices: int = 1
    """Ranks a node: GPUs, or gloo processes on a machine without CUDA."""
    num_nodes: int = 1
    """Nodes."""
    accelerator: str = "auto"
    """`auto`, `gpu` or `cpu`."""
    precision: str = "auto"
    """`bf16`, `bf16-mixed` or `32`; auto: bf16 on a GPU, 32 on a CPU."""
    max_steps: int = 30
    """Optimizer steps."""
    val_check_interval: int = 10
    """Validate every so many optimizer steps."""
    limit_val_batches: int = 32
    """Global batches a validation."""
    log_every_n_steps: int = 10
    """Write to TensorBoard, and a line where standard error is no terminal, every so many steps."""
    gradient_clip_val: float = 1.0
    """Clip the gradient's norm."""
    num_sanity_val_steps: int = 0
    """Validation batches before training starts."""

    def problems(self) -> list[str]:
        found = at_least(
            1,
            devices=self.devices,
            num_nodes=self.num_nodes,
            max_steps=self.max_steps,
            val_check_interval=self.val_check_interval,
            limit_val_batches=self.limit_val_batches,
            log_every_n_steps=self.log_every_n_steps,
        )
        found += one_of("accelerator", self.accelerator, ("auto", "gpu", "cpu"))
        found += one_of("precision", str(self.precision), ("auto", "bf16", "bf16-mixed", "32"))
        return found


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
        found = one_of("name", self.name, ("CosineAnnealing",))
        return found + at_least(0, warmup_steps=self.warmup_steps, constant_steps=self.constant_steps)


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
        found = [] if self.lr > 0 else [f"lr = {self.lr} must be above 0"]
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"betas = {list(self.betas)} must be two numbers in [0, 1)")
        if self.sched.min_lr > self.lr:
            found.append(f"sched.min_lr = {self.sched.min_lr} is above lr = {self.lr}")
        return found


@dataclasses.dataclass(kw_only=True)
class ModelDataConfig(Config):
    """The tokenised data that a stage reads."""

    data_prefix: Any = None
    """Folder made by `minitron data`, or NeMo 24.07's form, {train:[1.0,prefix],validation:[prefix],test:[prefix]}."""
    instructions: str | None = None
    """finetune: file or folder of instructions and answers, in place of data_prefix (see instruct.format)."""
    seq_length: int | None = None
    """Tokens a sample; none: model.encoder_seq_length, or else the model's own length."""
    num_workers: int = 2
    """Processes of the data loader."""
    index_mapping_dir: str | None = None
    """Where Megatron keeps the sample order; none: inside the output folder."""

    def problems(self) -> list[str]:
        return at_least(0, num_workers=self.num_workers) + at_least(2, seq_length=self.seq_length)


def missing_data(data: ModelDataConfig) -> list[str]:
    """A problem unless tokenised data is named, and no other."""
    if data.instructions:
        return ["model.data.instructions is for finetune; name tokenised data, model.data.data_prefix"]
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
        found = at_least(
            1,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            context_parallel_size=self.context_parallel_size,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
        )
        found += one_of("init", self.init, ("checkpoint", "random"))
        if self.init == "checkpoint" and not self.restore_from_path:
            found.append("restore_from_path is missing: name the checkpoint to start from, or init=random")
        if self.init == "random" and not self.architecture:
            found.append("architecture is missing: init=random needs the sizes of the model")
        return found


@dataclasses.dataclass(kw_only=True)
class ExpManagerConfig(Config):
    """Where results go."""

    exp_dir: str = "runs"
    """Folder of runs."""
    name: str = "run"
    """Name of this run's folder."""


@dataclasses.dataclass(kw_only=True)
class StageConfig(Config):
    """What finetune and distill share."""

    seed: int = 1234
    """Seed of weights, data order and calibration."""
    overwrite: bool = False
    """Replace an output that was made from something else."""
    to: str | None = None
    """Format of the result: nemo2, nemo1 or hf; none: *.nemo is an archive (NeMo-1 layout), else a NeMo-2 directory."""
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

    def problems(self) -> list[str]:
        found = layout_problems(self.trainer, self.model) + self.data_problems()
        return found + format_problems(self.output, self.to)

    def data_problems(self) -> list[str]:
        """What is wrong with the data that is named."""
        return missing_data(self.model.data)


def layout_problems(trainer: TrainerConfig, model: ModelConfig) -> list[str]:
    """What is wrong with the parallel layout: each problem with the equation that failed."""
    found = []
    world = trainer.devices * trainer.num_nodes
    sizes = (model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size)
    per_replica = sizes[0] * sizes[1] * sizes[2]
    if per_replica < 1 or world % per_replica:
        found.append(
            f"world size {world} = trainer.devices {trainer.devices} x trainer.num_nodes {trainer.num_nodes} must be a "
            f"multiple of tensor {sizes[0]} x pipeline {sizes[1]} x context {sizes[2]} parallel = {per_replica}"
        )
        return found
    samples = model.micro_batch_size * (world // per_replica)
    if samples < 1 or model.global_batch_size % samples:
        found.append(
            f"model.global_batch_size {model.global_batch_size} must be a multiple of micro_batch_size "
            f"{model.micro_batch_size} x data parallel {world // per_replica} = {samples}"
        )
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        found.append("model.sequence_parallel needs tensor_model_parallel_size above 1")
    return found


@dataclasses.dataclass(kw_only=True)
class FinetuneConfig(StageConfig):
    """Teacher correction, training from random weights, or instruction tuning; of all weights or of adapters."""

    instruct: InstructConfig = field(default_factory=InstructConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.peft.scheme != "none" and self.model.init == "random":
            found.append("peft.scheme = lora trains adapters of a checkpoint: init=random has none")
        if self.peft.keep_adapter and makes_file(self.target_format):
            found.append(f"peft.keep_adapter leaves a folder beside the weights, but {self.output} is an archive")
        if (
            self.peft.keep_adapter
            and self.model.tensor_model_parallel_size * self.model.pipeline_model_parallel_size > 1
        ):
            found.append("peft.keep_adapter needs tensor_model_parallel_size = pipeline_model_parallel_size = 1")
        return found

    def data_problems(self) -> list[str]:
        data = self.model.data
        if not data.instructions:
            return missing_data(data)
        return ["model.data.data_prefix and model.data.instructions: give one"] if data.data_prefix else []


DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "soft_cross_entropy")


@dataclasses.dataclass(kw_only=True)
class HiddenLossConfig(Config):
    """Losses between hidden states of student and teacher, beside the one on logits."""

    weight: float = 0.0
    """Weight of their mean over all pairs; 0: none. The papers gained by them only where depth is cut a lot."""
    loss: str = "cosine"
    """`cosine`, 1 - cos(P h_student, h_teacher), or `mse`. P is trained along where the widths differ."""
    pairs: Any = "outer"
    """`outer`: the embeddings and the last block. `auto`: each of the student's layers with the one it was in the
    teacher, or evenly spread where that is not known. Or pairs, [[0,0],[8,16]]: the student's layer and the teacher's,
    from 1; 0 for the embeddings."""
    scale: str = "fixed"
    """`fixed`, or `dynamic`: times L_kd / L_hidden of the micro batch, which lifts them to the size of L_kd."""

    def problems(self) -> list[str]:
        found = at_least(0, weight=self.weight)
        found += one_of("loss", self.loss, ("cosine", "mse")) + one_of("scale", self.scale, ("fixed", "dynamic"))
        listed = isinstance(self.pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(layer) is int for layer in pair)
            for pair in self.pairs
        )
        if self.pairs not in ("outer", "auto") and not (listed and self.pairs):
            found.append(f"pairs = {self.pairs!r} must be outer, auto, or a list of [student's layer, teacher's layer]")
        return found


@dataclasses.dataclass(kw_only=True)
class KDConfig(Config):
    """The distillation loss."""

    loss: str = "forward_kl"
    """`forward_kl`, `reverse_kl`, `jensen_shannon` or `soft_cross_entropy`, of the teacher's and the student's
    distributions of the next token. The papers found forward KL best."""
    beta: float = 0.5
    """With jensen_shannon: the teacher's share of the mixture, 0 to 1."""
    top_k: int | None = None
    """Only the teacher's so many likeliest tokens, renormalised (forward_kl); none: all. The papers gained nothing."""
    temperature: float = 1.0
    """Softmax temperature of both; the papers found 1 best."""
    times_t_squared: bool = False
    """Multiply by the temperature squared, so that gradients keep their size when it changes."""
    kd_weight: float = 1.0
    """Weight of the distillation loss; 0 trains on the LM loss alone, without a teacher (the control)."""
    lm_weight: float = 0.0
    """Weight of the language-model loss; the papers found the KL alone best."""
    form: str = "auto"
    """`fused`: with the output layer, so that logits of a whole sequence never exist. `chunked`: on the logits. auto:
    fused wherever it can be (not with top_k, nor with sequence parallel)."""
    hidden: HiddenLossConfig = field(default_factory=HiddenLossConfig)

    def problems(self) -> list[str]:
        found = [] if self.temperature > 0 else [f"temperature = {self.temperature} must be above 0"]
        found += one_of("loss", self.loss, DIVERGENCES) + one_of("form", self.form, ("auto", "fused", "chunked"))
        found += at_least(1, top_k=self.top_k)
        if not 0 <= self.beta <= 1:
            found.append(f"beta = {self.beta} must be from 0 to 1")
        if self.top_k is not None and (self.loss != "forward_kl" or self.form == "fused"):
            found.append("top_k goes with loss=forward_kl, and not with form=fused")
        found += at_least(0, kd_weight=self.kd_weight, lm_weight=self.lm_weight)
        if self.hidden.weight and not self.kd_weight:
            found.append("hidden.weight needs the teacher: kd_weight must be above 0")
        if not self.kd_weight and not self.lm_weight:
            found.append("kd_weight and lm_weight are both 0: there is no loss to train on")
        return found


@dataclasses.dataclass(kw_only=True)
class DistillConfig(StageConfig):
    """Knowledge distillation of a pruned student."""

    kd: KDConfig = field(default_factory=KDConfig)

    @property
    def metric(self) -> str:
        """The validation loss by which the best step is chosen."""
        return self.monitor or ("kd_loss" if self.kd.kd_weight else "lm_loss")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.kd.kd_weight and not self.model.kd_teacher_restore_from_path:
            found.append("model.kd_teacher_restore_from_path is missing: name the teacher's checkpoint")
        if self.kd.form == "fused" and self.model.sequence_parallel:
            found.append("kd.form = fused takes no model.sequence_parallel: give kd.form=chunked")
        if self.kd.hidden.weight:
            found += self._hidden_problems()
        if self.model.init == "random":
            found.append("model.init = random: distill starts from a pruned checkpoint, model.restore_from_path")
        return found

    def _hidden_problems(self) -> list[str]:
        found = []
        if self.model.pipeline_model_parallel_size > 1:
            found.append(
                "kd.hidden.weight needs model.pipeline_model_parallel_size=1: ModelOpt compares only what lies on the "
                "last pipeline stage of both models"
            )
        if self.model.sequence_parallel:
            found.append(
                "kd.hidden.weight takes no model.sequence_parallel: a rank then has hidden states of other tokens than "
                "its loss mask"
            )
        return found


@dataclasses.dataclass(kw_only=True)
class LossConfig(StageConfig):
    """Token loss and perplexity of a checkpoint."""

    splits: list[str] = field(default_factory=lambda: ["validation", "test"])
    """Splits to measure."""
    limit_batches: int = 32
    """Global batches of each split, from its start."""

    def problems(self) -> list[str]:
        found = super().problems() + at_least(1, limit_batches=self.limit_batches)
        for split in self.splits:
            found += one_of("splits", split, ("train", "validation", "test"))
        return found
