"""Logits and losses: what the last pipeline stage keeps of them and needs for a moment.

Legend: t tokens of a micro batch, c tokens of a chunk, v vocabulary rows of this rank, h hidden (student's or the
model's), k hidden (teacher's). All in bytes of one rank.
"""

from typing import NamedTuple

from nemo_minitron.architecture import Architecture
from nemo_minitron.planning.activations import FP32
from nemo_minitron.planning.run import Run

#: As in nemo_minitron.distillation: bytes of a chunk's logits and its tokens at least, and bytes of a block in float32
#: (on a CPU for each thread).
CPU_CHUNK, CUDA_CHUNK = 64 << 20, 1 << 30
CHUNK_TOKENS = 128
CPU_BLOCK, CUDA_BLOCK = 4 << 20, 64 << 20
BLOCKS = 3


class LossWork(NamedTuple):
    """Bytes while the loss is worked out in the forward pass, and while its gradient goes through the output layer."""

    forward: int
    backward: int

    @property
    def most(self) -> int:
        return max(self)


def language_model(a: Architecture, run: Run) -> LossWork:
    """Megatron's cross entropy: logits, a float32 copy of them where they are bf16, which becomes the softmax in place
    and then the gradient; then the output weight's and the hidden states' gradients."""
    t, v, e = run.tokens, a.vocab_size // run.layout.tensor_parallel, run.bytes
    copy = FP32 * v * t if e != FP32 else 0
    gradients = e * v * a.hidden_size + e * a.hidden_size * t
    return LossWork(forward=e * v * t + copy, backward=e * v * t + max(copy, gradients))


def distillation(teacher: Architecture, student: Architecture, run: Run) -> LossWork:
    """Both models' logits and their divergence, in the output layer's place or on whole logits."""
    return _fused(teacher, student, run) if run.fused_loss else _chunked(student, run)


def _fused(teacher: Architecture, student: Architecture, run: Run) -> LossWork:
    """Logits of a chunk, both models'; the gradients are there when forward ends."""
    t, v, e = run.tokens, student.vocab_size // run.layout.tensor_parallel, run.bytes
    chunk = min(t, max(CHUNK_TOKENS, (CUDA_CHUNK if run.layout.cuda else CPU_CHUNK) // (2 * v * e)))
    gradients = e * v * student.hidden_size + e * student.hidden_size * t
    states = e * teacher.hidden_size * t
    return LossWork(forward=gradients + states + 2 * chunk * v * e + _blocks(chunk, v, run), backward=gradients)


def _chunked(student: Architecture, run: Run) -> LossWork:
    """Whole logits of both, and a copy of the student's for the cross entropy that is shown; the gradient overwrites
    the student's logits."""
    t, v, e = run.tokens, student.vocab_size // run.layout.tensor_parallel, run.bytes
    shown = e * v * t + (FP32 * v * t if e != FP32 else 0)
    gradients = e * v * student.hidden_size + e * student.hidden_size * t
    return LossWork(
        forward=2 * e * v * t + max(shown, _blocks(t, v, run)),
        backward=2 * e * v * t + max(gradients, _blocks(t, v, run)),
    )


def _blocks(tokens: int, v: int, run: Run) -> int:
    """The loss's float32 buffers."""
    size = CUDA_BLOCK if run.layout.cuda else CPU_BLOCK * run.threads
    return BLOCKS * max(1, min(tokens, size // (v * FP32))) * v * FP32
