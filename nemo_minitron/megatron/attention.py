"""Attention without Transformer Engine: torch's scaled_dot_product_attention in Megatron's local layers.

Megatron's own DotProductAttention works out and keeps all scores of a layer. Torch's kernels keep the logarithm of each
row's sum instead, on a CPU and on GPUs, and take a query group's keys and values as they are.

Legend: s queries, t keys, b micro batch, n heads of this rank, g query groups of this rank, d head size, r queries of a
block.
"""

import contextlib
import copy
import functools
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nemo_minitron.errors import EngineError
from nemo_minitron.packages.versions import local_attention_takes_windows

#: What Megatron fills masked scores with: a row without any key stays finite.
MASKED = -10000.0
#: Queries of a block of a sliding window; each block's mask has this many rows.
BLOCK = 1024


class TorchAttention(DotProductAttention):
    """Megatron's local core attention with the same arguments and results, within rounding.

    The softmax is worked out in fp32 inside, whatever attention_softmax_in_fp32 says. A window and a mask that is given
    both hold. Context parallel is refused, as by Megatron's own.
    """

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any):
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise EngineError(f"softmax_type = {config.softmax_type!r} needs Transformer Engine; here it is 'vanilla'")
        given, windows = config, local_attention_takes_windows()
        if not windows:  # Core before 0.15 refuses a window, which is no matter of its own here
            config = copy.copy(given)
            config.window_size = None
        super().__init__(config, layer_number, *args, **kwargs)
        self.config = given
        self.before = given.window_size[0] if _is_windowed(given, layer_number) else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[s, b, n, d], [t, b, g, d], [t, b, g, d] -> [s, b, n d]; packed rows have no b.

        Args:
            attention_mask: True where a key is hidden [b or 1, 1 or n, s, t], or [s, t]; None: causal, or nothing
                is hidden in a layer that is not.
            attn_mask_type: not used, as in Megatron's own; the layer's holds.
            packed_seq_params: where each of the packed sequences begins and ends, whose tokens see their own sequence.
        """
        if value.requires_grad:
            value = value.contiguous()  # or the whole output of linear_qkv, of which it is a part, would be kept
        if attention_bias is not None:
            raise EngineError("an attention bias needs Transformer Engine")
        dropout = self.attention_dropout.p if self.training else 0.0
        options: dict[str, Any] = {
            "causal": self.attn_mask_type.name in ("causal", "padding_causal"),
            "before": self.before,
            "scale": self.softmax_scale * (self.scale_mask_softmax.scale or 1.0),
            "dropout": dropout,
        }
        with self._random(dropout):
            if packed_seq_params is not None:
                return packed_attention(query, key, value, _lengths(packed_seq_params), **options)
            return attention(query, key, value, mask=attention_mask, **options)

    def _random(self, dropout: float) -> contextlib.AbstractContextManager[None]:
        """Megatron's random state for what differs between tensor-parallel ranks."""
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        if not dropout or self.config.sequence_parallel:
            return contextlib.nullcontext()
        forked: contextlib.AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return forked


def _is_windowed(config: Any, layer_number: int) -> bool:
    """Whether a layer (from 1) has the config's window; Core before 0.15 has no windows for some layers alone."""
    if config.window_size is None or not local_attention_takes_windows():
        return config.window_size is not None
    from megatron.core.transformer.utils import is_layer_window_attention

    return is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)


def _lengths(packed: Any) -> list[int]:
    """Tokens of each packed sequence, with its padding."""
    padded = getattr(packed, "cu_seqlens_q_padded", None)
    return (packed.cu_seqlens_q if padded is None else padded).diff().tolist()


