"""Divergences of two softmax distributions, block by block, over a vocabulary that ranks may share: the arithmetic.

Legend: t tokens, r tokens of a block, v vocabulary rows of this rank.

    a = teacher / T,  p = softmax(a),  b = student / T,  q = softmax(b); sums run over the whole vocabulary

    forward_kl           KL(p||q) = sum p (log p - log q)      d/db  q - p
    soft_cross_entropy   H(p, q) = -sum p log q                d/db  q - p
    reverse_kl           KL(q||p) = sum q (log q - log p)      d/db  q (log q - log p - KL(q||p))
    jensen_shannon       beta KL(p||m) + (1 - beta) KL(q||m)   d/db  (1 - beta) q (log q - log m - KL(q||m))
                         with m = beta p + (1 - beta) q

One pass over the logits gives each token's maxima and the sums relative to them. Ranks that share the vocabulary
exchange those alone: one all-reduce of maxima and one of sums for all tokens (Jensen-Shannon: one more). The gradient
takes the exponentials anew. float32 (float64 for float64 logits) exists for one block of tokens at a time.

Logarithms are to base 2 inside, values in nats outside: PyTorch's exp2 takes a quarter of its exp's time on a CPU.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.distillation.losses import compiled
from nemo_minitron.distillation.losses.compiled import FLOOR, LN2
from nemo_minitron.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon", "soft_cross_entropy")
#: Bytes of a block: on a CPU, for each thread, what its cache holds; on CUDA, what outlasts a kernel's launch.
CPU_BLOCK, CUDA_BLOCK = 4 << 20, 64 << 20


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Which divergence, at which temperature.

    Attributes:
        kind: one of KINDS.
        temperature: T.
        beta: the teacher's share of the mixture in jensen_shannon.
    """

    kind: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        problems = [] if self.kind in KINDS else [f"kind = {self.kind!r} is none of {', '.join(KINDS)}"]
        if not 0 < self.temperature < math.inf:
            problems.append(f"temperature = {self.temperature} must be above 0 and finite")
        if self.kind == "jensen_shannon" and not 0 < self.beta < 1:
            problems.append(f"beta = {self.beta} must lie between 0 (forward_kl) and 1 (reverse_kl)")
        if problems:
            raise ConfigError(problems, "distillation loss")

    @property
    def buffers(self) -> int:
        """Blocks in the accumulation dtype that it needs at once."""
        return 4 if self.kind == "jensen_shannon" else 3

    @property
    def scale(self) -> float:
        """Of logits, to base 2: log2 e / T."""
        return 1 / (LN2 * self.temperature)


@dataclasses.dataclass(frozen=True)
class Normaliser:
    """log2 sum exp(z / T) of each token's logits z, as top + log_sum [t] each, which keep their precision apart."""

    top: Tensor
    log_sum: Tensor

    def __getitem__(self, rows: slice) -> "Normaliser":
        return Normaliser(self.top[rows], self.log_sum[rows])


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the pass over the logits measured.

    Attributes:
        value: the divergence of each token [t], in nats.
        student, teacher: the normalisers.
        student_part: KL(q||m) [t], for jensen_shannon, in nats.
    """

    value: Tensor
    student: Normaliser
    teacher: Normaliser
    student_part: Tensor | None = None


class Workspace:
    """The buffers [r, v] of a block in the accumulation dtype, made once for all blocks, when they are first needed."""

    def __init__(self, logits: Tensor, buffers: int):
        self.tokens, self.vocabulary = logits.shape
        self.device, self.count = logits.device, buffers
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        size = CUDA_BLOCK if logits.is_cuda else CPU_BLOCK * torch.get_num_threads()
        self.rows = max(1, min(self.tokens, size // (self.vocabulary * self.dtype.itemsize)))

    @functools.cached_property
    def buffers(self) -> list[Tensor]:
        shape = (self.rows, self.vocabulary)
        return [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(self.count)]

    def blocks(self, tokens: int, first: int = 0) -> Iterator[tuple[slice, list[Tensor]]]:
        """The tokens of each block from `first` on, and the buffers cut to as many."""
        for start in range(first, tokens, self.rows):
            stop = min(tokens, start + self.rows)
            yield slice(start, stop), [buffer[: stop - start] for buffer in self.buffers]

    def free(self, rows: int) -> Tensor:
        """A buffer [r, v] that no gradient lies in."""
        return (
            self.buffers[0][:rows]
            if rows <= self.rows
            else torch.empty((rows, self.vocabulary), dtype=self.dtype, device=self.device)
        )

    def compiled_blocks(self, tokens: int) -> Iterator[slice]:
        """The tokens of each block of a compiled pass, which needs no buffers."""
        rows = max(1, compiled.ELEMENTS // self.vocabulary)
        return (slice(start, min(tokens, start + rows)) for start in range(0, tokens, rows))


def measure(student: Tensor, teacher: Tensor, d: Divergence, group: "ProcessGroup | None", work: Workspace) -> Measured:
    """The divergence and the normalisers of each token; logits [t, v] are this rank's part of the vocabulary."""
    student_leads = d.kind == "reverse_kl"
    lead, other = (student, teacher) if student_leads else (teacher, student)
    tops, sums = _sums(lead, other, d, work)
    if group is not None:
        _over_vocabulary(tops, sums, entropy=d.kind != "soft_cross_entropy", group=group)
    logs = sums[:2].log2()
    norms = [Normaliser(top, log) for top, log in zip(tops, logs)]
    student_norm, teacher_norm = norms if student_leads else reversed(norms)
    if d.kind == "jensen_shannon":
        parts = _mixture_parts(student, teacher, student_norm, teacher_norm, d, work)
        if group is not None:
            torch.distributed.all_reduce(parts, group=group)
        parts *= LN2
        return Measured(d.beta * parts[0] + (1 - d.beta) * parts[1], student_norm, teacher_norm, parts[1])
    value = sums[2] / sums[0] + logs[1]
    if d.kind != "soft_cross_entropy":
        value -= logs[0]
    return Measured(value * LN2, student_norm, teacher_norm)


