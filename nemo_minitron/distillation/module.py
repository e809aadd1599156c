"""NeMo's distillation model with the student's and the teacher's weights, which shows all its losses."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.distillation.attach import Distillation
from nemo_minitron.distillation.kept import KeptDistillation
from nemo_minitron.megatron.weights import build_model
from nemo_minitron.training.losses import Batch, Losses, TokenLossesMixin

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from nemo.collections.llm import GPTConfig, GPTModel
    from nemo.collections.llm.modelopt.distill.model import DistillationGPTModel
    from nemo.lightning import MegatronOptimizerModule
    from torch import Tensor


def distillation_module(
    student: Checkpoint,
    distillation: Distillation,
    *,
    student_config: "GPTConfig",
    teacher_config: "GPTConfig",
    optim: "MegatronOptimizerModule",
    tokenizer: Any,
) -> "DistillationGPTModel":
    """A DistillationGPTModel whose validation, too, runs the teacher; the teacher is attached when it is configured.

    Args:
        distillation: the teacher and the losses; nothing is attached to it yet.
        student_config, teacher_config: NeMo's.
    """
    from nemo.collections.llm.modelopt.distill.model import DistillationGPTModel

    class MinitronDistillationModel(TokenLossesMixin, DistillationGPTModel):
        distillation: Distillation  # no argument of __init__, each of which NeMo keeps for as long as a process lives

        def configure_model(self) -> None:
            if not hasattr(self, "module"):
                model = build_model(self.config, student.architecture, student)
                self.module = self.distillation.attach(model, teacher_config)

        def weights_at(self, means: Mapping[str, float]) -> dict[str, float]:
            return self.distillation.weights_at(means)

        def token_losses(self, batch: Batch, output: "Tensor") -> Losses:
            return self.distillation.losses(batch, output)

    teacher = str(distillation.checkpoint.path)
    module = MinitronDistillationModel(
        student_config, teacher_config=teacher_config, teacher_ckpt_path=teacher, optim=optim, tokenizer=tokenizer
    )
    module.distillation = distillation
    module.loss_names, module.loss_weights = distillation.names, distillation.weights
    return module


def kept_module(
    student: Checkpoint,
    distillation: KeptDistillation,
    *,
    student_config: "GPTConfig",
    optim: "MegatronOptimizerModule",
    tokenizer: Any,
) -> "GPTModel":
    """A GPTModel of NeMo's that learns from answers that are kept; they are attached when it is configured."""
    from nemo.collections.llm import GPTModel

    class MinitronStudentModel(TokenLossesMixin, GPTModel):
        distillation: KeptDistillation

        def configure_model(self, vp_stage: int | None = None) -> None:
            if not hasattr(self, "module"):
                model = build_model(self.config, student.architecture, student, self.tokenizer, vp_stage=vp_stage)
                self.module = self.distillation.attach(model)

        def token_losses(self, batch: Batch, output: "Tensor") -> Losses:
            return self.distillation.losses(batch, output)

    module = MinitronStudentModel(student_config, optim=optim, tokenizer=tokenizer)
    module.distillation = distillation
    module.loss_names, module.loss_weights = distillation.names, distillation.weights
    return module


def teacher_in_validation() -> "pl.Callback":
    """A callback that lets validation's pipeline stages hand on the teacher's activations beside the student's.

    NeMo sizes the messages between stages for both models in training only.
    """
    import lightning.pytorch as pl
    from nemo.collections.llm.modelopt.distill.utils import get_tensor_shapes_adjust_fn_for_distillation
    from nemo.lightning.megatron_parallel import MegatronStep

    class BothModelsStep(MegatronStep):
        @property
        def adjust_tensor_shapes_fn(self) -> Callable[..., Any] | None:
            adjust: Callable[..., Any] | None = get_tensor_shapes_adjust_fn_for_distillation(
                self.model, self.seq_length, self.micro_batch_size, self.decoder_seq_length, forward_only=False
            )
            return adjust

    class TeacherInValidation(pl.Callback):
        def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
            if not step.forward_only:
                return step
            return BothModelsStep(**{field.name: getattr(step, field.name) for field in dataclasses.fields(step)})

    return TeacherInValidation()
