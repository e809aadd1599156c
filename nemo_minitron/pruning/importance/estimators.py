"""Minitron's importance scores by hooks on a Megatron GPTModel: the sums that ModelOpt's own estimators make.

For where the installed ModelOpt does not take Megatron's local layers: from 0.44 on its Minitron pruning wants those of
Transformer Engine. A test compares both, bit for bit.

Legend: s sequence, b micro batch, k any of the widths, l layers of this pipeline stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Estimates:
    """Sums over batches of this pipeline stage's layers; in float32, block influence in float64."""

    def __init__(self, model: Any):
        self.layers = list(model.decoder.layers)
        self.sums: dict[tuple[str, int], Any] = {}
        self.influence = [0.0] * len(self.layers)

    def add(self, name: str, index: int, values: Tensor) -> None:
        """Adds, of values [s, b, k], the squares of the mean magnitudes over the sequence (arXiv 2407.14679, 2.2)."""
        energy = values.detach().float().abs().mean(dim=0).pow(2).sum(dim=0)  # [k]
        key = name, index
        self.sums[key] = self.sums[key] + energy if key in self.sums else energy

    def add_influence(self, index: int, before: Tensor, after: Tensor) -> None:
        """Adds 1 - the mean cosine of the stream [s, b, h] before and after a layer (arXiv 2403.03853, eq. 1)."""
        import torch

        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=2)
        self.influence[index] += (1 - cosine.mean()).item()

    def scores(self) -> dict[str, Any]:
        """Scores by their names in ImportanceScores, and the layers' numbers."""
        import torch

        def stacked(name: str, rows: int) -> Tensor:
            return torch.stack([self.sums[name, index] for index in range(rows)]).cpu()

        count = len(self.layers)
        return {
            "numbers": [layer.layer_number for layer in self.layers],
            "hidden": stacked("hidden", 2 * count),
            "ffn": stacked("ffn", count),
            "heads": stacked("heads", count),
            "block_influence": torch.tensor(self.influence, dtype=torch.float64),
        }


@contextlib.contextmanager
def estimated(model: Any) -> Iterator[Estimates]:
    """Hooks that gather the scores of a Megatron GPTModel (local layer spec) while the body runs it."""
    estimates, handles = Estimates(model), []

    def output_of(module: Any, name: str, index: int) -> None:
        handles.append(module.register_forward_hook(lambda _, args, output: estimates.add(name, index, output)))

    def input_of(module: Any, name: str, index: int) -> None:
        handles.append(module.register_forward_pre_hook(lambda _, args: estimates.add(name, index, args[0])))

    def stream_of(layer: Any, index: int) -> None:
        def hook(_: Any, args: tuple, named: dict[str, Any], output: tuple) -> None:
            before = named["hidden_states"] if "hidden_states" in named else args[0]
            estimates.add_influence(index, before, output[0])

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    for index, layer in enumerate(estimates.layers):
        output_of(layer.input_layernorm, "hidden", 2 * index)
        output_of(layer.pre_mlp_layernorm, "hidden", 2 * index + 1)
        input_of(layer.self_attention.linear_proj, "heads", index)
        input_of(layer.mlp.linear_fc2, "ffn", index)
        stream_of(layer, index)
    try:
        yield estimates
    finally:
        for handle in handles:
            handle.remove()
