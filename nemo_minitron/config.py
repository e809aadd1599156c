"""The configuration of every stage: keyword-only dataclasses behind conf/*.yaml.

A dataclass states its fields and, in ``problems()``, what makes them wrong. ``validated`` collects the problems of a
whole tree and raises them at once. Names follow the NeMo 24.07 documentation, so that its overrides work unchanged.
"""

import dataclasses
import os
import re
from dataclasses import field
from pathlib import Path
from typing import Any

from nemo_minitron.errors import ConfigError


class Config:
    """Base of all configuration classes."""

    def problems(self) -> list[str]:
        """One message for each thing that is wrong with these values on their own."""
        return []


def all_problems(config: Any, prefix: str = "") -> list[str]:
    """Problems of `config` and of every Config below it, each with the dotted name of the place."""
    found = []
    if isinstance(config, Config):
        found += [f"{prefix}{problem}" for problem in config.problems()]
        for entry in dataclasses.fields(config):
            found += all_problems(getattr(config, entry.name), f"{prefix}{entry.name}.")
    return found


def validated(config: Any, source: str = "configuration") -> Any:
    """Returns `config`; raises one ConfigError with all its problems."""
    found = all_problems(config)
    if found:
        raise ConfigError(found, source)
    return config


def at_least(minimum: float, **values: float | None) -> list[str]:
    """A problem for each named value that is given and below `minimum`."""
    return [
        f"{name} = {value} must be at least {minimum}"
        for name, value in values.items()
        if value is not None and value < minimum
    ]


def one_of(name: str, value: Any, allowed: tuple) -> list[str]:
    """A problem unless `value` is among `allowed`."""
    return [] if value in allowed else [f"{name} = {value!r} must be one of {', '.join(map(str, allowed))}"]


#: Formats of a checkpoint on disk: a NeMo-2 directory, a `.nemo` archive, a Hugging Face directory.
FORMATS = ("nemo2", "nemo1", "hf")


def output_format(path: str, to: str | None = None) -> str:
    """The format of a result at `path`: `to`, or else nemo1 for `*.nemo` and nemo2 for anything else."""
    return to or ("nemo1" if Path(path).suffix == ".nemo" else "nemo2")


def format_problems(path: str, to: str | None) -> list[str]:
    """What is wrong with writing the format `to` at `path`: an unknown format, or a name that says another one."""
    if to is None:
        return []
    if to not in FORMATS:
        return one_of("to", to, FORMATS)
    archive = Path(path).suffix == ".nemo"
    if archive and to != "nemo1":
        return [f"to = {to} makes a directory, but {path} is named like an archive: leave .nemo off, or to=nemo1"]
    if not archive and to == "nemo1":
        return [f"to = nemo1 makes an archive, but {path} is not named like one: name it {path.rstrip('/')}.nemo"]
    return []


@dataclasses.dataclass(kw_only=True)
class DataConfig(Config):
    """What `minitron data` makes: a corpus, tokenised, in Megatron's indexed format."""

    output: str = "???"
    """Folder to make: {train,validation,test}.{bin,idx}, tokenizer/, and for the embedded corpus questions.jsonl."""
    source: str = "embedded"
    """`embedded`, `wikitext103`, or the path of a folder or file (.txt, .jsonl with `text`, .parquet with `text`)."""
    domain: str = "encyclopedic"
    """Of the embedded corpus: `broad` (for pretraining) or `encyclopedic` (the flow's own)."""
    words: int = 2_000_000
    """Of the embedded corpus: words in the training split; validation and test have a tenth each."""
    limit_documents: int | None = None
    """Use only the first so many documents of each split."""
    tokenizer: str | None = None
    """Hugging Face name or directory; none: a byte-level BPE is trained on the training split."""
    vocab_size: int = 2048
    """Size of the BPE that is trained when no tokenizer is given, special tokens included."""
    workers: int = 1
    """Processes that tokenise."""
    seed: int = 1234
    """Seed of the generator and of splits that have to be carved out."""
    overwrite: bool = False
    """Replace an output that was made from something else."""

    def problems(self) -> list[str]:
        found = at_least(1, workers=self.workers, words=self.words, limit_documents=self.limit_documents)
        found += one_of("domain", self.domain, ("broad", "encyclopedic"))
        if self.tokenizer is None and self.vocab_size < 300:
            found.append(f"vocab_size = {self.vocab_size} must be at least 300: 256 bytes, special tokens and merges")
        if self.output == "???":
            found.append("output is missing: name the folder to make, output=DIR")
        return found


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
    """Write to TensorBoard every so many steps."""
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
    seq_length: int | None = None
    """Tokens a sample; none: model.encoder_seq_length, or else the model's own length."""
    num_workers: int = 2
    """Processes of the data loader."""
    index_mapping_dir: str | None = None
    """Where Megatron keeps the sample order; none: inside the output folder."""

    def problems(self) -> list[str]:
        return at_least(0, num_workers=self.num_workers) + at_least(2, seq_length=self.seq_length)


