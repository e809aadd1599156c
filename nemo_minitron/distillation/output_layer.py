"""Where the distillation losses meet Megatron's models: on the logits, or in the output layer's place.

Legend: s sequence, b micro batch, v vocabulary rows of this rank, h hidden (student's), g hidden (teacher's).
"""

from typing import Any

from nemo_minitron.config import KDConfig
from nemo_minitron.training.losses import TOTAL
from nemo_minitron.training.model import LM_LOSS

KD_LOSS = "kd_loss"


def vocabulary_group() -> Any:
    """The ranks that share the vocabulary; None where each has all of it."""
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return None
    return parallel_state.get_tensor_model_parallel_group()


def logits_loss(kd: KDConfig) -> Any:
    """The criterion on the outputs of both output layers, as ModelOpt calls it: a loss a token [b, s]."""
    import torch

    from nemo_minitron.distillation.losses import api as losses

    options = {"temperature": kd.temperature, "times_t_squared": kd.times_t_squared, "overwrite_student": True}

    class LogitsLoss(torch.nn.modules.loss._Loss):
        def forward(self, student: Any, teacher: Any) -> Any:
            logits, target, group = student[0], teacher[0], vocabulary_group()  # [s, b, v]
            if kd.top_k is not None:
                found = losses.top_k(target, kd.top_k, group=group)
                value = losses.top_k_forward_kl(logits, found, group=group, **options)
            else:
                value = losses.divergence(logits, target, kd.loss, beta=kd.beta, group=group, **options)
            return value.transpose(0, 1)

    return LogitsLoss()


def logits_losses(model: Any) -> Any:
    """The distillation loss a token [b, s] of a model that is not fused, by ModelOpt's criterion."""
    (own, other), loss = next(iter(model._layers_to_loss.items()))
    return loss(taken(own), taken(other))


def fuse(model: Any) -> None:
    """Makes the output layers of a DistillationModel and its teacher hand on the hidden states that they are given."""
    for one in (model, model.teacher_model):
        one.output_layer.forward = lambda hidden, *arguments, **named: (hidden, None)
    model.compute_language_model_loss = lambda labels, hidden: hidden.new_zeros(labels.shape)


def is_fused(model: Any) -> bool:
    """Whether `fuse` was done to the model."""
    return "forward" in vars(model.output_layer)


def unfuse(model: Any) -> None:
    """Gives a student its output layer back."""
    if model.post_process:
        vars(model.output_layer).pop("forward", None)


def fused_losses(model: Any, batch: dict[str, Any], kd: KDConfig) -> dict[str, Any]:
    """Both losses a token [b, s], without gradients, and the weighed and masked sum that is trained on."""
    from nemo_minitron.distillation.losses.fused import fused_divergence

    labels, mask = batch["labels"].t(), batch["loss_mask"].float().t()  # [s, b]
    hidden, target = (taken(one.output_layer)[0] for one in (model, model.teacher_model))  # [s, b, h], [s, b, g]
    factor = kd.temperature**2 if kd.times_t_squared else 1.0
    found = fused_divergence(
        hidden.flatten(0, 1),
        _output_weight(model),
        target.flatten(0, 1),
        _output_weight(model.teacher_model),
        kind=kd.loss,
        beta=kd.beta,
        temperature=kd.temperature,
        kd_weights=(mask * kd.kd_weight * factor).flatten(),
        labels=labels.flatten(),
        lm_weights=(mask * kd.lm_weight).flatten() if kd.lm_weight else None,
        group=vocabulary_group(),
    )
    shown = {KD_LOSS: found.kd * factor, LM_LOSS: found.lm}
    return {name: value.view(mask.shape).t() for name, value in shown.items()} | {TOTAL: found.total}


def taken(layer: Any) -> Any:
    """What a layer gave in this forward pass, which ModelOpt's hooks kept, and keep no more."""
    found, layer._intermediate_output = layer._intermediate_output, None
    return found


def _output_weight(model: Any) -> Any:
    """The output matrix [v, h], the embedding's where they are tied."""
    tied = model.share_embeddings_and_output_weights
    return model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
