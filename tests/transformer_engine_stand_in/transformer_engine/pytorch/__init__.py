"""Layers on PyTorch."""

from transformer_engine.pytorch import attention, distributed, fp8, ops, tensor
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.module import GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm

__all__ = [
    "DotProductAttention", "GroupedLinear", "LayerNorm", "LayerNormLinear", "Linear", "RMSNorm", "attention",
    "distributed", "fp8", "ops", "tensor",
]  # fmt: skip