def missing_data(data: ModelDataConfig) -> list[str]:
    """A problem unless the data is named."""
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
    """With init=random: fields of nemo_minitron.architecture.Architecture; vocab_size null: from the tokenizer."""
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
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)

    @property
    def output(self) -> str:
        """The folder that the stage makes."""
        return self.model.nemo_path or f"{self.exp_manager.exp_dir}/{self.exp_manager.name}"

    @property
    def target_format(self) -> str:
        """The format of the result."""
        return output_format(self.output, self.to)

    def problems(self) -> list[str]:
        found = layout_problems(self.trainer, self.model) + missing_data(self.model.data)
        return found + format_problems(self.output, self.to)


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
    """Teacher correction, or training from random weights."""


@dataclasses.dataclass(kw_only=True)
class KDConfig(Config):
    """The distillation loss."""

    temperature: float = 1.0
    """Softmax temperature of both; the papers found 1 best."""
    kd_weight: float = 1.0
    """Weight of the forward KL on logits; 0 trains on the LM loss alone, without a teacher (the control)."""
    lm_weight: float = 0.0
    """Weight of the language-model loss; the papers found the KL alone best."""

    def problems(self) -> list[str]:
        found = [] if self.temperature > 0 else [f"temperature = {self.temperature} must be above 0"]
        found += at_least(0, kd_weight=self.kd_weight, lm_weight=self.lm_weight)
        if not self.kd_weight and not self.lm_weight:
            found.append("kd_weight and lm_weight are both 0: there is no loss to train on")
        return found


@dataclasses.dataclass(kw_only=True)
class DistillConfig(StageConfig):
    """Knowledge distillation of a pruned student."""

    kd: KDConfig = field(default_factory=KDConfig)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.kd.kd_weight and not self.model.kd_teacher_restore_from_path:
            found.append("model.kd_teacher_restore_from_path is missing: name the teacher's checkpoint")
        if self.model.init == "random":
            found.append("model.init = random: distill starts from a pruned checkpoint, model.restore_from_path")
        return found


@dataclasses.dataclass(kw_only=True)
class EvaluateConfig(StageConfig):
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


@dataclasses.dataclass(kw_only=True)
class PruneTargets(Config):
    """What to cut (NeMo 24.07's `prune`)."""

    drop_layers: Any = None
    """Layers to drop, 1-based: [16,17,31] or ranges [16-31]."""
    num_layers: int | None = None
    """Layers to keep, chosen by importance."""
    hidden_size: int | None = None
    """Width of the residual stream to keep."""
    ffn_hidden_size: int | None = None
    """FFN neurons to keep."""
    num_attention_heads: int | None = None
    """Attention heads to keep; a multiple of the query groups. The head size stays."""
    num_query_groups: int | None = None
    """Kept for NeMo 24.07's overrides; ModelOpt no longer prunes it, so only the teacher's own value is taken."""
    num_samples: int = 1024
    """Calibration samples: random sequences of full length from the training split."""
    scores_path: str | None = None
    """Folder of importance scores to reuse or to make; none: beside the teacher's checkpoint, `<teacher>.scores`."""
    hidden_size_divisor: int = 256
    """Grid of hidden_size."""
    ffn_hidden_size_divisor: int = 512
    """Grid of ffn_hidden_size."""
    num_layers_divisor: int = 2
    """Grid of num_layers."""

    @property
    def needs_scores(self) -> bool:
        """Whether importance decides what is cut, so that the model has to run."""
        sizes = (self.num_layers, self.hidden_size, self.ffn_hidden_size, self.num_attention_heads)
        return any(size is not None for size in sizes)

    def problems(self) -> list[str]:
        found = at_least(
            1,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_samples=self.num_samples,
            hidden_size_divisor=self.hidden_size_divisor,
            ffn_hidden_size_divisor=self.ffn_hidden_size_divisor,
            num_layers_divisor=self.num_layers_divisor,
        )
        if not self.drop_layers and not self.needs_scores:
            found.append(
                "drop_layers is missing, and so are num_layers, hidden_size, ffn_hidden_size and num_attention_heads: "
                "name at least one of them"
            )
        if self.drop_layers and self.num_layers is not None:
            found.append("drop_layers and num_layers are both given: name the layers, or have them chosen, not both")
        return found


