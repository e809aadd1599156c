"""The losses on logits from what output layers are given: the fused form, whatever teachers there are.

Legend: s sequence, b micro batch, t = s b tokens, v vocabulary rows of this rank, h hidden (student's).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_minitron.config import KDConfig
from nemo_minitron.distillation.criteria import vocabulary_group
from nemo_minitron.distillation.losses.api import KD_LOSS
from nemo_minitron.training.losses import LM_LOSS, Batch, Losses

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor

    from nemo_minitron.distillation.losses.targets import Dense, Sparse


def fuses(kd: KDConfig, *, sequence_parallel: bool) -> bool:
    """Whether the losses on logits take the output layers' place."""
    return kd.form == "fused" or (kd.form == "auto" and kd.top_k is None and not sequence_parallel)


def pass_hidden_states_on(*models: "GPTModel") -> None:
    """Makes output layers hand on the hidden states that they are given; the student is the first."""
    for model in models:
        model.output_layer.forward = lambda hidden, *arguments, **named: (hidden, None)
    models[0].compute_language_model_loss = lambda labels, hidden: hidden.new_zeros(labels.shape)


def fused_losses(
    kd: KDConfig,
    batch: Batch,
    hidden: "Tensor",
    weight: "Tensor",
    teachers: "Sequence[Dense]",
    sparse: "Sequence[Sparse]" = (),
) -> Losses:
    """The losses of a micro batch.

    Args:
        hidden: the student's last hidden states [s, b, h].
        weight: its output matrix [v, h].
        teachers, sparse: their answers to the same tokens, [t, ..] in the order of [s, b].
    """
    from nemo_minitron.distillation.losses.fused import fused_divergence

    labels, mask = batch["labels"].t(), batch["loss_mask"].float().t()  # [s, b]
    factor = kd.temperature**2 if kd.times_t_squared else 1.0
    fused = fused_divergence(
        hidden.flatten(0, 1),
        weight,
        teachers,
        sparse=sparse,
        kind=kd.loss,
        beta=kd.beta,
        temperature=kd.temperature,
        kd_weights=(mask * kd.kd_weight * factor).flatten(),
        labels=labels.flatten(),
        lm_weights=(mask * kd.lm_weight).flatten() if kd.lm_weight else None,
        group=vocabulary_group(),
    )
    assert fused.lm is not None, "labels are given"
    shown = {KD_LOSS: fused.kd * factor, LM_LOSS: fused.lm}
    return Losses(fused.total, {name: value.view(mask.shape).t() for name, value in shown.items()})
