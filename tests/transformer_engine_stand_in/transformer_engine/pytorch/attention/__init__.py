"""Attention: causal or none, grouped queries, sliding window, context parallel.

Legend: s positions of this rank, t positions of all ranks, b batch, n heads, g query groups, d head size.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch

from transformer_engine.pytorch.base import WithExtraState
from transformer_engine.pytorch.distributed import Gather

Group = Any


def _do_without_extra_state(module: torch.nn.Module, incompatible: Any) -> None:
    for name in [name for name in incompatible.missing_keys if "core_attention._extra_state" in name]:
        incompatible.missing_keys.remove(name)


class DotProductAttention(WithExtraState):
    """softmax(q k^T / sqrt(d)) v of ``sbhd`` tensors, worked out in fp32.

    Context parallel: rank r of c has the chunks r and 2c - 1 - r of the sequence, in 2c equal ones; keys and values of
    all ranks are gathered, queries stay where they are.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        tp_group: Group = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Group = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
    ):
        super().__init__()
        head_size = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(head_size)
        self.attn_mask_type, self.attention_dropout = attn_mask_type, attention_dropout
        self.window = window_size or (-1, -1)
        self.get_rng_state_tracker, self.cp_group = get_rng_state_tracker, cp_group
        self.register_load_state_dict_post_hook(_do_without_extra_state)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: str | None = None,
    ) -> torch.Tensor:
        kind = attn_mask_type or self.attn_mask_type
        if kind not in ("causal", "no_mask"):
            raise NotImplementedError(f"the stand-in for Transformer Engine has no attention mask {kind}")
        positions = torch.arange(query.shape[0])  # [s]
        if self.cp_group is not None:
            positions, (key, value) = self._positions(query.shape[0]), self._whole(key, value)
        repeats = query.shape[2] // key.shape[2]
        key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))  # [t, b, n, d]
        scores = torch.einsum("sbnd,tbnd->bnst", query.float(), key.float()) * self.softmax_scale
        if kind == "causal":
            scores = scores.masked_fill(~self._visible(positions, key.shape[0]), -torch.inf)
        weights = self._dropped(torch.softmax(scores, dim=-1))
        output = torch.einsum("bnst,tbnd->sbnd", weights, value.float())
        return output.flatten(2).to(query.dtype)  # [s, b, nd]

    def _visible(self, positions: torch.Tensor, length: int) -> torch.Tensor:
        """Which of `length` positions each query sees [s, t]: none after it, and `window` ones before it."""
        back = positions[:, None] - torch.arange(length)
        left = self.window[0]
        return (back >= 0) & (back <= left) if left >= 0 else back >= 0

    def _dropped(self, weights: torch.Tensor) -> torch.Tensor:
        tracker = self.get_rng_state_tracker().fork() if self.get_rng_state_tracker else contextlib.nullcontext()
        with tracker:
            return torch.nn.functional.dropout(weights, self.attention_dropout, self.training)

    def _positions(self, own: int) -> torch.Tensor:
        """Positions in the whole sequence of this rank's queries."""
        rank, ranks = torch.distributed.get_rank(self.cp_group), torch.distributed.get_world_size(self.cp_group)
        chunks = torch.arange(own * ranks).chunk(2 * ranks)
        return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])

    def _whole(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of all ranks, in the order of the sequence."""
        ranks = torch.distributed.get_world_size(self.cp_group)
        order = [2 * rank for rank in range(ranks)] + [2 * rank + 1 for rank in reversed(range(ranks))]
        whole = [Gather.apply(tensor, self.cp_group).chunk(2 * ranks) for tensor in tensors]
        return [torch.cat([chunks[place] for place in order]) for chunks in whole]