@dataclasses.dataclass(kw_only=True)
class ExportConfig(Config):
    """The result of pruning."""

    save_path: str = "???"
    """Checkpoint to make."""

    def problems(self) -> list[str]:
        return ["save_path is missing: name the checkpoint to make"] if self.save_path == "???" else []


@dataclasses.dataclass(kw_only=True)
class InferenceConfig(Config):
    """Calibration batches."""

    batch_size: int = 1
    """Samples a forward pass. Scores are the same for any size: L2 over samples, mean over the sequence."""

    def problems(self) -> list[str]:
        return at_least(1, batch_size=self.batch_size)


@dataclasses.dataclass(kw_only=True)
class PruneModelConfig(Config):
    """The teacher to prune, and the data to score it on."""

    restore_from_path: str | None = None
    """The teacher's checkpoint."""
    tensor_model_parallel_size: int = 1
    """ModelOpt scores with 1; of no effect where the layers to drop are named and nothing is scored."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers while scoring."""
    encoder_seq_length: int | None = None
    """Tokens a calibration sample; data.seq_length wins; none: the model's own length."""
    data: ModelDataConfig = field(default_factory=ModelDataConfig)

    def problems(self) -> list[str]:
        found = at_least(1, pipeline_model_parallel_size=self.pipeline_model_parallel_size)
        if not self.restore_from_path:
            found.append("restore_from_path is missing: name the teacher's checkpoint")
        return found


@dataclasses.dataclass(kw_only=True)
class PruneConfig(Config):
    """Depth and width pruning."""

    seed: int = 1234
    """Seed of the choice of calibration samples."""
    overwrite: bool = False
    """Replace an output that was made from something else."""
    to: str | None = None
    """Format of the result: nemo2, nemo1 or hf; none: *.nemo is an archive (NeMo-1 layout), else a NeMo-2 directory."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: PruneModelConfig = field(default_factory=PruneModelConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    prune: PruneTargets = field(default_factory=PruneTargets)
    export: ExportConfig = field(default_factory=ExportConfig)

    @property
    def output(self) -> str:
        """The checkpoint that the stage makes."""
        return self.export.save_path

    @property
    def target_format(self) -> str:
        """The format of the result."""
        return output_format(self.output, self.to)

    def problems(self) -> list[str]:
        found = [] if self.output == "???" else format_problems(self.output, self.to)
        if self.prune.needs_scores and self.model.tensor_model_parallel_size != 1:
            found.append(
                f"model.tensor_model_parallel_size = {self.model.tensor_model_parallel_size}: ModelOpt scores with 1 "
                "only; spread the layers instead, model.pipeline_model_parallel_size=N"
            )
        return found


@dataclasses.dataclass(kw_only=True)
class FlowModelConfig(Config):
    """The teacher of a flow (conf/model/)."""

    name: str = "tiny"
    """What the report calls it."""
    init: str = "random"
    """`random`: make the teacher from random weights by the pretrain stage; `checkpoint`: start from one."""
    restore_from_path: str | None = None
    """With init=checkpoint: the teacher's checkpoint."""
    download: str | None = None
    """Where the teacher comes from when restore_from_path does not exist yet: shown in messages."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of nemo_minitron.architecture.Architecture; a checkpoint's own sizes win."""
    seq_length: int = 128
    """Tokens a sample, in every stage."""

    def problems(self) -> list[str]:
        found = one_of("init", self.init, ("random", "checkpoint")) + at_least(2, seq_length=self.seq_length)
        if self.init == "checkpoint" and not self.restore_from_path:
            found.append("restore_from_path is missing: name the teacher's checkpoint")
        return found


