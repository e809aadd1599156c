"""Divergences of whole logits as autograd functions that never hold a float32 copy of them.

Legend: t tokens, v vocabulary rows of this rank, k teacher's entries kept.

Forward keeps two numbers a token and model; backward takes the softmaxes anew and writes the gradient once, in the
logits' dtype, with each token's upstream gradient applied before rounding. Writing the gradient in forward would save
half of the exponentials, a quarter of the time on a CPU; but it would round before the upstream gradient is known, cost
evaluation as much as training, and make ranks exchange their sums block by block.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_minitron.distillation.losses.divergences import (
    Divergence,
    Measured,
    Normaliser,
    Workspace,
    measure,
    scaled_gradient,
)
from nemo_minitron.distillation.losses.sparse import Kept, kept_gradient, measure_kept
from nemo_minitron.distillation.losses.targets import Sparse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LogitsDivergence(torch.autograd.Function):
    """Student's and teacher's logits [..., v] -> divergence a token [...]."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, d: Divergence, group: "ProcessGroup | None", overwrite: bool
    ) -> Tensor:
        work = Workspace(_rows(student), d.buffers)
        measured = measure(_rows(student), _rows(teacher), d, group, work)
        norms = (measured.student.top, measured.student.log_sum, measured.teacher.top, measured.teacher.log_sum)
        ctx.save_for_backward(student, teacher, *norms, measured.value, measured.student_part)
        ctx.divergence, ctx.overwrite = d, overwrite
        return measured.value.view(student.shape[:-1]).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, top, log_sum, teacher_top, teacher_log_sum, value, part = ctx.saved_tensors
        d = ctx.divergence
        measured = Measured(value, Normaliser(top, log_sum), Normaliser(teacher_top, teacher_log_sum), part)
        gradient = _gradient_buffer(student, ctx.overwrite)
        into, rows_s, rows_t = gradient.view(-1, student.shape[-1]), _rows(student), _rows(teacher)
        work = Workspace(rows_s, d.buffers)
        scale = upstream.reshape(-1).to(work.dtype) / d.temperature
        for rows, block in scaled_gradient(rows_s, rows_t, measured, scale, d, work):
            into[rows] = block
        return gradient, None, None, None, None


class SparseDivergence(torch.autograd.Function):
    """Student's logits [..., v] and a teacher's entries [..., k] -> divergence a token [...]."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Sparse, d: Divergence, group: "ProcessGroup | None", overwrite: bool
    ) -> Tensor:
        logits = _rows(student)
        work = Workspace(logits, 1)
        kept = Kept.of(teacher, d.kind, logits.shape[-1], work.dtype, group)
        measured = measure_kept(logits, kept, d.scale, group, work)
        ctx.save_for_backward(student)
        ctx.kept, ctx.measured, ctx.divergence, ctx.overwrite = kept, measured, d, overwrite
        return measured.value.view(student.shape[:-1]).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (student,), d = ctx.saved_tensors, ctx.divergence
        gradient = _gradient_buffer(student, ctx.overwrite)
        into, logits = gradient.view(-1, student.shape[-1]), _rows(student)
        work = Workspace(logits, 1)
        scale = upstream.reshape(-1).to(work.dtype) / d.temperature
        for rows, (block,) in work.blocks(len(logits)):
            into[rows] = kept_gradient(logits, ctx.kept, ctx.measured, rows, scale, d.scale, out=block)
        return gradient, None, None, None, None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _gradient_buffer(student: Tensor, overwrite: bool) -> Tensor:
    """Where the gradient goes: over the logits themselves where allowed.

    The detached alias shares their version counter: whoever else saved the logits for backward and comes later is told
    so by autograd.
    """
    if overwrite and student.is_contiguous():
        return student.detach()
    return torch.empty_like(student, memory_format=torch.contiguous_format)
