"""The loss to reach on each source of a blend: a teacher's own, measured once before training.

Import it late: it imports Lightning.
"""

import contextlib
import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from nemo_minitron.artifacts import write_json
from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.data.blend import Blend, Mixture
from nemo_minitron.data.sample_module import filled, one_hot
from nemo_minitron.jobs.progress import Progress
from nemo_minitron.launch.ranks import rank
from nemo_minitron.megatron.forward import load_model, run_forward
from nemo_minitron.megatron.layout import Layout
from nemo_minitron.training.inputs import CHECKPOINTS
from nemo_minitron.training.losses import from_last_stage, sums_by_source

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

FILE = "reference.json"


class TeacherReference(pl.Callback):
    """Measures the reference of a mixture, unless it is kept under `partial` from before a run was resumed.

    It does so once Megatron's groups are there, and before there is a model beside the teacher.

    Args:
        validation: the samples that `mixture` validates on.
        batch: samples a forward pass.
    """

    def __init__(
        self, teacher: Checkpoint, layout: Layout, validation: Blend, mixture: Mixture, *, batch: int, partial: Path
    ):
        self.teacher, self.layout, self.batch = teacher, layout, batch
        self.validation, self.mixture, self.file = validation, mixture, partial / CHECKPOINTS / FILE

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.mixture.reference = json.loads(self.file.read_text())
            return
        self.mixture.reference = self.measured()
        if rank() == 0:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, self.mixture.reference)

    def measured(self) -> list[float]:
        """The teacher's mean loss in nats a token on each source [k]."""
        with torch.random.fork_rng():
            model = load_model(self.teacher.architecture, self.layout, self.teacher)
        reference = source_losses(model, self.validation, self.mixture, self.batch)
        del model
        gc.collect()
        return reference


def source_losses(model: "GPTModel", validation: Blend, mixture: Mixture, batch: int) -> list[float]:
    """Mean losses of a model on the samples that `mixture` validates on, by source [k]; on every rank."""
    ranks = parallel_state.get_data_parallel_world_size()
    numbers = mixture.validation.numbers[parallel_state.get_data_parallel_rank() :: ranks]
    items = [filled(validation[number], validation.length, 0) for number in numbers]
    device = next(model.parameters()).device
    sums = torch.zeros(len(mixture.names), 2, dtype=torch.float64, device=device)
    if items:
        sequences = torch.stack([torch.cat([item["tokens"], item["labels"][-1:]]) for item in items])  # [n, s + 1]
        masks = torch.stack([item["loss_mask"] for item in items])
        sources = torch.stack([one_hot(validation, number) for number in numbers])
        parts = list(zip(masks.split(batch), sources.split(batch)))

        def take(losses: torch.Tensor, index: int) -> None:
            mask, source = (part.to(device) for part in parts[index])
            mask = get_batch_on_this_cp_rank({"loss_mask": mask})["loss_mask"]
            sums.add_(sums_by_source([losses], mask, source))

        with Progress("teacher on each source", len(items), unit="sample") as progress:
            run_forward(model, sequences, batch, take, progress)
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    sums = from_last_stage(sums, 2)
    return (sums[:, 0] / sums[:, 1]).tolist()
