"""Divergences of whole logits as autograd functions that never hold a float32 copy of them.

Legend: t tokens, r tokens of a block, v vocabulary rows of this rank, k teacher's entries kept.

Forward keeps two numbers a token and model; backward takes the softmaxes anew and writes the gradient once, in the
logits' dtype, with each token's upstream gradient applied before rounding. Writing the gradient in forward would save
half of the exponentials, a quarter of the time on a CPU; but it would round before the upstream gradient is known, cost
evaluation as much as training, and make ranks exchange their sums block by block.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_minitron.distillation.losses.compiled import LN2
from nemo_minitron.distillation.losses.divergences import (
    Divergence,
    Measured,
    Normaliser,
    Workspace,
    log_probabilities,
    measure,
    normaliser,
    scale_rows,
    scaled_gradient,
)

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


class TopKDivergence(torch.autograd.Function):
    """Student's logits [..., v], teacher's k log probabilities and their entries [..., k] -> KL a token [...]."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        log_p: Tensor,
        entries: Tensor,
        d: Divergence,
        group: "ProcessGroup | None",
        overwrite: bool,
    ) -> Tensor:
        logits = _rows(student)
        norm = normaliser(logits, d.scale, group, Workspace(logits, 1))
        local, own = local_entries(_rows(entries), logits.shape[-1], group)
        log_p = _rows(log_p)
        picked = torch.add(-norm.top.unsqueeze(-1), logits.gather(1, local).to(norm.top.dtype), alpha=d.scale)
        cross = torch.where(own, log_p.exp() * picked, 0.0).nansum(dim=-1)
        if group is not None:
            torch.distributed.all_reduce(cross, group=group)
        value = (log_p.exp() * log_p).nansum(dim=-1) - (cross - norm.log_sum) * LN2
        ctx.save_for_backward(student, log_p, local, own, norm.top, norm.log_sum)
        ctx.divergence, ctx.overwrite = d, overwrite
        return value.view(student.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, log_p, local, own, top, log_sum = ctx.saved_tensors
        gradient = _gradient_buffer(student, ctx.overwrite)
        into, logits, norm = gradient.view(-1, student.shape[-1]), _rows(student), Normaliser(top, log_sum)
        work = Workspace(logits, 1)
        scale = upstream.reshape(-1).to(work.dtype) / ctx.divergence.temperature
        minus_p = torch.where(own, -log_p.exp(), 0.0).to(work.dtype)
        for rows, (block,) in work.blocks(len(logits)):
            log_probabilities(logits[rows], ctx.divergence.scale, norm[rows], out=block).exp2_()
            block.scatter_add_(1, local[rows], minus_p[rows])
            into[rows] = scale_rows(block, scale[rows])
        return gradient, None, None, None, None, None


def local_entries(entries: Tensor, vocabulary: int, group: "ProcessGroup | None") -> tuple[Tensor, Tensor]:
    """Vocabulary entries as rows of this rank's part (0 where they are another's), and which are this rank's."""
    first = vocabulary * torch.distributed.get_rank(group) if group is not None else 0
    own = (entries >= first) & (entries < first + vocabulary)
    return torch.where(own, entries - first, 0), own


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
