"""Hardware: ranks and their layout, and what stages, plans and launchers take of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from nemo_minitron.config.schemas.base import Config, above_zero, at_least, one_of

#: What a training (finetune, distill) takes of the hardware: setting of the stage -> setting of the hardware.
TRAINING: Mapping[str, str] = {
    "trainer.devices": "devices",
    "trainer.num_nodes": "num_nodes",
    "trainer.accelerator": "accelerator",
    "trainer.precision": "precision",
    "model.tensor_model_parallel_size": "tensor_model_parallel_size",
    "model.pipeline_model_parallel_size": "pipeline_model_parallel_size",
    "model.sequence_parallel": "sequence_parallel",
    "model.micro_batch_size": "micro_batch_size",
    "model.data.num_workers": "num_workers",
}
#: What prune takes: scoring spreads the layers over ranks of a node, nothing else (ModelOpt takes no tensor parallel).
SCORING: Mapping[str, str] = {
    "trainer.devices": "prune_pipeline_model_parallel_size",
    "trainer.accelerator": "accelerator",
    "trainer.precision": "precision",
    "model.pipeline_model_parallel_size": "prune_pipeline_model_parallel_size",
}


def is_bf16(precision: str, cuda: bool) -> bool:
    """Whether parameters and activations are bf16: `auto` is bf16 on a GPU, 32 on a CPU."""
    return precision.startswith("bf16") or (precision == "auto" and cuda)


def kind_problems(accelerator: str, precision: str) -> list[str]:
    """A problem for each of the two that is none of those there are."""
    problems = one_of("accelerator", accelerator, ("auto", "gpu", "cpu"))
    return problems + one_of("precision", str(precision), ("auto", "bf16", "bf16-mixed", "32"))


class Ranks(NamedTuple):
    """The processes that a command runs as.

    Attributes:
        nodes: how many.
        per_node: ranks on each; None: not known before the machine is.
        accelerator: `auto`, `gpu` or `cpu`.
    """

    nodes: int
    per_node: int | None
    accelerator: str


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

    def launch(self) -> Ranks:
        """The processes that this asks for."""
        return Ranks(self.num_nodes, self.devices, self.accelerator)

    def problems(self) -> list[str]:
        problems = at_least(
            1,
            devices=self.devices,
            num_nodes=self.num_nodes,
            max_steps=self.max_steps,
            val_check_interval=self.val_check_interval,
            limit_val_batches=self.limit_val_batches,
            log_every_n_steps=self.log_every_n_steps,
        )
        return problems + kind_problems(self.accelerator, self.precision)


@dataclasses.dataclass(kw_only=True)
class HardwareConfig(Config):
    """Ranks and their layout (conf/hardware/)."""

    name: str = "cpu"
    """What the report calls it."""
    accelerator: str = "auto"
    """`auto`, `gpu` or `cpu`."""
    devices: int | None = 1
    """Ranks a node; null: every GPU of this machine, or one process on its CPU."""
    num_nodes: int = 1
    """Nodes."""
    precision: str = "auto"
    """`bf16`, `bf16-mixed` or `32`; auto: bf16 on a GPU, 32 on a CPU."""
    tensor_model_parallel_size: int | None = 1
    """Ranks that share each matrix while training; null: as few as hold it."""
    pipeline_model_parallel_size: int | None = 1
    """Ranks that share the layers while training; null: as few as hold them."""
    prune_pipeline_model_parallel_size: int | None = 1
    """Ranks that share the layers while scoring (ModelOpt takes no tensor parallel); null: as few as hold them."""
    sequence_parallel: bool = False
    """Split norms' activations over tensor-parallel ranks."""
    micro_batch_size: int | None = 8
    """Samples a rank works on at once; null: as many as fit."""
    num_workers: int = 0
    """Processes of the data loader."""
    memory_gb: float | None = None
    """What a rank can hold, in GB of 10^9 bytes, for `minitron plan` and for what a flow chooses; none: 75% of what is
    free here. A card sold with 80 GB has about 85 of them: the rest is room for what is not in the plan, contexts,
    communication and fragments."""
    tflops: float | None = None
    """TFLOP/s that a rank achieves, for what a flow chooses and for its estimates of time; none: assumed."""

    def trainer(self, stage: Mapping[str, str] = TRAINING) -> dict[str, Any]:
        """Keywords of TrainerConfig for a stage, TRAINING or SCORING."""
        return self._part("trainer", stage)

    def model(self, stage: Mapping[str, str] = TRAINING) -> dict[str, Any]:
        """Keywords of the stage's model configuration: parallel sizes, and in training the micro batch."""
        return self._part("model", stage)

    def loader(self) -> dict[str, Any]:
        """Keywords of ModelDataConfig."""
        return self._part("model.data", TRAINING)

    def _part(self, group: str, stage: Mapping[str, str]) -> dict[str, Any]:
        """Name -> value of what lies right in a group of the stage's settings."""
        places = {setting.rpartition("."): name for setting, name in stage.items()}
        return {field: getattr(self, name) for (place, _, field), name in places.items() if place == group}

    def layout(self, cuda: bool) -> dict[str, Any]:
        """Keywords of nemo_minitron.megatron.layout.Layout, but for the batch; what is open counts as 1.

        Args:
            cuda: whether the ranks have GPUs.
        """
        tensor = self.tensor_model_parallel_size or 1
        return {
            "cuda": cuda,
            "bf16": is_bf16(self.precision, cuda),
            "devices": self.devices or 1,
            "num_nodes": self.num_nodes,
            "tensor_parallel": tensor,
            "pipeline_parallel": self.pipeline_model_parallel_size or 1,
            "sequence_parallel": self.sequence_parallel and tensor > 1,
        }

    def launch(self) -> Ranks:
        """The processes that a flow runs its stages as."""
        return Ranks(self.num_nodes, self.devices, self.accelerator)

    @property
    def scoring_ranks(self) -> int:
        """Ranks that share the layers while scoring; what is open counts as 1."""
        return self.prune_pipeline_model_parallel_size or 1

    @property
    def device(self) -> str:
        """The device as evaluate takes it."""
        return {"auto": "auto", "gpu": "cuda", "cpu": "cpu"}[self.accelerator]

    @property
    def rank_bytes(self) -> float | None:
        """What a rank can hold, where it is given."""
        return None if self.memory_gb is None else self.memory_gb * 1e9

    def problems(self) -> list[str]:
        problems = at_least(
            1,
            devices=self.devices,
            num_nodes=self.num_nodes,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            prune_pipeline_model_parallel_size=self.prune_pipeline_model_parallel_size,
            micro_batch_size=self.micro_batch_size,
        )
        problems += kind_problems(self.accelerator, self.precision)
        return problems + above_zero(memory_gb=self.memory_gb, tflops=self.tflops)
