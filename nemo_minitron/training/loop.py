"""One training run: fit with progress, TensorBoard, checkpoints to resume from; used by finetune and distill."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.config import OptimConfig, StageConfig
from nemo_minitron.megatron.layout import Layout
from nemo_minitron.megatron.session import build_trainer
from nemo_minitron.training.inputs import CHECKPOINTS, Inputs

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from nemo.collections.llm import GPTModel
    from nemo.lightning import MegatronOptimizerModule

    from nemo_minitron.data.blend import Mixture
    from nemo_minitron.training.history import History

#: Fields of a model's config where NeMo and Megatron put methods of the model and the optimizer.
ENGINES_FUNCTIONS = (
    "finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training run was.

    Attributes:
        train: a line for each step: step, each loss in nats a token, lr.
        validation: a line for each validation: step, each loss.
        weights: of each loss in the sum that was trained on.
        result_step: the step whose weights the module has now.
        seconds: of all of it.
        tokens_per_second: of the steps alone.
        mixture: how a blend was read.
    """

    train: list[dict[str, float]]
    validation: list[dict[str, float]]
    weights: dict[str, float]
    result_step: int
    seconds: float
    tokens_per_second: float
    mixture: "Mixture | None" = None

    def result(self, config: StageConfig, architecture: Architecture, inputs: Inputs) -> dict[str, Any]:
        """What the stage's manifest says of it: metrics, timings and details, as Job.finish takes them."""
        notes = {} if inputs.samples is None else {"notes": inputs.samples.notes}
        return {
            "metrics": {
                "steps": config.trainer.max_steps,
                "result_step": self.result_step,
                "parameters": architecture.parameters(),
                "weights": self.weights,
                "validation": self.validation,
                "train": self.train,
                **inputs.row_counts(),
            }
            | ({} if self.mixture is None else {"blend": self.mixture.told(config.trainer.max_steps)}),
            "timings": {"training_seconds": self.seconds, "tokens_per_second": self.tokens_per_second},
            "details": {"architecture": architecture.to_dict(), **notes},
        }


def optimizer(config: OptimConfig, max_steps: int, clip: float, layout: Layout) -> "MegatronOptimizerModule":
    """Megatron's Adam with linear warm-up and cosine decay; biases and norms do not decay."""
    import torch
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.lightning.pytorch.optim import CosineAnnealingScheduler

    return nl.MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            clip_grad=clip,
            bf16=layout.bf16,
            params_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
            use_distributed_optimizer=layout.cuda,
        ),
        lr_scheduler=CosineAnnealingScheduler(
            max_steps=max_steps,
            warmup_steps=min(config.sched.warmup_steps, max_steps - 1),
            constant_steps=config.sched.constant_steps,
            min_lr=config.sched.min_lr,
        ),
    )


def train_and_validate(
    module: "GPTModel",
    data: "pl.LightningDataModule",
    config: StageConfig,
    layout: Layout,
    partial: Path,
    callbacks: "Sequence[pl.Callback]" = (),
) -> Trained:
    """Trains `module` (a GPTModel with TokenLossesMixin) to trainer.max_steps.

    Resumes from the newest whole checkpoint under `partial`, and keeps that and the best one there while it runs. Ends
    with the weights of the best validation (config.metric).

    Raises:
        NonFiniteLossError: a loss is not a number.
        PreemptedError: SIGTERM came; what was trained is saved.

    Args:
        callbacks: further callbacks of the trainer.
    """
    started = time.perf_counter()
    history = history_callback(config, partial)
    mixture: Mixture | None = getattr(data, "mixture", None)
    if mixture is not None:
        history.mixture, module.sources = mixture, mixture.names
    trainer = build_trainer(
        layout,
        callbacks=[history, *callbacks],
        max_steps=config.trainer.max_steps,
        val_check_interval=min(config.trainer.val_check_interval, config.trainer.max_steps),
        limit_val_batches=config.trainer.limit_val_batches,
        num_sanity_val_steps=config.trainer.num_sanity_val_steps,
    )
    try:
        trainer.fit(module, data, ckpt_path=newest_checkpoint(partial / CHECKPOINTS))
        used = take_best(module, history, config.trainer.max_steps, partial / CHECKPOINTS)
    finally:
        history.close()
        let_go(module)
    return Trained(
        train=history.train,
        validation=history.validation,
        weights=dict(module.loss_weights),
        result_step=used,
        seconds=time.perf_counter() - started,
        tokens_per_second=history.tokens / history.seconds if history.seconds else 0.0,
        mixture=mixture,
    )


def let_go(module: "GPTModel") -> None:
    """Takes the trained model's and optimizer's functions off the configs, so that their memory can be freed.

    fiddle, in which NeMo registers each class of modules, keeps those classes for ever, and with them the configs that
    their methods refer to.
    """
    for config in (module.config, getattr(module, "teacher_config", None)):
        for name in ENGINES_FUNCTIONS:
            if getattr(config, name, None) is not None:
                setattr(config, name, None)


def take_best(module: "GPTModel", history: "History", last: int, checkpoints: Path) -> int:
    """Puts the weights of the best validated step into `module`; returns the step that they are of.

    The last step's stay where the configuration says so, where they are the best, or where the run did not end with a
    validation that they could be compared by.
    """
    best = history.best_step()
    validated = bool(history.validation) and history.validation[-1]["step"] == last
    if best is None or best == last or not validated:
        return last
    from nemo_minitron.megatron.weights import bare, reload

    reload(bare(module), checkpoints / f"step-{best}")
    return best


def history_callback(config: StageConfig, partial: Path) -> "History":
    """The callback that shows progress, keeps the history, logs to TensorBoard and saves checkpoints to resume from."""
    from nemo_minitron.training.history import History

    return History(config, partial)


def newest_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint to resume from; ones being written have another name."""
    steps = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    return str(steps[-1]) if steps else None
