"""Second moments of what a Megatron model's linear layers read, gathered while it runs.

Legend: s sequence, b micro batch, h hidden, f FFN, n heads, d head size, l layers, k any of the widths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import MinitronError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Accumulators take at most this share of the free memory of the model's device; otherwise they lie in the host's.
DEVICE_SHARE = 0.5


class MomentSums:
    """Sums over tokens of x x^T, in float64, whatever the number of samples.

    Products of one batch are in float32 (float64 on a model in float64), their sums in float64.
    """

    def __init__(self, device: Any = "cpu"):
        self.device = device
        self.sums: dict[str, Any] = {}
        self.tokens: dict[str, int] = {}

    def add(self, name: str, rows: Tensor) -> None:
        """Adds rows [tokens, k]."""
        import torch

        rows = rows if rows.dtype == torch.float64 else rows.float()
        product = (rows.T @ rows).to(self.device, torch.float64)
        if name in self.sums:
            self.sums[name] += product
        else:
            self.sums[name] = product
        self.tokens[name] = self.tokens.get(name, 0) + rows.shape[0]

    def means(self) -> dict[str, Any]:
        """Name -> mean over tokens [k, k], float32; raises MinitronError where a layer's activations are not finite."""
        import torch

        bad = [name for name, total in self.sums.items() if not total.isfinite().all()]
        if bad:
            what = {"stream": "norm input", "ffn": "FFN activation", "attention": "attention output"}
            kind, _, number = bad[0].partition(".")
            layer = int(number) // 2 if kind == "stream" else int(number)
            raise MinitronError(
                f"layer {layer + 1}: the {what[kind]} holds values that are not finite ({len(bad)} statistics do); "
                "`minitron inspect --values` tells whether the weights do"
            )
        return {name: (total / self.tokens[name]).to(torch.float32).cpu() for name, total in self.sums.items()}


def normalized(stream: Tensor, config: Any) -> Tensor:
    """What a norm makes of its input [.., h] before its gain and bias."""
    rows = stream if stream.element_size() == 8 else stream.float()
    if config.normalization == "LayerNorm":
        rows = rows - rows.mean(dim=-1, keepdim=True)
    return rows * (rows.pow(2).mean(dim=-1, keepdim=True) + config.layernorm_epsilon).rsqrt()


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[MomentSums]:
    """Hooks that gather the moments of a Megatron GPTModel (local layer spec) while the body runs it.

    Names as in ImportanceScores.moments; a pipeline stage gathers those of its own layers.
    """
    config = model.config
    sums, handles = MomentSums(_device(model)), []

    def watch(module: Any, name: str, prepare: Any = lambda rows: rows) -> None:
        def hook(_: Any, args: tuple) -> None:
            sums.add(name, prepare(args[0].detach()).flatten(0, -2))  # [s, b, k] -> [sb, k]

        handles.append(module.register_forward_pre_hook(hook))

    def norm(stream: Tensor) -> Tensor:
        return normalized(stream, config)

    for layer in model.decoder.layers:
        number = layer.layer_number - 1
        watch(layer.input_layernorm, f"stream.{2 * number}", norm)
        watch(layer.self_attention.linear_proj, f"attention.{number}")
        watch(layer.pre_mlp_layernorm, f"stream.{2 * number + 1}", norm)
        watch(layer.mlp.linear_fc2, f"ffn.{number}")
    if model.post_process:
        watch(model.decoder.final_layernorm, f"stream.{2 * config.num_layers}", norm)
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _device(model: Any) -> torch.device:
    """The model's own device where its accumulators fit there, the host otherwise."""
    import torch

    device = next(model.parameters()).device
    if device.type != "cuda":
        return device
    config, layers = model.config, len(model.decoder.layers)
    widths = (
        2 * config.hidden_size**2,
        config.ffn_hidden_size**2,
        (config.num_attention_heads * config.kv_channels) ** 2,
    )
    fits = 8 * layers * sum(widths) < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
    return device if fits else torch.device("cpu")
