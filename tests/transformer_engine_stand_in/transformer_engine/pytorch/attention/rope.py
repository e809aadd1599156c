"""Rotary position embedding."""

import torch


def apply_rotary_pos_emb(
    t: torch.Tensor, freqs: torch.Tensor, tensor_format: str = "sbhd", interleaved: bool = False, fused: bool = False
) -> torch.Tensor:
    """Turns the first dimensions of every head, as many as there are angles, by its position's angles.

    Args:
        t: [s, b, n, d].
        freqs: angles [s, 1, 1, r], the second half those of the first.
    """
    if tensor_format != "sbhd" or interleaved:
        raise NotImplementedError(f"the stand-in for Transformer Engine does not turn {tensor_format}, {interleaved=}")
    size = freqs.shape[-1]
    angles = freqs[: t.shape[0]].float()
    turned, rest = t[..., :size].float(), t[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    return torch.cat([turned.to(t.dtype), rest], dim=-1)
