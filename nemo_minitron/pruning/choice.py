"""Which neurons and heads stay where the rest is refitted: those whose removal costs most after the refit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PruningPlan
from nemo_minitron.checkpoints.names import LAYERS
from nemo_minitron.checkpoints.tensors import Lazy
from nemo_minitron.pruning import arithmetic
from nemo_minitron.pruning.cut import Kept, best_heads

if TYPE_CHECKING:
    from torch import Tensor


def choose_by_saliency(
    tensors: Mapping[str, Lazy], plan: PruningPlan, moments: Mapping[str, Tensor], ridge: float, *, heads: bool = True
) -> Kept:
    """FFN neurons and, with `heads`, attention heads by arithmetic.saliency of the matrix that reads them.

    Args:
        tensors: the teacher's, by canonical name.
        moments: its second moments (ImportanceScores.moments).
        ridge: lambda over the mean of their diagonal.
    """
    a = Architecture.from_dict(plan.teacher)
    per_group = plan.width.get("num_attention_heads", a.num_attention_heads) // a.num_query_groups
    ffn: dict[int, Tensor] = {}
    chosen: dict[int, Tensor] = {}
    rankings: dict[int, Tensor] = {}
    for layer in (number for number in range(a.num_layers) if number + 1 not in plan.drop_layers):
        path = f"{LAYERS}{layer}."
        if "ffn_hidden_size" in plan.width:
            writer = tensors[f"{path}mlp.linear_fc2.weight"].read()
            cost = arithmetic.saliency(writer, moments[f"ffn.{layer}"], ridge)  # [f]
            ffn[layer] = cost.argsort(descending=True)[: plan.width["ffn_hidden_size"]]
        if heads and "num_attention_heads" in plan.width:
            writer = tensors[f"{path}self_attention.linear_proj.weight"].read()
            cost = arithmetic.saliency(writer, moments[f"attention.{layer}"], ridge, a.kv_channels)  # [n]
            ranking = cost.view(a.num_query_groups, -1).argsort(dim=1, descending=True)  # [g, n/g]
            rankings[layer], chosen[layer] = ranking, best_heads(ranking, a, per_group)
    return Kept(ffn=ffn or None, heads=chosen or None, ranking=rankings or None)
