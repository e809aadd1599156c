"""Norms and gates of the local layers that keep for their backward pass what they need, and no more.

PyTorch's RMSNorm and Megatron's gate without Transformer Engine are single operations, each of which keeps its inputs:
three widths of a norm, four or five of a gated FFN. Two and three are enough, and take less time.
"""

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


class SwiGLUFunction(torch.autograd.Function):
    """silu(a) b of the halves a and b of its input [..., 2 f] -> [..., f]; keeps its input alone.

    silu(a) is worked out anew for the gradients: silu'(a) g b, and g silu(a).
    """

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, linear = both.chunk(2, dim=-1)
        return silu(gate).mul_(linear)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, linear = both.chunk(2, dim=-1)
        gradient = torch.empty_like(both)
        for_gate, for_linear = gradient.chunk(2, dim=-1)
        torch.mul(upstream, silu(gate), out=for_linear)
        torch.ops.aten.silu_backward.grad_input(upstream * linear, gate, grad_input=for_gate)
        return gradient


class SwiGLU(MegatronModule):
    """The activation of a gated FFN, as Megatron's MLP takes it in its submodules: linear_fc1's output -> [..., f]."""

    def forward(self, both: Tensor) -> Tensor:
        return SwiGLUFunction.apply(both)


class RMSNormFunction(torch.autograd.Function):
    """y = x r gamma with r = 1 / sqrt(mean(x^2) + epsilon) of each row [..., h], in fp32 at least; keeps x and r.

    With n = x r and u = dL/dy gamma: dL/dx = r (u - n mean(u n)), dL/dgamma = sum over rows of dL/dy n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x.contiguous(), gamma, scale)  # not all of what x may be a part of, as a key is of qkv
        return (wide * scale).mul_(gamma).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gamma, scale = ctx.saved_tensors
        normalised, upstream = x * scale, upstream.to(scale.dtype)
        for_gamma = (upstream * normalised).flatten(0, -2).sum(dim=0)
        for_x = upstream * gamma
        mean = (for_x * normalised).mean(dim=-1, keepdim=True)
        for_x.sub_(normalised.mul_(mean)).mul_(scale)
        return for_x.to(x.dtype), for_gamma.to(gamma.dtype), None


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm; on a GPU its own kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return super().forward(x)
        return RMSNormFunction.apply(x, self.weight, self.eps)


class LocalNorm:
    """Megatron's wrapper of PyTorch's norms, with the RMSNorm above; a class, as Megatron's specs want it."""

    def __new__(  # type: ignore[misc]  # makes other classes' objects, as WrappedTorchNorm does
        cls, config: "TransformerConfig", hidden_size: int, eps: float = 1e-5, **options: Any
    ) -> torch.nn.Module:
        norm: torch.nn.Module = WrappedTorchNorm(config, hidden_size, eps, **options)
        return RMSNorm(hidden_size, eps=eps) if config.normalization == "RMSNorm" else norm
