"""NeMo's distillation model with the student's and the teacher's weights, and all its losses in sight.

Legend: s sequence, b micro batch, v vocabulary rows of this rank.
"""

from collections.abc import Sequence
from typing import Any

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config import KDConfig
from nemo_minitron.distillation.hidden import hidden_criteria, hidden_losses, loss_name, scaled_weights, with_hidden
from nemo_minitron.distillation.output_layer import KD_LOSS, fuse, fused_losses, is_fused, logits_loss, logits_losses
from nemo_minitron.megatron.session import spread_layers
from nemo_minitron.megatron.weights import load_weights
from nemo_minitron.training.losses import LossesInSight
from nemo_minitron.training.model import LM_LOSS


def distillation_module(
    student: tuple[Any, Checkpoint],
    teacher: tuple[Any, Checkpoint],
    kd: KDConfig,
    *,
    pairs: Sequence[tuple[int, int]] = (),
    optim: Any,
    tokenizer: Any,
) -> Any:
    """A DistillationGPTModel (ModelOpt's kd_loss mode) whose validation, too, runs the teacher and shows both losses.

    Args:
        student, teacher: NeMo's config and the checkpoint of each.
        kd: the losses, their form and weights.
        pairs: layers of student and teacher whose hidden states are compared.
    """
    from nemo.collections.llm.modelopt.distill.model import DistillationGPTModel

    hidden_names = [loss_name(kd.hidden, pair) for pair in pairs]

    class MinitronDistillationModel(LossesInSight, DistillationGPTModel):
        loss_names = (KD_LOSS, LM_LOSS, *hidden_names)
        loss_weights = {KD_LOSS: kd.kd_weight, LM_LOSS: kd.lm_weight} | {
            name: kd.hidden.weight / len(pairs) for name in hidden_names
        }

        def configure_model(self) -> None:
            if not hasattr(self, "module"):
                _same_layout(teacher[0], self.config)
                self.module = _convert(self.config, student, teacher, kd, pairs)

        def weights_at(self, means: dict[str, float]) -> dict[str, float]:
            return scaled_weights(self.loss_weights, means, hidden_names, kd.hidden)

        def token_losses(self, batch: dict[str, Any], output: Any) -> dict[str, Any]:
            model = self.core_module
            hidden = hidden_losses(model, hidden_names)
            if is_fused(model):
                found = fused_losses(model, batch, kd)
            else:
                found = {KD_LOSS: logits_losses(model), LM_LOSS: output}
            if not hidden:
                return found
            return with_hidden(found, hidden, self.loss_weights, batch["loss_mask"].float(), kd.hidden)

    return MinitronDistillationModel(
        student[0], teacher_config=teacher[0], teacher_ckpt_path=str(teacher[1].path), optim=optim, tokenizer=tokenizer
    )


def _same_layout(teacher: Any, student: Any) -> None:
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "sequence_parallel",
        "pipeline_dtype",
    ):
        setattr(teacher, name, getattr(student, name))


def _convert(config: Any, student: tuple, teacher: tuple, kd: KDConfig, pairs: Sequence[tuple[int, int]]) -> Any:
    """ModelOpt's DistillationModel around the loaded student, with the loaded, frozen teacher inside."""
    import modelopt.torch.distill as mtd
    from nemo.collections.llm.modelopt.distill.utils import DistillationConfig, adjust_distillation_model_for_mcore

    spread_layers(config)
    model = config.configure_model(None)
    load_weights(model, student[1].architecture, student[1])
    fused = kd.form == "fused" or (kd.form == "auto" and kd.top_k is None and not config.sequence_parallel)
    criterion = {("output_layer", "output_layer"): logits_loss(kd)}
    criterion |= hidden_criteria(kd.hidden, pairs, config.hidden_size, teacher[0].hidden_size)
    settings = DistillationConfig(criterion=criterion if model.post_process else {}, skip_lm_loss=False)
    # ModelOpt wants a balancer where there are several losses; here they are weighed over a whole batch.
    balancer = mtd.StaticLossBalancer(1.0) if len(settings.criterion) > 1 else None
    mode = {
        "teacher_model": (_load_teacher, [*teacher], {}),
        "criterion": settings.criterion,
        "loss_balancer": balancer,
    }
    converted = mtd.convert(model, mode=[("kd_loss", mode)])
    adjust_distillation_model_for_mcore(converted, distill_cfg=settings)
    converted.forward = _teacher_then_student(converted)
    if fused and model.post_process:
        fuse(converted)
    else:
        converted.compute_language_model_loss = _own_loss(converted, trained_on=kd.lm_weight > 0)
    return converted


def _load_teacher(config: Any, checkpoint: Checkpoint) -> Any:
    spread_layers(config)
    model = config.configure_model(None)
    load_weights(model, checkpoint.architecture, checkpoint)
    return model


def _teacher_then_student(model: Any) -> Any:
    """The forward pass in training and validation alike; NeMo's runs the teacher in training only.

    Between pipeline stages the activations of both travel side by side.
    """
    import torch

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            model._teacher_model.eval()
            teacher_output = model._teacher_model(*args, **kwargs)
        with model.only_student_forward():
            student_output = type(model).forward(model, *args, **kwargs)
        return student_output if model.post_process else torch.cat([student_output, teacher_output], dim=-1)

    return forward


def _own_loss(model: Any, trained_on: bool) -> Any:
    """The student's language-model loss on a copy of its logits.

    Megatron's cross entropy works in place on fp32 logits, and the distillation loss puts its gradient in their place.
    Where the loss is only shown and not trained on, no gradient is kept.
    """

    def loss(labels: Any, logits: Any) -> Any:  # [b, s], [s, b, v] -> [b, s]
        own = logits if trained_on else logits.detach()
        return type(model).compute_language_model_loss(model, labels, own.clone())

    return loss


def teacher_in_validation() -> Any:
    """A callback that lets validation's pipeline stages hand on the teacher's activations beside the student's.

    NeMo sizes the messages between stages for both models in training only.
    """
    import dataclasses

    import lightning.pytorch as pl
    from nemo.collections.llm.modelopt.distill.utils import get_tensor_shapes_adjust_fn_for_distillation
    from nemo.lightning.megatron_parallel import MegatronStep

    class BothModelsStep(MegatronStep):
        @property
        def adjust_tensor_shapes_fn(self) -> Any:
            return get_tensor_shapes_adjust_fn_for_distillation(
                self.model, self.seq_length, self.micro_batch_size, self.decoder_seq_length, forward_only=False
            )

    class TeacherInValidation(pl.Callback):
        def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
            if not step.forward_only:
                return step
            return BothModelsStep(**{field.name: getattr(step, field.name) for field in dataclasses.fields(step)})

    return TeacherInValidation()
