"""Bytes of a model where it is served: weights in a format, and the keys and values of what it reads.

Legend: l layers, g query groups, d head size, b sequences, s tokens of each.
"""

from nemo_minitron.architecture import Architecture

#: Bytes of a weight of a linear layer inside the layers; embedding, output layer and norms stay in bf16 but for fp32.
#: int4 has a bf16 scale for each group of 128 (AWQ).
LINEAR = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2 / 128}
#: Keys and values are kept in 16 bits, in 32 where the weights are.
KEPT = {"fp32": 4.0}


def weight_bytes(a: Architecture, weights: str) -> float:
    """Of all parameters: linear layers inside the layers in the format, the rest in bf16 (fp32 with fp32)."""
    rest = 4.0 if weights == "fp32" else 2.0
    linear = a.num_layers * (a.layer_parameters() - a.norm_parameters())
    return LINEAR[weights] * linear + rest * (a.parameters() - linear)


def cache_bytes(a: Architecture, weights: str, *, batch: int, length: int) -> float:
    """2 l g d b s values, or as many tokens as a window keeps."""
    tokens = min(length, a.sliding_window or length)
    groups = a.num_query_groups or a.num_attention_heads
    values = 2 * a.num_layers * groups * (a.kv_channels or 0) * batch * tokens
    return KEPT.get(weights, 2.0) * values


def deployment_bytes(a: Architecture, weights: str, *, batch: int, length: int) -> float:
    """Weights and cache."""
    return weight_bytes(a, weights) + cache_bytes(a, weights, batch=batch, length=length)
