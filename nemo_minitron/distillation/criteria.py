"""The losses as ModelOpt's criteria: modules that take what a layer of the student and one of the teacher put out.

Legend: s sequence, b micro batch, v vocabulary rows of this rank, h hidden (student's), g hidden (teacher's).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import HiddenLossConfig, KDConfig
from nemo_minitron.distillation.layer_pairs import Pair
from nemo_minitron.distillation.losses import api
from nemo_minitron.distillation.losses.hidden import cosine_loss, mse_loss, projection

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.nn import Module

PROJECTION_SEED = 20240719
OUTPUT_LAYER = "output_layer"


def vocabulary_group() -> "ProcessGroup | None":
    """The ranks that share the vocabulary; None where each has all of it."""
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return None
    return parallel_state.get_tensor_model_parallel_group()


def logits_criterion(kd: KDConfig) -> "Module":
    """Of what both output layers put out: a loss a token [b, s]."""
    import torch

    class LogitsLoss(torch.nn.modules.loss._Loss):
        def forward(self, student: "tuple[Tensor, Any]", teacher: "tuple[Tensor, Any]") -> "Tensor":
            logits, target, group = student[0], teacher[0], vocabulary_group()  # [s, b, v]
            options: dict[str, Any] = {
                "temperature": kd.temperature,
                "times_t_squared": kd.times_t_squared,
                "group": group,
                "overwrite_student": True,
            }
            if kd.top_k is not None:
                kept = api.top_k(target, kd.top_k, group=group)
                value = api.top_k_forward_kl(logits, kept, **options)
            else:
                value = api.divergence(logits, target, kd.loss, beta=kd.beta, **options)
            return value.transpose(0, 1)

    return LogitsLoss()


def hidden_criteria(
    config: HiddenLossConfig, pairs: Sequence[Pair], student_width: int, teacher_width: int
) -> dict[tuple[str, str], "Module"]:
    """(student's module, teacher's module) -> criterion that gives a loss a token [b, s].

    Where the widths differ, one projection serves all pairs: the residual stream is one space through all layers. It
    starts orthogonal, is trained along, lies in the checkpoints to resume from, and not in the result.
    """
    if not pairs:
        return {}
    import torch

    measure = {"cosine": cosine_loss, "mse": mse_loss}[config.loss]
    shared = projection(student_width, teacher_width)
    for weight in shared.parameters():
        torch.nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(PROJECTION_SEED))

    class HiddenLoss(torch.nn.modules.loss._Loss):
        def __init__(self, owner: bool):
            super().__init__()
            self.projection = shared if owner else None

        def forward(self, student: "Tensor | tuple[Tensor, Any]", teacher: "Tensor | tuple[Tensor, Any]") -> "Tensor":
            own, other = (one[0] if isinstance(one, tuple) else one for one in (student, teacher))  # [s, b, h], [.., g]
            return measure(own, other, shared).transpose(0, 1)

    return {(_module(own), _module(other)): HiddenLoss(owner=not i) for i, (own, other) in enumerate(pairs)}


def _module(layer: int) -> str:
    return f"decoder.layers.{layer - 1}" if layer else "embedding"
