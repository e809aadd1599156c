"""Core attentions to compare, their inputs, and the same in plain arithmetic."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LENGTH, BATCH, HEADS, GROUPS, SIZE = 48, 2, 4, 2, 16


class Made(TorchDispatchMode):
    """The names of all operators that ran, and the size of the largest tensor that one of them made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.names.add(function.__name__)
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return found


def core_attention(kind, mask="causal", layer_number=3, softmax_scale=None, **changes):
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_minitron.megatron.attention import TorchAttention

    fields = {
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": HEADS, "num_query_groups": GROUPS,
        "kv_channels": SIZE, "attention_dropout": 0.0, "masked_softmax_fusion": False,
    }  # fmt: skip
    config = TransformerConfig(**{**fields, **changes})
    made = {"megatron": DotProductAttention, "torch": TorchAttention}[kind]
    return made(config, layer_number, AttnMaskType[mask], "self", softmax_scale=softmax_scale)


def drawn(groups=GROUPS, dtype=torch.float64, length=LENGTH, batch=BATCH):
    """Queries, keys and values [s, b, n, d], the values a view as Megatron's are."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads, size):
        return torch.randn(length, batch, heads, size, generator=generator, dtype=torch.float64).to(dtype)

    whole = [draw(HEADS, SIZE), draw(groups, SIZE), draw(groups, 3 * SIZE)]
    for tensor in whole:
        tensor.requires_grad_()
    return whole, [whole[0], whole[1], whole[2][..., SIZE : 2 * SIZE]]


def run(module, *further, groups=GROUPS, dtype=torch.float64, upstream=1, **named):
    """The result and the gradients of queries, keys and values."""
    leaves, inputs = drawn(groups, dtype)
    found = module(*inputs, *further, **named)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(upstream), dtype=torch.float64)
    (found * weights.to(dtype)).sum().backward()
    return [found.detach(), *(leaf.grad for leaf in leaves)]


def plain(query, key, value, hidden, scale):
    """softmax(scale Q K^T) V in so many words; hidden [s, t] or [b, 1, s, t]."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = (scale * query @ key.transpose(2, 3)).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)


def close(found, expected, tolerance=1e-12):
    return all(torch.allclose(one, other, rtol=tolerance, atol=tolerance) for one, other in zip(found, expected))


def padded_rows():
    """What a mask of samples hides [b, 1, s, s]: later tokens, and in the second sample the first eight."""
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool().repeat(BATCH, 1, 1, 1)
    hidden[1, :, 8:, :8] = True
    return hidden
