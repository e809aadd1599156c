"""Sliding windows in the local attention of Megatron Core before 0.15, which refuses them.

The attention is built as one without a window, and its softmax is given the window's mask where Megatron would make the
causal one.
"""

import copy
import functools
from typing import Any


def windowed_attention() -> type:
    """Megatron's local attention with the sliding window of its config."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class WindowedAttention(DotProductAttention):
        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            without = copy.copy(config)
            without.window_size = None
            super().__init__(without, *args, **kwargs)
            self.config = config
            # On the softmax, which stays as it is where ModelOpt puts its own class on the attention.
            self.scale_mask_softmax.register_forward_pre_hook(functools.partial(_masked, before=config.window_size[0]))

    return WindowedAttention


def _masked(module: Any, arguments: tuple[Any, ...], before: int) -> tuple[Any, ...]:
    """The softmax's arguments, scores [b, n, s, s] and a mask or none, with the mask [s, s] of a window."""
    scores, mask, *further = arguments
    window = outside(*scores.shape[-2:], before, scores.device)
    return scores, window if mask is None else mask | window, *further


@functools.lru_cache(maxsize=8)
def outside(queries: int, keys: int, before: int, device: Any) -> Any:
    """True [queries, keys] where a key lies after its query, or more than `before` tokens in front of it."""
    import torch

    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance < 0) | (distance > before)
