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

#: What second moments are named after -> the matrix that reads it.
WRITERS = {"ffn": "mlp.linear_fc2", "attention": "self_attention.linear_proj"}


class Costs:
    """What removing each neuron and head of a teacher costs, worked out when it is asked for, and once.

    Args:
        tensors: the teacher's, by canonical name.
        moments: its second moments (ImportanceScores.moments).
        ridge: lambda over the mean of their diagonal.
    """

    def __init__(self, tensors: Mapping[str, Lazy], moments: Mapping[str, Tensor], ridge: float):
        self.tensors, self.moments, self.ridge = tensors, moments, ridge
        self._known: dict[str, Tensor] = {}

    def of(self, kind: str, layer: int, unit: int = 1) -> Tensor:
        """arithmetic.saliency of the matrix that reads them: of the neurons (`ffn`) or the heads (`attention`)."""
        name = f"{kind}.{layer}"
        if name not in self._known:
            writer = self.tensors[f"{LAYERS}{layer}.{WRITERS[kind]}.weight"].read()
            self._known[name] = arithmetic.saliency(writer, self.moments[name], self.ridge, unit)
        return self._known[name]


def choose_by_saliency(costs: Costs, plan: PruningPlan, *, heads: bool = True) -> Kept:
    """FFN neurons and, with `heads`, attention heads: those whose removal costs most."""
    a = Architecture.from_dict(plan.teacher)
    per_group = plan.width.get("num_attention_heads", a.num_attention_heads) // a.num_query_groups
    ffn: dict[int, Tensor] = {}
    chosen: dict[int, Tensor] = {}
    rankings: dict[int, Tensor] = {}
    for layer in (number for number in range(a.num_layers) if number + 1 not in plan.drop_layers):
        if "ffn_hidden_size" in plan.width:
            ffn[layer] = costs.of("ffn", layer).argsort(descending=True)[: plan.width["ffn_hidden_size"]]
        if heads and "num_attention_heads" in plan.width:
            cost = costs.of("attention", layer, a.kv_channels)  # [n]
            ranking = cost.view(a.num_query_groups, -1).argsort(dim=1, descending=True)  # [g, n/g]
            rankings[layer], chosen[layer] = ranking, best_heads(ranking, a, per_group)
    return Kept(ffn=ffn or None, heads=chosen or None, ranking=rankings or None)
