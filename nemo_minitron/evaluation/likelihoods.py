"""Log-likelihoods of a transformers model in a bounded amount of memory: the output layer runs on a few tokens at a
time, and a forward pass takes as many sequences as its activations may.

Legend: b sequences, s sequence, t tokens, v vocabulary, h hidden, f FFN, n heads, d head size.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_minitron.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

#: Bytes of logits in float32 that are worked out at once.
CHUNK = 64 << 20


def activation_bytes(a: Architecture, element: int) -> int:
    """Bytes a token of a forward pass without gradients, by transformers with fused attention, without logits.

    The stream and a norm's input and output in the model's type; a norm's two copies in float32; and the larger of what
    attention holds, queries, keys and values before and after the rotation, their copies and the output, and of the
    MLP, gate, up, activation and product. SmolLM2-135M in float32 on a CPU: 30 KB by this, 30 to 33 measured.

    Args:
        element: bytes of a number of the model's type.
    """
    attention = 3 * a.qkv_rows() + a.num_attention_heads * a.kv_channels
    mlp = (3 if a.gated_linear_unit else 2) * a.ffn_hidden_size + a.hidden_size
    normalised = max(a.hidden_size, a.num_attention_heads * a.kv_channels if a.qk_layernorm else 0)
    return element * (2 * a.hidden_size + max(attention, mlp)) + 2 * 4 * normalised


def cache_bytes(a: Architecture, element: int) -> int:
    """Bytes a token of keys and values, while text is made."""
    return 2 * a.num_layers * a.num_query_groups * a.kv_channels * element


def last_hidden(model: "PreTrainedModel", tokens: "Tensor") -> "Tensor":
    """The hidden states [b, s, h] that the output layer reads, of tokens [b, s].

    The mask that hides nothing tells transformers that attention is causal and no more; without one and without a cache
    it takes several texts in a row for possible, and makes a mask [b, s, s].
    """
    import torch

    output = model.base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def token_log_likelihoods(model: "PreTrainedModel", hidden: "Tensor", targets: "Tensor") -> "tuple[Tensor, Tensor]":
    """Of each target, its log-likelihood and whether it is the likeliest token: [t] each.

    log p = z_target - log sum_v exp z_v of the logits z, which are in float32 at least.

    Args:
        hidden: what the output layer reads [t, h].
        targets: tokens [t].
    """
    import torch

    layer = model.get_output_embeddings()
    rows = max(1, CHUNK // (4 * layer.weight.shape[0]))
    logs, likeliest = [], []
    for some, wanted in zip(hidden.split(rows), targets.split(rows)):
        logits = layer(some)  # [rows, v]
        logits = logits if logits.element_size() >= 4 else logits.float()
        logs.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=-1))
        likeliest.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(logs), torch.cat(likeliest)


def batches(lengths: Sequence[int], bytes_a_token: int, room: float, most: int | None = None) -> list[range]:
    """Sequences of falling lengths in batches, each padded to its first: as many as `room` bytes hold, one at least.

    Args:
        lengths: tokens of each sequence, the longest first.
        most: sequences a batch at most.
    """
    ranges, first = [], 0
    while first < len(lengths):
        fitting = max(1, int(room // (bytes_a_token * max(lengths[first], 1))))
        count = min(fitting, most or fitting, len(lengths) - first)
        ranges.append(range(first, first + count))
        first += count
    return ranges
