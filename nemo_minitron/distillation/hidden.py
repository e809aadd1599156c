"""Where the losses on hidden states meet Megatron's models: which layers, ModelOpt's criterion, the share in the sum.

Legend: s sequence, b micro batch, h hidden (student's), g hidden (teacher's).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.config import HiddenLossConfig
from nemo_minitron.distillation.losses.intermediate import match_layers, outer_pairs
from nemo_minitron.distillation.output_layer import KD_LOSS, taken
from nemo_minitron.training.losses import TOTAL

PROJECTION_SEED = 20240719


def layer_pairs(
    config: HiddenLossConfig, teacher: Architecture, student: Architecture, drop_layers: Sequence[int] | None
) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer) of each loss on hidden states; none where they are not asked for.

    Args:
        drop_layers: the layers that the student lacks, where its manifest says so.

    Raises:
        ConfigError: a pair does not exist.
    """
    if not config.weight:
        return []
    if config.pairs == "outer":
        return outer_pairs(teacher.num_layers, student.num_layers)
    if config.pairs == "auto":
        return match_layers(teacher.num_layers, student.num_layers, drop_layers=drop_layers)
    return match_layers(teacher.num_layers, student.num_layers, pairs=config.pairs)


def loss_name(config: HiddenLossConfig, pair: tuple[int, int]) -> str:
    """What logs and manifests call the loss of a pair, ``cosine_2-4``."""
    return f"{config.loss}_{pair[0]}-{pair[1]}"


def hidden_criteria(
    config: HiddenLossConfig, pairs: Sequence[tuple[int, int]], student_width: int, teacher_width: int
) -> dict[tuple[str, str], Any]:
    """ModelOpt's criteria: (student's module, teacher's module) -> loss a token [b, s].

    Where the widths differ, one projection serves all pairs: the residual stream is one space through all layers. It
    starts orthogonal, is trained along, lies in the checkpoints to resume from, and not in the result.
    """
    if not pairs:
        return {}
    import torch

    from nemo_minitron.distillation.losses.intermediate import cosine_loss, mse_loss, projection

    measure = {"cosine": cosine_loss, "mse": mse_loss}[config.loss]
    shared = projection(student_width, teacher_width)
    for weight in shared.parameters():
        torch.nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(PROJECTION_SEED))

    class HiddenLoss(torch.nn.modules.loss._Loss):
        def __init__(self, owner: bool):
            super().__init__()
            self.projection = shared if owner else None

        def forward(self, student: Any, teacher: Any) -> Any:
            own, other = (one[0] if isinstance(one, tuple) else one for one in (student, teacher))  # [s, b, h], [.., g]
            return measure(own, other, shared).transpose(0, 1)

    return {(_module(own), _module(other)): HiddenLoss(owner=not i) for i, (own, other) in enumerate(pairs)}


def _module(layer: int) -> str:
    return f"decoder.layers.{layer - 1}" if layer else "embedding"


def hidden_losses(model: Any, names: Sequence[str]) -> dict[str, Any]:
    """Name -> loss a token [b, s] of each pair, from the states that ModelOpt's hooks kept in this forward pass."""
    criteria = list(model._layers_to_loss.items())[-len(names) :] if names else []
    return {name: loss(taken(own), taken(other)) for name, ((own, other), loss) in zip(names, criteria)}


def with_hidden(
    losses: dict[str, Any], hidden: Mapping[str, Any], weights: Mapping[str, float], mask: Any, config: HiddenLossConfig
) -> dict[str, Any]:
    """The losses a token, and as TOTAL the sum that is trained on, the hidden states' share in it.

    L = sum_t mask (w_kd L_kd + w_lm L_lm) + w alpha / n sum_pairs sum_t mask L_pair, with n pairs, and alpha = 1 or,
    scale=dynamic, L_kd / mean_pairs L_pair of this micro batch, without gradient.

    Source: arXiv 2407.14679, section 3.

    Args:
        losses: from the logits, [b, s]; TOTAL where the sum over tokens is made already.
        weights: of the losses in `losses`.
        mask: [b, s], float.
    """
    from nemo_minitron.distillation.losses.api import dynamic_scale

    total = losses.get(TOTAL)
    if total is None:
        total = sum(weights[name] * (value * mask).sum() for name, value in losses.items() if weights[name])
    mean = sum((value * mask).sum() for value in hidden.values()) / len(hidden)
    alpha = dynamic_scale((losses[KD_LOSS] * mask).sum(), mean) if config.scale == "dynamic" else 1.0
    return {**losses, **hidden, TOTAL: total + config.weight * alpha * mean}


def scaled_weights(
    weights: Mapping[str, float], means: Mapping[str, float], names: Sequence[str], config: HiddenLossConfig
) -> dict[str, float]:
    """The weight of each loss in a step with these means: under scale=dynamic those of hidden states follow L_kd."""
    if not names or config.scale != "dynamic":
        return dict(weights)
    mean = sum(means[name] for name in names) / len(names)
    alpha = means[KD_LOSS] / mean if mean else 0.0
    return {name: weight * (alpha if name in names else 1.0) for name, weight in weights.items()}
