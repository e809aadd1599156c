"""What a training run shows and keeps while it runs. Import it late: it imports Lightning."""

import contextlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from nemo_minitron.config import StageConfig
from nemo_minitron.errors import NonFiniteLossError, PreemptedError
from nemo_minitron.jobs.progress import Progress
from nemo_minitron.launch.preemption import StopRequest
from nemo_minitron.launch.ranks import rank
from nemo_minitron.training.inputs import CHECKPOINTS, TENSORBOARD
from nemo_minitron.training.losses import LM_LOSS, TokenLossesMixin

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from nemo_minitron.data.blend import Mixture

#: Lightning's number of batches between validations for none of them.
NEVER = float("inf")
#: TensorBoard's file is this far behind at most.
FLUSH_SECONDS = 5
#: How the shares of a blend's sources are called beside losses: `share/wiki`.
SHARE = "share"


class History(pl.Callback):
    """Shows progress, keeps the history, logs to TensorBoard and saves checkpoints to resume from.

    Attributes:
        train: a line for each step: step, each loss in nats a token, lr.
        validation: a line for each validation: step, each loss; of a blend also each loss by source, `lm_loss/wiki`,
            and where shares are dynamic those that follow from it, `share/wiki`.
        mixture: how a blend is read.
    """

    mixture: "Mixture | None" = None

    def __init__(self, config: StageConfig, partial: Path):
        self.config, self.partial = config, partial
        self.train: list[dict[str, float]] = []
        self.validation: list[dict[str, float]] = []
        self.sums: Tensor | None = None
        self.started = self.validation_started = time.perf_counter()
        self.writer: SummaryWriter | None = None
        self.progress: Progress | None = None
        self.stop, self.stopping = StopRequest(), False
        self.tokens, self.seconds = 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"history": json.dumps({"train": self.train, "validation": self.validation})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = json.loads(state["history"])
        self.train, self.validation = saved["train"], saved["validation"]
        if self.mixture is not None and self.mixture.dynamic:
            for entry in self.validation:
                shares = [entry[f"{SHARE}/{name}"] for name in self.mixture.names]
                self.mixture.keep(int(entry["step"]), shares)

    def on_train_start(self, trainer: pl.Trainer, module: TokenLossesMixin) -> None:
        self.stop.listen()
        trainer.val_check_batch = NEVER
        if rank() != 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(
            str(self.partial / TENSORBOARD), purge_step=trainer.global_step or None, flush_secs=FLUSH_SECONDS
        )
        self.progress = Progress(
            Path(self.config.output).name,
            trainer.max_steps,
            done=trainer.global_step,
            every=self.config.trainer.log_every_n_steps,
        )

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        # Lightning counts batches from where a run was resumed; validations belong to steps.
        trainer.val_check_batch = 1 if self.validates(trainer.global_step + 1) else NEVER
        self.started = time.perf_counter()

    def validates(self, step: int) -> bool:
        """Whether a validation follows this step."""
        settings = self.config.trainer
        return step % min(settings.val_check_interval, settings.max_steps) == 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: TokenLossesMixin, *args: Any) -> None:
        sums = module.gathered_sums()
        means, tokens = step_means(module, sums.tolist())
        step = int(trainer.global_step)
        self.check_finite(means, step, f"step {step} (batch {step - 1})")
        seconds = max(time.perf_counter() - self.started, 1e-9)
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        by_source = source_means(module, sums.tolist())
        self.train.append({"step": step, **means, **by_source, "lr": lr})
        if self.progress is not None:
            self.progress.advance(1, step=step, tokens=tokens, seconds=seconds, **shown(means), lr=f"{lr:.1e}")
        if self.writer is not None and (step % self.config.trainer.log_every_n_steps == 0 or step == 1):
            self.scalars("train", {**means, **by_source, "lr": lr, "tokens_per_second": tokens / seconds}, step)
            self.scalars("weight", module.weights_at(means), step)
        self.stopping = self.stop.asked() and step < trainer.max_steps
        if self.stopping and not self.validates(step):
            self.save(trainer, step)
            self.give_way(trainer, step)

    def give_way(self, trainer: pl.Trainer, step: int) -> None:
        """Ends a run that was asked to stop, once it is saved."""
        raise PreemptedError(
            f"stopped by SIGTERM after step {step} of {trainer.max_steps}; the same command goes on from there "
            f"(saved under {self.partial / CHECKPOINTS})"
        )

    def check_finite(self, means: dict[str, float], step: int, where: str) -> None:
        for name, value in means.items():
            if not math.isfinite(value):
                from nemo_minitron.training.loop import newest_checkpoint

                kept = newest_checkpoint(self.partial / CHECKPOINTS)
                raise NonFiniteLossError(
                    f"{name} is {value} at {where}; the last good checkpoint is {kept or 'the start'}. "
                    "Lower model.optim.lr, or look at that batch"
                )

    def on_validation_epoch_start(self, *args: Any) -> None:
        self.sums = None
        self.validation_started = time.perf_counter()

    def on_validation_batch_end(self, trainer: pl.Trainer, module: TokenLossesMixin, *args: Any) -> None:
        sums = module.gathered_sums().double()
        self.sums = sums if self.sums is None else self.sums + sums

    def on_validation_end(self, trainer: pl.Trainer, module: TokenLossesMixin) -> None:
        if self.sums is None:
            return
        means = self.validation_means(module, self.sums)
        step = int(trainer.global_step)
        if not self.validates(step) or any(entry["step"] == step for entry in self.validation):
            return  # a resumed run validates once more where it goes on
        self.check_finite(means, step, f"the validation after step {step}")
        shares = self.follow(step, means)
        self.validation.append({"step": step, **means, **shares})
        if self.progress is not None:
            self.progress.note(f"validation after step {step}", **shown(means), **shown(shares))
        if self.writer is not None:
            seconds = max(time.perf_counter() - self.validation_started, 1e-9)
            tokens = float(self.sums[len(module.loss_names)])
            self.scalars("validation", {**means, **shares, "tokens_per_second": tokens / seconds}, step)
        if trainer.state.fn == "fit" and step < trainer.max_steps:
            self.save(trainer, step)
            if self.stopping:
                self.give_way(trainer, step)

    def validation_means(self, module: TokenLossesMixin, sums: "Tensor") -> dict[str, float]:
        """Each loss a token; of a blend together, as the given shares weigh its sources, and by source."""
        import torch

        count = len(module.loss_names) + 1
        if self.mixture is not None:
            weights = torch.tensor(self.mixture.weights(), dtype=sums.dtype, device=sums.device)
            sums = torch.cat([weights @ sums[count:].view(-1, count), sums[count:]])
        means = dict(zip(module.loss_names, (sums[: count - 1] / sums[count - 1]).tolist()))
        return means | source_means(module, sums.tolist())

    def follow(self, step: int, means: dict[str, float]) -> dict[str, float]:
        """Lets dynamic shares follow the losses of the validation after `step`; the same on every rank."""
        import torch

        if self.mixture is None or not self.mixture.dynamic:
            return {}
        losses = [means[f"{LM_LOSS}/{name}"] for name in self.mixture.names]
        shares = torch.tensor(self.mixture.follow(step, losses), dtype=torch.float64)
        if torch.cuda.is_initialized():
            shares = shares.cuda()
        torch.distributed.broadcast(shares, src=0)
        self.mixture.keep(step, shares.tolist())
        return {f"{SHARE}/{name}": share for name, share in zip(self.mixture.names, shares.tolist())}

    def scalars(self, split: str, values: dict[str, float], step: int) -> None:
        assert self.writer is not None
        for name, value in values.items():
            self.writer.add_scalar(f"{split}/{name}", value, step)

    def save(self, trainer: pl.Trainer, step: int) -> None:
        """Saves a checkpoint to resume from, beside and renamed; the newest and the best are kept."""
        folder = self.partial / CHECKPOINTS
        unfinished = folder / "unfinished"
        if rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        trainer.strategy.barrier()
        trainer.save_checkpoint(str(unfinished))
        trainer.strategy.barrier()
        if rank() == 0:
            keep = {folder / f"step-{step}", folder / f"step-{self.best_step()}"}
            shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
            os.replace(unfinished, folder / f"step-{step}")
            for path in set(folder.glob("step-*")) - keep:
                shutil.rmtree(path)
        trainer.strategy.barrier()

    def best_step(self) -> int | None:
        """The validated step with the least of the metric that the configuration names; None where none counts."""
        metric = self.config.metric
        known = [entry for entry in self.validation if metric in entry]
        return int(min(known, key=lambda entry: entry[metric])["step"]) if known else None

    def close(self) -> None:
        self.stop.close()
        for resource in (self.writer, self.progress):
            if resource is not None:
                with contextlib.suppress(Exception):
                    resource.close()


def step_means(module: TokenLossesMixin, sums: list[float]) -> tuple[dict[str, float], float]:
    """Each loss a token of a global batch, and its tokens."""
    tokens = max(sums[len(module.loss_names)], 1.0)
    return {name: value / tokens for name, value in zip(module.loss_names, sums)}, tokens


def source_means(module: TokenLossesMixin, sums: list[float]) -> dict[str, float]:
    """Each loss a token by source, `lm_loss/wiki`, of the sources that have tokens in the batch."""
    count = len(module.loss_names) + 1
    means: dict[str, float] = {}
    for number, source in enumerate(module.sources, 1):
        *own, tokens = sums[number * count : (number + 1) * count]
        if tokens:
            means |= {f"{name}/{source}": value / tokens for name, value in zip(module.loss_names, own)}
    return means


def shown(losses: dict[str, float]) -> dict[str, str]:
    """Losses as a line of a log shows them."""
    return {name: f"{value:.4f}" for name, value in losses.items()}
