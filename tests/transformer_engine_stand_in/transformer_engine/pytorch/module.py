"""Norms and linear layers, tensor and sequence parallel.

Legend: s sequence (of this rank, where it is sequence parallel), b batch, i input features, o output features.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from transformer_engine.pytorch.base import WithExtraState
from transformer_engine.pytorch.distributed import Copy, Gather, Reduce, ReduceScatter

Group = Any


def normalized(
    x: torch.Tensor,
    kind: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    zero_centered_gamma: bool,
) -> torch.Tensor:
    """LayerNorm or RMSNorm over the last dimension, worked out in fp32; gamma is weight + 1 where it is centred."""
    values = x.float()
    if kind == "LayerNorm":
        values = values - values.mean(-1, keepdim=True)
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    values = values * (weight.float() + (1.0 if zero_centered_gamma else 0.0))
    return (values if bias is None else values + bias.float()).to(x.dtype)


class _Norm(WithExtraState):
    kind: str

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: Any = None,
    ):
        super().__init__()
        self.eps, self.zero_centered_gamma, self.sequence_parallel = eps, zero_centered_gamma, sequence_parallel
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel
        if self.kind == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=params_dtype, device=device))
            self.bias.sequence_parallel = sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = getattr(self, "bias", None)
        return normalized(x, self.kind, self.weight, bias, self.eps, self.zero_centered_gamma)


class LayerNorm(_Norm):
    kind = "LayerNorm"


class RMSNorm(_Norm):
    kind = "RMSNorm"


class Linear(WithExtraState):
    """y = x W^T + b with the rows of W (column parallel) or its columns (row parallel) spread over ranks."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Group = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = None,
    ):
        super().__init__()
        if fuse_wgrad_accumulation:
            raise NotImplementedError(
                "the stand-in for Transformer Engine does not accumulate gradients in its products"
            )
        self.use_bias, self.return_bias, self.parallel_mode = bias, return_bias, parallel_mode
        self.tp_size = tp_size if parallel_mode else 1
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel and self.tp_size > 1
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.weight = torch.nn.Parameter(
            torch.empty(self.out_features, self.in_features, dtype=params_dtype, device=device)
        )  # [o, i]
        tracker = (
            get_rng_state_tracker().fork(rng_tracker_name or "model-parallel-rng") if get_rng_state_tracker else None
        )
        with tracker or contextlib.nullcontext():
            (init_method or (lambda weight: torch.nn.init.normal_(weight, 0.0, 0.023)))(self.weight)
        _mark(self.weight, parallel_mode, 1 if parallel_mode == "row" else 0)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(self.out_features, dtype=params_dtype, device=device))
            if parallel_mode == "row":
                self.bias.sequence_parallel = sequence_parallel
            else:
                _mark(self.bias, parallel_mode, 0)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        return self._returned(self._product(self._spread(x)))

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """The whole sequence, as a column-parallel layer wants it."""
        if self.parallel_mode != "column" or self.tp_size == 1:
            return x
        return (Gather if self.sequence_parallel else Copy).apply(x, self.tp_group)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, self.weight)  # [s, b, o]
        if self.parallel_mode == "row" and self.tp_size > 1:
            y = (ReduceScatter if self.sequence_parallel else Reduce).apply(y, self.tp_group)
        return y + self.bias if self.use_bias and not self.return_bias else y

    def _returned(self, *outputs: torch.Tensor) -> Any:
        """The product, the bias where it is not added, and what else is returned."""
        product, *more = outputs
        found = (product, self.bias, *more) if self.use_bias and self.return_bias else outputs
        return found if len(found) > 1 else product


class LayerNormLinear(Linear):
    """A norm of the input, which is not spread over ranks but for the sequence, and a linear layer.

    Attributes:
        return_layernorm_output: whether the normalised input is returned as well.
        return_layernorm_output_gathered: whether it is that of the whole sequence then.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Any = None,
        **settings: Any,
    ):
        super().__init__(
            in_features, out_features, sequence_parallel, params_dtype=params_dtype, device=device, **settings
        )
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = False
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.layer_norm_weight = torch.nn.Parameter(start(in_features, dtype=params_dtype, device=device))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, dtype=params_dtype, device=device))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        weight, bias = self.layer_norm_weight, self.layer_norm_bias
        own = normalized(x, self.normalization, weight, bias, self.eps, self.zero_centered_gamma)
        whole = self._spread(own)
        if not self.return_layernorm_output:
            return self._returned(self._product(whole))
        return self._returned(self._product(whole), whole if self.return_layernorm_output_gathered else own)


class GroupedLinear(WithExtraState):
    def __init__(self, *sizes: Any, **settings: Any):
        raise NotImplementedError("the stand-in for Transformer Engine has no grouped layers")


def _mark(parameter: torch.nn.Parameter, parallel_mode: str | None, dimension: int) -> None:
    """Says on the parameter which dimension is spread over ranks, as Megatron asks it."""
    if parallel_mode is not None:
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dimension, 1