@dataclasses.dataclass(kw_only=True)
class FlowDataConfig(Config):
    """The corpora of a flow (conf/data/)."""

    source: str = "embedded"
    """`embedded`, `wikitext103`, or a path, as in `minitron data`."""
    pretrain_words: int = 2_000_000
    """Words of the broad embedded corpus, on which the teacher of init=random is made when source=embedded."""
    words: int = 1_000_000
    """Words of the encyclopedic embedded corpus."""
    limit_documents: int | None = None
    """Use only the first so many documents of each split."""
    tokenizer: str | None = None
    """Hugging Face name or directory; none: the teacher's own, or a BPE trained on the training split."""
    vocab_size: int = 2048
    """Size of the BPE that is trained."""
    workers: int = 2
    """Processes that tokenise."""

    def problems(self) -> list[str]:
        return at_least(1, words=self.words, pretrain_words=self.pretrain_words, workers=self.workers)


@dataclasses.dataclass(kw_only=True)
class HardwareConfig(Config):
    """Ranks and their layout (conf/hardware/)."""

    name: str = "cpu"
    """What the report calls it."""
    accelerator: str = "auto"
    """`auto`, `gpu` or `cpu`."""
    devices: int = 1
    """Ranks a node."""
    num_nodes: int = 1
    """Nodes."""
    precision: str = "auto"
    """`bf16`, `bf16-mixed` or `32`; auto: bf16 on a GPU, 32 on a CPU."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each matrix while training."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers while training."""
    prune_pipeline_model_parallel_size: int = 1
    """Ranks that share the layers while scoring (ModelOpt takes no tensor parallel)."""
    sequence_parallel: bool = False
    """Split norms' activations over tensor-parallel ranks."""
    micro_batch_size: int = 8
    """Samples a rank works on at once."""
    num_workers: int = 0
    """Processes of the data loader."""