def _sums(lead: Tensor, other: Tensor, d: Divergence, work: Workspace) -> tuple[Tensor, Tensor]:
    """This rank's maxima [2, t] and sums of 2^lead, 2^other and the expectation, relative to them [3, t]."""
    if compiled.compiles(lead.device, d.kind):
        blocks = [
            compiled.run(compiled.sums, lead[r], other[r], d.scale, d.kind) for r in work.compiled_blocks(len(lead))
        ]
        if None not in blocks:
            return torch.cat([top for top, _ in blocks], dim=1), torch.cat([total for _, total in blocks], dim=1)
    tops = torch.empty(2, len(lead), dtype=work.dtype, device=lead.device)
    sums = torch.zeros(3, len(lead), dtype=work.dtype, device=lead.device)
    for rows, (x, y, weight, *_) in work.blocks(len(lead)):
        tops[0, rows] = centred(lead[rows], d.scale, out=x)
        tops[1, rows] = centred(other[rows], d.scale, out=y)
        sums[0, rows] = torch.exp2(x, out=weight).sum(dim=-1)
        # nansum: 0 * inf, of entries without probability, counts as 0
        if d.kind == "soft_cross_entropy":
            sums[2, rows] = -weight.mul_(y).nansum(dim=-1)
        elif d.kind != "jensen_shannon":
            sums[2, rows] = x.sub_(y).mul_(weight).nansum(dim=-1)
        sums[1, rows] = y.exp2_().sum(dim=-1)
    return tops, sums


def normaliser(logits: Tensor, scale: float, group: "ProcessGroup | None", work: Workspace) -> Normaliser:
    """log2 sum 2^(scale z) of each token's logits z [t, v] over the whole vocabulary."""
    top = torch.empty(logits.shape[0], dtype=work.dtype, device=logits.device)
    total = torch.empty_like(top)
    for rows, (x, *_) in work.blocks(len(logits)):
        top[rows] = centred(logits[rows], scale, out=x)
        total[rows] = x.exp2_().sum(dim=-1)
    if group is not None:
        local = top.clone()
        torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX, group=group)
        total *= (local - top).exp2()
        torch.distributed.all_reduce(total, group=group)
    return Normaliser(top, total.log2())


def add_to_mixture(
    mixture: Tensor, logits: Tensor, weight: float, d: Divergence, group: "ProcessGroup | None", work: Workspace
) -> None:
    """Adds weight softmax(logits / T) to the probabilities whose log2 `mixture` [t, v] is, in place."""
    norm = normaliser(logits, d.scale, group, work)
    for rows, (x, *_) in work.blocks(len(logits)):
        log_probabilities(logits[rows], d.scale, norm[rows], out=x).add_(math.log2(weight))
        torch.logaddexp2(mixture[rows], x, out=mixture[rows])


def log_probabilities(logits: Tensor, scale: float, norm: Normaliser, out: Tensor) -> Tensor:
    """log2 of the probabilities of a block [r, v], in `out`."""
    torch.add(-norm.top.unsqueeze(-1), _loaded(logits, out), alpha=scale, out=out)
    return out.sub_(norm.log_sum.unsqueeze(-1))


