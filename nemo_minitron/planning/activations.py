"""Activations: what a layer keeps for its backward pass, and what it needs for a moment.

Legend: t tokens of a micro batch, s sequence, h hidden, f FFN, n heads, g query groups, d head size, v vocabulary rows.
All in bytes of one rank; matrices' inputs and outputs are shared by the tensor-parallel ranks where Megatron shares
them. Without dropout, as the engine sets it, no masks are kept.
"""

from nemo_minitron.architecture import Architecture
from nemo_minitron.planning.run import FUSED_GATE, Run

FP32 = 4
#: Queries of a block of a sliding window without Transformer Engine (megatron.attention).
BLOCK = 1024


def kept_by_layer(a: Architecture, run: Run) -> float:
    """What one transformer layer keeps of a micro batch."""
    return (_norm(a, run) * 2 + _attention(a, run) + _ffn(a, run)) * run.tokens + _rotations(a, run)


def kept_at_the_end(a: Architecture, run: Run) -> float:
    """What the final norm keeps of a micro batch; its output is the output layer's input."""
    return _norm(a, run) * run.tokens


def _norm(a: Architecture, run: Run) -> float:
    """A token's input and output of a norm, and its statistics.

    In the local spec LayerNorm's are in the activations' precision; RMSNorm on a GPU, torch's own, works in float32 on
    a copy and keeps what it normalised before the gain too.
    """
    e, h, rms = run.bytes, a.hidden_size, a.normalization == "RMSNorm"
    if run.local_spec and rms and run.layout.cuda:
        return 2 * FP32 * h + FP32 + e * h
    share = run.layout.tensor_parallel if run.layout.sequence_parallel else 1
    return (2 * e * h + (FP32 if rms else (e if run.local_spec else FP32) * 2)) / share


def _attention(a: Architecture, run: Run) -> float:
    """A token's queries, keys and values, the logarithm of each head's sum, and the input of linear_proj.

    With Transformer Engine the values are a view that keeps the whole output of linear_qkv. Without it they are a copy,
    and a sliding window is worked out in blocks (megatron.attention), whose results are kept beside the joined one.
    """
    e, d, n, g = run.bytes, a.kv_channels, a.num_attention_heads, a.num_query_groups
    values = g * d if run.local_spec else a.qkv_rows()
    blocks = n * d if run.local_spec and _windowed(a, run) and run.seq_length > BLOCK else 0
    kept = e * (n * d + g * d + values + n * d + blocks) + FP32 * n
    return (kept + _qk_norms(a, run)) / run.layout.tensor_parallel


def _qk_norms(a: Architecture, run: Run) -> float:
    """The inputs of a token's norms of queries and keys, and their statistics (_norm); their outputs are rotated, and
    not kept."""
    if not a.qk_layernorm:
        return 0
    heads, rms = a.num_attention_heads + a.num_query_groups, a.normalization == "RMSNorm"
    if run.local_spec and rms and run.layout.cuda:
        return heads * (2 * FP32 * a.kv_channels + FP32)
    return heads * (run.bytes * a.kv_channels + (FP32 if rms else (run.bytes if run.local_spec else FP32) * 2))


def _windowed(a: Architecture, run: Run) -> bool:
    return a.sliding_window is not None and a.sliding_window < run.seq_length


def _ffn(a: Architecture, run: Run) -> float:
    """A token's output of linear_fc1, what the activation keeps, and the input of linear_fc2."""
    widths = _gated(a, run) if a.gated_linear_unit else 2  # the activation's input or output, and its product
    return run.bytes * widths * a.ffn_hidden_size / run.layout.tensor_parallel


def _gated(a: Architecture, run: Run) -> int:
    """Widths of a gated FFN that are kept: both halves of linear_fc1's output and their product; unless the gate is one
    operation (fused, or megatron.local_layers's) the activated half too, and the linear half with its offset."""
    whole = run.core.takes_gate and a.activation == "silu" if run.local_spec else a.family in FUSED_GATE
    if whole:
        return 3
    return 5 if run.core.gate_offset else 4


def _rotations(a: Architecture, run: Run) -> int:
    """Cosines and sines [s, r] of queries and of keys, which each layer works out anew unless they are fused."""
    if not run.local_spec:
        return 0
    return 4 * run.bytes * run.seq_length * int(a.kv_channels * a.rotary_percent)


def forward_work(a: Architecture, run: Run) -> float:
    """What one layer needs beside its input while it runs without a backward pass to come."""
    e, n, d = run.bytes, a.num_attention_heads, a.kv_channels
    stream, tensor = 2 * a.hidden_size, run.layout.tensor_parallel
    products = 6 if a.qk_layernorm and e < FP32 else 4  # of queries: of their norm in fp32, or of their rotation
    attention = stream + (a.qkv_rows() + products * n * d) / tensor
    ffn = stream + (_gated(a, run) if a.gated_linear_unit else 2) * a.ffn_hidden_size / tensor
    return e * max(attention, ffn) * run.tokens


def backward_work(a: Architecture, run: Run) -> float:
    """What the backward pass of one layer's attention needs beyond what is kept, its FFN's being gone by then; or that
    of its FFN, whichever leaves more."""
    e, tensor = run.bytes, run.layout.tensor_parallel
    attention = 4 * a.num_attention_heads * a.kv_channels / tensor * e - _ffn(a, run)
    gate = 5 if a.gated_linear_unit else 2
    ffn = gate * a.ffn_hidden_size / tensor * e
    fc1_gradient = a.ffn_hidden_size * (2 if a.gated_linear_unit else 1) // tensor * a.hidden_size * e
    return max(attention * run.tokens, ffn * run.tokens + fc1_gradient)


def global_buffer(a: Architecture, run: Run) -> int:
    """What stays once it was asked for: Megatron's global buffer, which with sequence parallel takes a matrix's whole
    input, gathered; and the masks of a sliding window's blocks, without Transformer Engine."""
    if run.local_spec:
        window = a.sliding_window
        return run.bytes * _window_masks(window, run.seq_length) if window and _windowed(a, run) else 0
    return run.bytes * a.hidden_size * run.tokens if run.layout.sequence_parallel else 0


def _window_masks(window: int, s: int) -> int:
    """Elements of the masks [r, t] of a window's blocks; blocks of one shape share theirs."""
    before = window - 1
    stops = ((start, min(start + BLOCK, s)) for start in range(0, s, BLOCK))
    return sum(rows * keys for rows, keys in {(stop - start, stop - max(0, start - before)) for start, stop in stops})