def packed_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], **options: Any) -> Tensor:
    """Attention within each of the sequences behind one another: [s, n, d], [s, g, d], [s, g, d] -> [s, n d]."""
    split = [tensor.unsqueeze(1).split(lengths) for tensor in (query, key, value)]
    return torch.cat([attention(*one, **options) for one in zip(*split)]).squeeze(1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float,
    before: int | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale Q K^T) V of each head: [s, b, n, d], [t, b, g, d], [t, b, g, d] -> [s, b, n d].

    Without a mask for each sample, samples count as further heads: torch lays its result out as [b, s, n, d], which
    is then Megatron's [s, b, n, d] and need not be copied.

    Args:
        causal: a query sees no key after its own; a mask that is given says so itself.
        before: a query sees this many keys before its own; None: all.
        mask: True where a key is hidden [b or 1, 1 or n, s, t], or [s, t].
    """
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    samples = 1 if mask is None or mask.shape[:2] == (1, 1) else query.shape[1]
    q, k, v = (_as_heads(tensor, samples) for tensor in (query, key, value))
    queries, keys = len(query), len(key)
    window = before if before is not None and keys > before + 1 else None
    if mask is not None:
        hidden = mask if window is None else mask | outside(queries, keys, window, query.device)
        result = _attend(q, k, v, _added(hidden, query.dtype), scale=scale, dropout=dropout)
    elif window is not None:
        result = _in_blocks(q, k, v, window, scale=scale, dropout=dropout)
    elif causal and queries not in (1, keys):
        hidden_keys = _hidden(queries, keys, keys, query.dtype, query.device)
        result = _attend(q, k, v, hidden_keys, scale=scale, dropout=dropout)
    else:
        result = _attend(q, k, v, None, scale=scale, dropout=dropout, causal=causal and queries > 1)
    return result.permute(2, 0, 1, 3).reshape(queries, query.shape[1], -1)


def _as_heads(tensor: Tensor, samples: int) -> Tensor:
    """[s, b, n, d] -> [b, n, s, d], or [1, b n, s, d] for one sample."""
    return tensor.reshape(len(tensor), samples, -1, tensor.shape[-1]).permute(1, 2, 0, 3)


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, before: int, *, scale: float, dropout: float) -> Tensor:
    """A sliding window, block by block: each block's queries and the keys that any of them sees."""
    queries, keys = query.shape[2], key.shape[2]
    blocks = []
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        seen = slice(max(0, start + keys - queries - before), stop + keys - queries)
        mask = _hidden(stop - start, seen.stop - seen.start, before, query.dtype, query.device)
        one = (query[:, :, start:stop], key[:, :, seen], value[:, :, seen])
        blocks.append(_attend(*one, mask, scale=scale, dropout=dropout))
    return blocks[0] if len(blocks) == 1 else _joined(blocks)


def _joined(blocks: list[Tensor]) -> Tensor:
    """Blocks [b, n, r, d] as one [b, n, s, d], laid out as torch lays out each."""
    return torch.cat([block.transpose(1, 2) for block in blocks], dim=1).transpose(1, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    dropout: float,
    causal: bool = False,
) -> Tensor:
    """Torch's attention of [b, n, s, d] on [b, g, t, d]; heads are repeated where its kernels take no groups."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and not _takes_groups(query, key, value, mask, dropout, causal):
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        grouped = False
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _takes_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> bool:
    """Whether torch has a kernel for query groups: on a CPU, and on GPUs flash attention (half precision, no mask)."""
    if not query.is_cuda:
        return True
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    return can_use_flash_attention(SDPAParams(query, key, value, mask, dropout, causal, True))


@functools.lru_cache(maxsize=8)
def _hidden(queries: int, keys: int, before: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a window adds to the scores [s, t]; kept for the next layer."""
    with torch.inference_mode(False):
        return _added(outside(queries, keys, before, device), dtype)


def _added(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask (True where a key is hidden) adds to the scores."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, MASKED)


def outside(queries: int, keys: int, before: int, device: torch.device) -> Tensor:
    """True [s, t] where a key lies after its query, or more than `before` tokens in front of it; the last query's own
    key is the last."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance < 0) | (distance > before)