def scaled_gradient(
    student: Tensor,
    teacher: Tensor,
    measured: Measured,
    scale: Tensor,
    d: Divergence,
    work: Workspace,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each block, and d value / d b times each row's scale [t] there [r, v].

    A block is valid until the next one is asked for; by then it may have been written over the student's logits.

    Args:
        dtype: of the blocks at least; None: a block may be rounded to the logits' own.
    """
    first = 0
    if compiled.compiles(student.device, d.kind):
        norms = torch.stack(
            (measured.student.top, measured.student.log_sum, measured.teacher.top, measured.teacher.log_sum)
        )
        for rows in work.compiled_blocks(len(student)):
            block = compiled.run(
                compiled.gradient, student[rows], teacher[rows], norms[:, rows], measured.value[rows], scale[rows],
                d.scale, d.kind, dtype or student.dtype,
            )  # fmt: skip
            if block is None:
                break
            first = rows.stop
            yield rows, block
    for rows, buffers in work.blocks(len(student), first):
        block = logit_gradient(student, teacher, measured, rows, d, buffers)
        yield rows, scale_rows(block, scale[rows])


def scale_rows(block: Tensor, scale: Tensor) -> Tensor:
    """block [r, v] times scale [r], in place; a scale of 0 gives 0 whatever the block holds."""
    block.mul_(scale.unsqueeze(-1))
    if block.is_cuda:  # without a synchronisation
        return block.masked_fill_(scale.unsqueeze(-1) == 0, 0.0)
    block[scale == 0] = 0.0
    return block


def logit_gradient(
    student: Tensor, teacher: Tensor, measured: Measured, rows: slice, d: Divergence, buffers: list[Tensor]
) -> Tensor:
    """d value / d b of the block `rows` [r, v], in buffers[1]; logits are whole [t, v]."""
    x, y, z, *more = buffers
    log_probabilities(teacher[rows], d.scale, measured.teacher[rows], out=x)
    log_probabilities(student[rows], d.scale, measured.student[rows], out=y)
    if d.kind in ("forward_kl", "soft_cross_entropy"):
        return y.exp2_().sub_(x.exp2_())
    if d.kind == "reverse_kl":
        torch.exp2(y, out=z)
        y.sub_(x).mul_(LN2).sub_(measured.value[rows].unsqueeze(-1)).mul_(z)
    else:
        weight = _log_mixture(x, y, d.beta, out=z, scratch=more[0])
        assert measured.student_part is not None
        y.sub_(z).mul_(LN2).sub_(measured.student_part[rows].unsqueeze(-1)).mul_(weight)
    return y.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)


def centred(logits: Tensor, scale: float, out: Tensor) -> Tensor:
    """logits * scale - their maximum [r, v], in `out`; returns the maximum [r]."""
    source = _loaded(logits, out)
    top = source.amax(dim=-1).to(out.dtype).mul_(scale).clamp_(min=FLOOR)
    torch.add(-top.unsqueeze(-1), source, alpha=scale, out=out)
    return top


def _loaded(logits: Tensor, buffer: Tensor) -> Tensor:
    """The logits as elementwise kernels take them fastest: on a CPU, in the buffer's dtype."""
    return logits if logits.is_cuda or logits.dtype == buffer.dtype else buffer.copy_(logits)


def _over_vocabulary(tops: Tensor, sums: Tensor, entropy: bool, group: "ProcessGroup | None") -> None:
    """Turns sums relative to this rank's maxima into sums over all ranks relative to the common ones, in place.

    With x' = x + d_x and y' = y + d_y: sum 2^x' (x' - y') = 2^d_x (sum 2^x (x - y) + (d_x - d_y) sum 2^x).
    """
    local = tops.clone()
    torch.distributed.all_reduce(tops, op=torch.distributed.ReduceOp.MAX, group=group)
    shift = local - tops
    sums[2] += sums[0] * ((shift[0] if entropy else 0.0) - shift[1])
    sums *= shift[[0, 1, 0]].exp2()
    torch.distributed.all_reduce(sums, group=group)


def _mixture_parts(
    student: Tensor, teacher: Tensor, student_norm: Normaliser, teacher_norm: Normaliser, d: Divergence, work: Workspace
) -> Tensor:
    """This rank's part of KL(p||m) and KL(q||m) of each token [2, t], to base 2."""
    parts = torch.empty(2, len(student), dtype=work.dtype, device=student.device)
    for rows, (x, y, mixture, scratch) in work.blocks(len(student)):
        log_probabilities(teacher[rows], d.scale, teacher_norm[rows], out=x)
        log_probabilities(student[rows], d.scale, student_norm[rows], out=y)
        _log_mixture(x, y, d.beta, out=mixture, scratch=scratch)
        for index, log_own in enumerate((x, y)):
            torch.exp2(log_own, out=scratch)
            parts[index, rows] = log_own.sub_(mixture).mul_(scratch).nansum(dim=-1)
    return parts


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float, out: Tensor, scratch: Tensor) -> Tensor:
    """log2(beta p + (1 - beta) q) in `out`; returns (1 - beta) q, in `scratch`."""
    torch.exp2(log_q, out=scratch).mul_(1 - beta)
    torch.exp2(log_p, out=out).mul_(beta).add_(scratch).log2_()
    return scratch
