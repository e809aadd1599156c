"""Settings of `minitron flow`."""

import dataclasses
from dataclasses import field
from typing import Any

from nemo_minitron.config.base import Config, at_least, one_of, text_key_problems
from nemo_minitron.config.instructions import InstructConfig, PeftConfig
from nemo_minitron.config.training import KDConfig


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
    """Fields of nemo_minitron.architecture.Architecture, or `known`, a known model, and what differs from it; a
    checkpoint's own sizes win."""
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
    """`embedded`, `prose`, `wikitext103`, or a path, as in `minitron data`."""
    text_key: str = "text"
    """With a path: field or column that holds the text, as in `minitron data`."""
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
        found = at_least(1, words=self.words, pretrain_words=self.pretrain_words, workers=self.workers)
        return found + text_key_problems(self.text_key)


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
    memory_gb: float | None = None
    """What a rank can hold, in GB of 10^9 bytes; only `minitron plan` asks. A card sold with 80 GB has about 85 of
    them: the rest is room for what is not in the plan, contexts, communication and fragments."""

    def problems(self) -> list[str]:
        found = at_least(
            1,
            devices=self.devices,
            num_nodes=self.num_nodes,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            prune_pipeline_model_parallel_size=self.prune_pipeline_model_parallel_size,
            micro_batch_size=self.micro_batch_size,
        )
        if self.memory_gb is not None and self.memory_gb <= 0:
            found.append(f"memory_gb = {self.memory_gb} must be above 0")
        return found


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
class InstructRecipeConfig(RecipeConfig):
    """Instruction tuning of each distilled student, where there is data for it."""

    data: str | None = None
    """File or folder of instructions and answers, as in finetune's model.data.instructions; none: no such step."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    rows: InstructConfig = field(default_factory=InstructConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)


@dataclasses.dataclass(kw_only=True)
class FlowPruneConfig(Config):
    """The students of a flow (conf/prune/)."""

    method: str | None = None
    """`minitron` or `compensated`, for every student that names none; none: compensated."""
    depth_by: str = "block_influence"
    """`block_loss` or `block_influence`, for every student that names none."""
    num_samples: int = 1024
    """Calibration samples."""
    num_block_samples: int = 256
    """Samples on which blocks of layers are left out."""
    batch_size: int = 1
    """Samples a forward pass while scoring."""
    hidden_size_divisor: int = 256
    """Grid of hidden_size."""
    ffn_hidden_size_divisor: int = 512
    """Grid of ffn_hidden_size."""
    num_layers_divisor: int = 2
    """Grid of num_layers."""
    students: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> targets (drop_layers, num_layers, hidden_size, ffn_hidden_size, num_attention_heads), and how to cut
    (method, depth_by, merge_heads, untie)."""

    def problems(self) -> list[str]:
        found = at_least(1, num_samples=self.num_samples, batch_size=self.batch_size)
        targets = ("drop_layers", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        known = (*targets, "method", "depth_by", "merge_heads", "untie")
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
    facts: int = 400
    """Questions about the embedded corpus' facts that every model is asked at the end; 0: none."""
    model: FlowModelConfig = field(default_factory=FlowModelConfig)
    data: FlowDataConfig = field(default_factory=FlowDataConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    pretrain: RecipeConfig = field(default_factory=RecipeConfig)
    finetune: RecipeConfig = field(default_factory=RecipeConfig)
    prune: FlowPruneConfig = field(default_factory=FlowPruneConfig)
    distill: DistillRecipeConfig = field(default_factory=DistillRecipeConfig)
    instruct: InstructRecipeConfig = field(default_factory=InstructRecipeConfig)

    def problems(self) -> list[str]:
        return at_least(1, limit_test_batches=self.limit_test_batches) + at_least(0, facts=self.facts)
