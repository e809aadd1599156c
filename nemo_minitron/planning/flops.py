"""Floating-point operations of a token: the matrix products, a multiplication and an addition each counting as one.

Legend: s sequence, l layers, h hidden, f FFN, n heads, g query groups, d head size, v vocabulary rows.
"""

from nemo_minitron.architecture import Architecture

#: Of the scan of blocks (importance.blocks): the share of samples that is held out, and ridges that are tried on it.
HELD_OUT, RIDGES = 0.25, 5


def forward_flops(a: Architecture, seq_length: int) -> float:
    """Forward pass of one token among `seq_length`.

        2 l ((n + 2g) d h + n d h + (2 or 1) f h + f h) + l 4 k n d + 2 v h

    k are the keys that a token looks at: (s + 1) / 2 on average, or as many as its window lets it.
    """
    h, f = a.hidden_size, a.ffn_hidden_size
    heads = a.num_attention_heads * a.kv_channels
    matrices = a.qkv_rows() * h + heads * h + f * h * (3 if a.gated_linear_unit else 2)
    return 2 * a.num_layers * matrices + a.num_layers * _scores(a, seq_length) + 2 * a.vocab_size * h


def _scores(a: Architecture, s: int) -> float:
    """Q K^T and the product with V: 2 k n d each, for the k keys that a token looks at."""
    window = min(a.sliding_window or s, s)
    keys = (window * (window + 1) / 2 + (s - window) * window) / s  # mean over the sequence's tokens
    return 4 * keys * a.num_attention_heads * a.kv_channels


def training_flops(a: Architecture, seq_length: int) -> float:
    """Forward and backward: each product has two gradients of its own size."""
    return 3 * forward_flops(a, seq_length)


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
    statistics: bool = True,
) -> float:
    """A token of `stage`: the teacher's training (finetune), its layers' forward pass and second moments (prune's
    scoring), or the student's training with the teacher's forward pass (distill)."""
    forward = forward_flops(teacher, seq_length)
    if stage == "finetune":
        return 3 * forward
    if stage == "prune":
        output = 2 * teacher.vocab_size * teacher.hidden_size
        return forward - output + (moment_flops(teacher) if statistics else 0)
    assert student is not None, "distill has a student"
    return forward + training_flops(student, seq_length)


def scan_flops(a: Architecture, dropped: int, blocks: int, seq_length: int, *, every_block: bool) -> float:
    """A token of the scan of blocks: the teacher's pass, each block's student from its start on, and a block's moments,
    4 h^2; the student again, on held-out samples, for each ridge.

    Args:
        dropped: layers that go.
        every_block: whether each place of a contiguous block is tried; otherwise the layers are known.
    """
    whole = forward_flops(a, seq_length)
    output = 2 * a.vocab_size * a.hidden_size
    layer = (whole - output) / a.num_layers
    left = a.num_layers - dropped
    ran = sum(range(left + 1)) * layer + blocks * output if every_block else blocks * (left / 2 * layer + output)
    return whole + ran + 4 * blocks * a.hidden_size**2 + HELD_OUT * RIDGES * (left * layer + output)


def refit_flops(teacher: Architecture, student: Architecture, seq_length: int) -> float:
    """A token of the refit in sequence (pruning.sequential): each layer of both up to its four matrices in turn, and
    whole: about 3.2 passes; and for every matrix of k inputs and m outputs its moments, 2 k (k + m)."""
    passes = sum(forward_flops(a, seq_length) - 2 * a.vocab_size * a.hidden_size for a in (teacher, student))
    a, heads = student, student.num_attention_heads * student.kv_channels
    fc1 = a.ffn_hidden_size * (2 if a.gated_linear_unit else 1)
    shapes = (
        (a.hidden_size, a.qkv_rows()), (heads, a.hidden_size), (a.hidden_size, fc1), (a.ffn_hidden_size, a.hidden_size)
    )  # fmt: skip
    return 3.2 * passes + a.num_layers * sum(2 * k * (k + m) for k, m in shapes)


def cut_flops(teacher: Architecture, student: Architecture) -> float:
    """The compensated cut: 10 h^3 for the rotation, 2 N h for every matrix, and for each layer's least squares
    f^3 + 2 f^2 h + (n d)^3 in float64; nothing to speak of where no width is cut."""
    if teacher.with_sizes(num_layers=student.num_layers) == student:
        return 2.0 * student.parameters()
    h, f, heads = teacher.hidden_size, teacher.ffn_hidden_size, teacher.num_attention_heads * teacher.kv_channels
    each = f**3 + 2 * f**2 * h + heads**3
    return 10.0 * h**3 + 2.0 * teacher.parameters() * h + student.num_layers * each
