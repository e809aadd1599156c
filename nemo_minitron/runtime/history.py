"""What a training run shows and keeps while it runs. Import it late: it imports Lightning."""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from nemo_minitron.config import StageConfig
from nemo_minitron.errors import NonFiniteLossError
from nemo_minitron.runtime.inputs import CHECKPOINTS, TENSORBOARD
from nemo_minitron.runtime.launch import rank
from nemo_minitron.runtime.losses import from_last_stage


class History(pl.Callback):
    """Shows progress, keeps the history, logs to TensorBoard and saves checkpoints to resume from.

    Attributes:
        train: a line for each step: step, each loss in nats a token, lr.
        validation: a line for each validation: step, each loss.
    """

    def __init__(self, config: StageConfig, partial: Path):
        self.config, self.partial = config, partial
        self.train: list[dict[str, float]] = []
        self.validation: list[dict[str, float]] = []
        self.sums: Any = None
        self.started = time.perf_counter()
        self.writer: Any = None
        self.bar: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"history": json.dumps({"train": self.train, "validation": self.validation})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = json.loads(state["history"])
        self.train, self.validation = saved["train"], saved["validation"]

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if rank() != 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.partial / TENSORBOARD), purge_step=trainer.global_step or None)
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc=self.config.exp_manager.name,
            unit="step",
            file=sys.__stderr__,
            disable=None if sys.__stderr__.isatty() else True,
        )

    def on_train_batch_start(self, *args: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        means, tokens = self.means(module)
        step = int(trainer.global_step)
        for name, value in means.items():
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"{name} is {value} at step {step} (batch {step - 1}); the last checkpoint before it is "
                    f"under {self.partial / CHECKPOINTS}. Lower model.optim.lr, or look at that batch"
                )
        rate = tokens / max(time.perf_counter() - self.started, 1e-9)
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        self.train.append({"step": step, **means, "lr": lr})
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
        if self.writer is not None and (step % self.config.trainer.log_every_n_steps == 0 or step == 1):
            self.scalars("train", {**means, "lr": lr, "tokens_per_second": rate}, step)

    def on_validation_epoch_start(self, *args: Any) -> None:
        self.sums = None

    def on_validation_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        sums = from_last_stage(module.sums, len(module.loss_names) + 1).double()
        self.sums = sums if self.sums is None else self.sums + sums

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if self.sums is None:
            return
        means = dict(zip(module.loss_names, (self.sums[:-1] / self.sums[-1]).tolist()))
        step = int(trainer.global_step)
        if any(entry["step"] == step for entry in self.validation):
            return  # a resumed run validates once more where it goes on
        self.validation.append({"step": step, **means})
        if self.writer is not None:
            self.scalars("validation", means, step)
        if trainer.state.fn == "fit" and step < trainer.max_steps:
            self.save(trainer, step)

    def means(self, module: Any) -> tuple[dict[str, float], float]:
        sums = from_last_stage(module.sums, len(module.loss_names) + 1).tolist()
        tokens = max(sums[-1], 1.0)
        return {name: value / tokens for name, value in zip(module.loss_names, sums)}, tokens

    def scalars(self, split: str, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{split}/{name}", value, step)

    def save(self, trainer: Any, step: int) -> None:
        folder = self.partial / CHECKPOINTS
        unfinished = folder / "unfinished"
        if rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        trainer.strategy.barrier()
        trainer.save_checkpoint(str(unfinished))
        trainer.strategy.barrier()
        if rank() == 0:
            older = [path for path in folder.glob("step-*") if path != folder / f"step-{step}"]
            shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
            os.replace(unfinished, folder / f"step-{step}")
            for path in older:
                shutil.rmtree(path)
        trainer.strategy.barrier()

    def close(self) -> None:
        for resource in (self.writer, self.bar):
            if resource is not None:
                with contextlib.suppress(Exception):
                    resource.close()