@dataclasses.dataclass(kw_only=True)
class RecipeConfig(Config):
    """A training run of the flow (conf/pretrain/, conf/finetune/, conf/distill/)."""

    max_steps: int = 100
    """Optimizer steps."""
    global_batch_size: int = 8
    """Samples a step."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    val_check_interval: int = 50
    """Validate every so many steps."""
    limit_val_batches: int = 8
    """Global batches a validation."""
    log_every_n_steps: int = 10
    """Write to TensorBoard every so many steps."""

    def problems(self) -> list[str]:
        found = at_least(
            1,
            max_steps=self.max_steps,
            global_batch_size=self.global_batch_size,
            val_check_interval=self.val_check_interval,
            limit_val_batches=self.limit_val_batches,
        )
        if self.min_lr > self.lr:
            found.append(f"min_lr = {self.min_lr} is above lr = {self.lr}")
        return found


@dataclasses.dataclass(kw_only=True)
class DistillRecipeConfig(RecipeConfig):
    """Distillation of each student."""

    kd: KDConfig = field(default_factory=KDConfig)
    control: bool = True
    """Also retrain each student with the LM loss alone for the same steps, to compare with."""


@dataclasses.dataclass(kw_only=True)
class FlowPruneConfig(Config):
    """The students of a flow (conf/prune/)."""

    num_samples: int = 1024
    """Calibration samples."""
    batch_size: int = 1
    """Samples a forward pass while scoring."""
    hidden_size_divisor: int = 256
    """Grid of hidden_size."""
    ffn_hidden_size_divisor: int = 512
    """Grid of ffn_hidden_size."""
    num_layers_divisor: int = 2
    """Grid of num_layers."""
    students: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> targets (drop_layers, num_layers, hidden_size, ffn_hidden_size, num_attention_heads)."""

    def problems(self) -> list[str]:
        found = at_least(1, num_samples=self.num_samples, batch_size=self.batch_size)
        known = ("drop_layers", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        if not self.students:
            found.append("students is empty: name at least one, students.depth.num_layers=N")
        for name, targets in self.students.items():
            found += [
                f"students.{name}.{key} is not a target; known are {', '.join(known)}"
                for key in (targets or {})
                if key not in known
            ]
        return found


@dataclasses.dataclass(kw_only=True)
class FlowConfig(Config):
    """The whole flow: data, teacher, teacher correction, pruning, distillation, table."""

    output_dir: str = "runs/tiny"
    """Folder of the run; each stage has a folder in it."""
    seed: int = 1234
    """Seed of everything random."""
    overwrite: bool = False
    """Replace stages that were made with other settings."""
    dry_run: bool = False
    """Print the resolved plan and touch nothing."""
    limit_test_batches: int = 32
    """Global batches of each evaluation in the table."""
    model: FlowModelConfig = field(default_factory=FlowModelConfig)
    data: FlowDataConfig = field(default_factory=FlowDataConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    pretrain: RecipeConfig = field(default_factory=RecipeConfig)
    finetune: RecipeConfig = field(default_factory=RecipeConfig)
    prune: FlowPruneConfig = field(default_factory=FlowPruneConfig)
    distill: DistillRecipeConfig = field(default_factory=DistillRecipeConfig)

    def problems(self) -> list[str]:
        return at_least(1, limit_test_batches=self.limit_test_batches)


@dataclasses.dataclass(kw_only=True)
class ConvertConfig(Config):
    """What `minitron convert` does: a checkpoint from one format to another."""

    source: str = "???"
    """Checkpoint to read: a .nemo archive, or a NeMo-2 or Hugging Face directory."""
    output: str = "???"
    """Checkpoint to make."""
    to: str | None = None
    """Format of the result: nemo2, nemo1 or hf; none: *.nemo is an archive (NeMo-1 layout), else a NeMo-2 directory."""
    verify: str = "auto"
    """`none`, `tensors` (read back and compare) or `logits` (run both); auto: logits for what fits in memory."""
    tokenizer: str | None = None
    """Directory whose tokenizer files are put into the result; none: those of the source."""
    weights: str = "torch_dist"
    """Backend of the weights inside a .nemo: `torch_dist` or `zarr`."""
    dtype: str | None = None
    """`bf16`, `fp16` or `32`: convert the values; none: as in the source."""
    vocab_size: int | None = None
    """To Hugging Face: rows of the embeddings to keep; none: what the checkpoint says."""
    pad_vocab_to_multiple_of: int | None = None
    """To nemo1 or nemo2: pad the embeddings with rows of zeros; none: as in the source."""
    shard_size_gb: float = 5.0
    """To Hugging Face: size of a weight file, in GB."""
    seed: int = 1234
    """Seed of the tokens that verify=logits runs on."""
    overwrite: bool = False
    """Replace an output that was made from something else."""

    @property
    def target_format(self) -> str:
        """The format of the result."""
        return output_format(self.output, self.to)

    def problems(self) -> list[str]:
        found = missing_source(self.source, "the checkpoint to read, source=PATH")
        if self.output == "???":
            found.append("output is missing: name the checkpoint to make, output=PATH")
        else:
            found += unnamed(self.output) or format_problems(self.output, self.to)
        if "???" not in (self.source, self.output):
            found += _overlap(self.source, self.output)
        return found + self._choice_problems() + self._target_problems()

    def _choice_problems(self) -> list[str]:
        found = one_of("verify", self.verify, ("auto", "none", "tensors", "logits"))
        found += one_of("weights", self.weights, ("torch_dist", "zarr"))
        found += [] if self.dtype is None else one_of("dtype", self.dtype, ("bf16", "fp16", "32"))
        found += at_least(1, vocab_size=self.vocab_size, pad_vocab_to_multiple_of=self.pad_vocab_to_multiple_of)
        return found + ([] if self.shard_size_gb > 0 else [f"shard_size_gb = {self.shard_size_gb} must be above 0"])

    def _target_problems(self) -> list[str]:
        """Settings that the target format has no use for."""
        if self.output == "???" or format_problems(self.output, self.to):
            return []
        found, target = [], self.target_format
        if self.weights == "zarr" and target != "nemo1":
            found.append(f"weights = zarr is for .nemo archives; the result is {target}: output=NAME.nemo, or leave it")
        if self.vocab_size is not None and target != "hf":
            found.append(f"vocab_size is for Hugging Face; the result is {target}: to=hf, or leave it")
        if self.pad_vocab_to_multiple_of is not None and target == "hf":
            found.append("pad_vocab_to_multiple_of is for nemo1 and nemo2; the result is hf: leave it")
        return found


def missing_source(source: str, what: str) -> list[str]:
    """A problem unless the source is named."""
    return [f"source is missing: name {what}"] if source in ("???", "") else []


def unnamed(output: str) -> list[str]:
    """A problem where the output is a place without a name of its own, as `.` is."""
    if Path(output).name not in ("", ".."):
        return []
    return [f"output = {output!r} has no name of its own: name what to make, output={output or '.'}/NAME"]


def _overlap(source: str, output: str) -> list[str]:
    """A problem where writing the output would replace the source."""
    one, other = os.path.realpath(source), os.path.realpath(output)
    if one == other:
        return [f"output = {output} is the source itself: name another place"]
    if os.path.commonpath([one, other]) == other:
        return [f"output = {output} is a folder around the source {source}: name another place"]
    return []


@dataclasses.dataclass(kw_only=True)
class InspectConfig(Config):
    """What `minitron inspect` shows of a checkpoint."""

    source: str = "???"
    """Checkpoint to look at: a .nemo archive, or a NeMo-2 or Hugging Face directory."""
    json: bool = False
    """Print JSON."""
    values: bool = False
    """Read all weights and report NaN and Inf."""

    def problems(self) -> list[str]:
        return missing_source(self.source, "the checkpoint to look at, source=PATH")


_NAME = r"[A-Za-z0-9_](?:[\w-]|\.(?!\.))*"
#: ngc://org[/team]/model:version and hf://org/name[@revision]. No part can be taken for an option or for a way upwards.
NGC_SOURCE = re.compile(
    rf"ngc://(?P<org>{_NAME})/(?:(?P<team>{_NAME})/)?(?P<model>{_NAME})(?::(?P<version>[A-Za-z0-9](?:[\w+-]|\.(?!\.))*))?",
    re.ASCII,
)
HF_SOURCE = re.compile(rf"hf://(?P<repo>{_NAME}/(?P<model>{_NAME}))(?:@(?P<revision>{_NAME}(?:/{_NAME})*))?", re.ASCII)


@dataclasses.dataclass(kw_only=True)
class DownloadConfig(Config):
    """What `minitron download` fetches."""

    source: str = "???"
    """ngc://org/team/model:version, ngc://org/model:version or hf://org/name[@revision]."""
    output: str | None = None
    """Folder to make; none: in the current directory, `model_vVERSION` from NGC, `name` from the hub."""
    overwrite: bool = False
    """Download it again and replace the folder."""

    @property
    def folder(self) -> str:
        """The folder that is made."""
        if self.output is not None:
            return self.output
        ngc = NGC_SOURCE.fullmatch(self.source)
        return f"{ngc['model']}_v{ngc['version']}" if ngc else HF_SOURCE.fullmatch(self.source)["model"]

    def problems(self) -> list[str]:
        found = missing_source(self.source, "the model, ngc://org/team/model:version or hf://org/name")
        found += [] if self.output is None else unnamed(self.output)
        return found or self._source_problems()

    def _source_problems(self) -> list[str]:
        ngc = NGC_SOURCE.fullmatch(self.source)
        if ngc and ngc["version"] is None:
            name = self.source.removeprefix("ngc://")
            return [
                f"source = {self.source} names no version: {self.source}:VERSION; `ngc registry model list "
                f"'{name}:*'` lists them, and so does the model's page at https://catalog.ngc.nvidia.com"
            ]
        if ngc or HF_SOURCE.fullmatch(self.source):
            return []
        return [
            f"source = {self.source!r} is not of the form ngc://org/team/model:version, ngc://org/model:version or "
            "hf://org/name[@revision]"
        ]
