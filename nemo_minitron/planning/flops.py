"""Floating-point operations of a token: the matrix products, a multiplication and an addition each counting as one.

Legend: s sequence, l layers, h hidden, f FFN, n heads, g query groups, d head size, v vocabulary rows.
"""

from nemo_minitron.architecture import Architecture


def forward_flops(a: Architecture, seq_length: int, *, whole_scores: bool) -> float:
    """Forward pass of one token among `seq_length`.

        2 l ((n + 2g) d h + n d h + (2 or 1) f h + f h) + l 4 s n d + 2 v h

    Args:
        whole_scores: whether all s x s scores are worked out, as without flash attention; otherwise the causal half.
    """
    h, f = a.hidden_size, a.ffn_hidden_size
    heads = a.num_attention_heads * a.kv_channels
    matrices = a.qkv_rows() * h + heads * h + f * h * (3 if a.gated_linear_unit else 2)
    return 2 * a.num_layers * matrices + a.num_layers * _scores(a, seq_length, whole_scores) + 2 * a.vocab_size * h


def _scores(a: Architecture, s: int, whole: bool) -> float:
    """Q K^T and the product with V: 2 s n d each, for the keys that a token looks at."""
    if whole:
        keys = float(s)
    else:
        window = min(a.sliding_window or s, s)
        keys = (window * (window + 1) / 2 + (s - window) * window) / s  # mean over the sequence's tokens
    return 4 * keys * a.num_attention_heads * a.kv_channels


def training_flops(a: Architecture, seq_length: int, *, whole_scores: bool) -> float:
    """Forward and backward: each product has two gradients of its own size."""
    return 3 * forward_flops(a, seq_length, whole_scores=whole_scores)


def moment_flops(a: Architecture) -> float:
    """Second moments of what the linear layers read, while scoring: 2 l (2 h^2 + (n d)^2 + f^2) + 2 h^2."""
    h, f, heads = a.hidden_size, a.ffn_hidden_size, a.num_attention_heads * a.kv_channels
    return 2 * a.num_layers * (2 * h**2 + heads**2 + f**2) + 2 * h**2


def stage_flops(
    stage: str,
    teacher: Architecture,
    student: Architecture | None,
    seq_length: int,
    *,
    whole_scores: bool,
    statistics: bool = True,
) -> float:
    """A token of `stage`: the teacher's training (finetune), its layers' forward pass and second moments (prune's
    scoring), or the student's training with the teacher's forward pass (distill)."""
    forward = forward_flops(teacher, seq_length, whole_scores=whole_scores)
    if stage == "finetune":
        return 3 * forward
    if stage == "prune":
        output = 2 * teacher.vocab_size * teacher.hidden_size
        return forward - output + (moment_flops(teacher) if statistics else 0)
    return forward + training_flops(student, seq_length, whole_scores=whole_scores)
