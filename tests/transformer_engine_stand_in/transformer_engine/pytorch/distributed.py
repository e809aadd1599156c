"""Communication of tensor, sequence and context parallel layers, each with its backward."""

from typing import Any

import torch

Group = Any


def gathered(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The parts of all ranks, one after another in the first dimension."""
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


def summed(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over all ranks."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group)
    return total


def own_part(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """This rank's part of the first dimension."""
    return tensor.chunk(torch.distributed.get_world_size(group))[torch.distributed.get_rank(group)].contiguous()


class Copy(torch.autograd.Function):
    """The same on every rank; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return summed(gradient, ctx.group), None


class Reduce(torch.autograd.Function):
    """The sum over ranks; every rank has the same gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        return summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return gradient, None


class Gather(torch.autograd.Function):
    """All parts of the first dimension; gradients are summed and each rank keeps its own part's."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return gathered(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return own_part(summed(gradient, ctx.group), ctx.group), None


class ReduceScatter(torch.autograd.Function):
    """This rank's part, in the first dimension, of the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return own_part(summed(tensor, group), group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return gathered(gradient, ctx.group), None


class CudaRNGStatesTracker:
    def __init__(self) -> None:
        raise NotImplementedError("the stand-in for Transformer Engine has no tracker of CUDA's random states")


def activation_recompute_forward(*arguments: Any, **settings: Any) -> Any:
    raise NotImplementedError("the stand-in for Transformer Engine does not recompute activations")


checkpoint = activation_recompute_forward
