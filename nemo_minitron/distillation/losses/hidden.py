"""Losses between hidden states of student and teacher, a token, and their share in the loss that is trained on.

Legend: s sequence, b micro batch, h hidden (student's), g hidden (teacher's).

Hidden states [..., h] of any leading shape ([s, b] in Megatron); a rank needs whole states, of all or of its own
tokens (sequence parallel).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nemo_minitron.config import HiddenLossConfig
from nemo_minitron.distillation.losses.api import KD_LOSS, dynamic_scale
from nemo_minitron.training.losses import Losses

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def cosine_loss(student: "Tensor", teacher: "Tensor", projection: "torch.nn.Module | None" = None) -> "Tensor":
    """1 - cos(P h_s, h_t) of each token [...], from 0 to 2, in float32 (float64 for float64 states).

    Source: arXiv 2407.14679, section 3 (L_is).

    Args:
        student, teacher: hidden states [..., h], [..., g].
        projection: P, from `projection`; None: the identity.
    """
    from torch.nn.functional import cosine_similarity

    return 1 - cosine_similarity(*_comparable(student, teacher, projection), dim=-1)


def mse_loss(student: "Tensor", teacher: "Tensor", projection: "torch.nn.Module | None" = None) -> "Tensor":
    """mean_g (P h_s - h_t)^2 of each token [...]; NeMo's MSELoss has the sum over g. Else as `cosine_loss`."""
    own, other = _comparable(student, teacher, projection)
    return (own - other).square().mean(dim=-1)


def projection(student_width: int, teacher_width: int, dtype: "torch.dtype | None" = None) -> "torch.nn.Module":
    """P: h -> g, a trained linear map without bias where the widths differ; the identity where they agree."""
    import torch

    if student_width == teacher_width:
        return torch.nn.Identity()
    return torch.nn.Linear(student_width, teacher_width, bias=False, dtype=dtype)


def _comparable(student: "Tensor", teacher: "Tensor", projection: "torch.nn.Module | None") -> "tuple[Tensor, Tensor]":
    """The projected student's and the teacher's states in the accumulation dtype."""
    import torch

    if projection is not None:
        student = projection(student)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student's states {[*student.shape]} and teacher's {[*teacher.shape]} differ in shape; "
            "where widths differ, a projection is needed"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def loss_name(config: HiddenLossConfig, pair: tuple[int, int]) -> str:
    """What logs and manifests call the loss of a pair (student's layer, teacher's layer), ``cosine_2-4``."""
    return f"{config.loss}_{pair[0]}-{pair[1]}"


def with_hidden(logits: Losses, hidden: "Mapping[str, Tensor]", mask: "Tensor", config: HiddenLossConfig) -> Losses:
    """The losses on logits and those on hidden states, whose share the total then has as well.

    L = L_logits + w alpha / n sum_pairs sum_t mask L_pair, with n pairs, and alpha = 1 or, scale=dynamic,
    L_kd / mean_pairs L_pair of this micro batch, without gradient.

    Source: arXiv 2407.14679, section 3.

    Args:
        logits: the losses on logits; L_logits is their total.
        hidden: name -> loss a token [b, s] of each pair.
        mask: [b, s], float.
    """
    mean = sum((value * mask).sum() for value in hidden.values()) / len(hidden)
    dynamic = config.scale == "dynamic"
    alpha = dynamic_scale((logits.shown[KD_LOSS] * mask).sum(), mean) if dynamic else 1.0
    return Losses(logits.total + config.weight * alpha * mean, {**logits.shown, **hidden})


def scaled_weights(
    weights: Mapping[str, float], means: Mapping[str, float], names: Sequence[str], config: HiddenLossConfig
) -> dict[str, float]:
    """The weight of each loss in a step with these means: under scale=dynamic those of hidden states follow L_kd.

    Args:
        names: of the losses on hidden states.
    """
    if not names or config.scale != "dynamic":
        return dict(weights)
    mean = sum(means[name] for name in names) / len(names)
    alpha = means[KD_LOSS] / mean if mean else 0.0
    return {name: weight * (alpha if name in names else 1.0) for name, weight in weights.items()}
