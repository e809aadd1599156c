"""The output layer and the divergence in one: the logits of a sequence never exist, only those of a chunk.

Legend: t tokens, c tokens of a chunk, r tokens of a block, v vocabulary rows of this rank, h hidden (student's),
g hidden (teacher's).

For each chunk: all models' logits, their divergence, its gradient in the place of the student's logits, and from that
the gradients of hidden states and output weight. So all but one factor of the gradient is ready after forward, and each
token's weight in the loss has to be known by then.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_minitron.distillation.losses.compiled import LN2
from nemo_minitron.distillation.losses.divergences import (
    Divergence,
    Measured,
    Normaliser,
    Workspace,
    add_to_mixture,
    log_probabilities,
    measure,
    normaliser,
    scale_rows,
    scaled_gradient,
)
from nemo_minitron.distillation.losses.sparse import Kept, SparseMeasured, kept_gradient, local_entries, measure_kept
from nemo_minitron.distillation.losses.targets import Dense, Sparse, check_sparse, relative

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Bytes of a chunk's logits, both models together, and tokens that a chunk has at least: more makes products faster and
#: roundings of the weight's gradient fewer, by little beyond these. On a CPU each model's are above the 32 MiB below
#: which glibc keeps freed blocks in a heap with gaps.
CPU_CHUNK, CUDA_CHUNK = 72 << 20, 1 << 30
CHUNK_TOKENS = 128
LOG2E = 1 / LN2


class FusedLoss(NamedTuple):
    """What `fused_divergence` gives; `total` alone carries a gradient.

    Attributes:
        total: kd_sum + lm_sum.
        kd_sum: sum over tokens of kd_weights times the divergence, in nats.
        lm_sum: sum over tokens of lm_weights times the cross entropy, in nats; 0 without lm_weights.
        kd: divergence of each token [t], unweighted.
        lm: language-model cross entropy of each token [t], unweighted, at temperature 1; None without labels.
    """

    total: Tensor
    kd_sum: Tensor
    lm_sum: Tensor
    kd: Tensor
    lm: Tensor | None


def fused_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teachers: Sequence[Dense] = (),
    *,
    sparse: Sequence[Sparse] = (),
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    kd_weights: Tensor | None = None,
    labels: Tensor | None = None,
    lm_weights: Tensor | None = None,
    group: "ProcessGroup | None" = None,
    reduce_hidden_grad: bool = True,
    chunk_tokens: int | None = None,
) -> FusedLoss:
    """Output layers and divergence in one; logits of at most `chunk_tokens` tokens exist at a time.

        z_s = student_hidden student_weight^T,  z_t = hidden weight^T of a teacher
        total = sum_t kd_weights D(z_t, z_s) + sum_t lm_weights (-log softmax(z_s)[label])

    Several teachers are one whose distribution is their mixture, p = sum_i share_i softmax(z_i / T), as long as all are
    dense. What is sparse has a loss of its own (`losses.sparse_divergence`); D is then the mean of the losses, that of
    the dense ones' mixture and each sparse one's, weighed by their shares. The gradient of KL(p||q) is linear in p, so
    that of the mean is that of the mixture of all; the value is the mean of the KLs, which is above the mixture's KL.

    Forward works out the gradients too, and backward scales them by the one number it is given, so weights of tokens
    (mask, mixing, T^2) go in here. The logits round to the hidden states' dtype, as an output layer's do. The output
    weight's gradient, the largest tensor here, is summed over chunks in the weight's own dtype: a product sums its
    chunk in float32 inside, so only t / chunk_tokens roundings are left. In bf16, 16 of them make the error of the
    gradient, most of which comes from the logits' rounding, 1.4 % larger; a float32 sum would take three times the
    memory, with its copy in bf16.

    Args:
        student_hidden: last hidden states, after the final norm [t, h].
        student_weight: output weight, with a group this rank's rows [v, h].
        teachers: their last hidden states and output weights; the shares of all teachers count relative to their sum.
        sparse: entries of teachers' distributions, for forward_kl and soft_cross_entropy at temperature 1 only.
        kind, beta, temperature: the divergence, see `losses.divergence`.
        kd_weights: weight of each token's divergence [t]; None: 1. A mask goes in here; where it is 0, no gradient.
        labels: next tokens, entries of the whole vocabulary [t], negative for none; None: no cross entropy.
        lm_weights: weight of each token's cross entropy [t]; None: it is not trained on.
        group: tensor-parallel group that shares the vocabulary; None: each rank has all of it.
        reduce_hidden_grad: sums the hidden states' gradient over the group. Each rank's vocabulary gives a part of it;
            Megatron's ColumnParallelLinear sums them in its backward. Pass False where the caller's own backward does,
            as gathering from sequence-parallel ranks with tensor_parallel_output_grad=True.
        chunk_tokens: tokens of a chunk; None: by memory.

    Raises:
        ValueError: shapes, dtypes, shares or the kind of divergence do not fit; there is no teacher.
    """
    _fitting_layers(student_hidden, student_weight, teachers)
    check_sparse(sparse, kind, temperature)
    weights = relative([*(one.share for one in teachers), *(one.share for one in sparse)])
    if lm_weights is not None and labels is None:
        raise ValueError("lm_weights without labels: there is no cross entropy to weigh")
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    tokens, vocabulary = len(student_hidden), len(student_weight)
    kd_weights = student_hidden.new_ones(tokens, dtype=dtype) if kd_weights is None else kd_weights.detach().to(dtype)
    lm_weights = None if lm_weights is None else lm_weights.detach().to(dtype)
    its_labels = None if labels is None else Labels.of(labels, lm_weights, vocabulary, group)
    for name, given in (
        ("kd_weights", kd_weights),
        ("labels", labels),
        ("lm_weights", lm_weights),
        *(("a sparse teacher's entropy", one.entropy) for one in sparse),
    ):
        if given is not None and given.shape != (tokens,):
            raise ValueError(f"{name} {[*given.shape]} must be [{tokens}], one a token")
    training = torch.is_grad_enabled()
    plan = Plan(
        divergence=Divergence(kind, temperature, beta),
        group=group,
        reduce_hidden_grad=reduce_hidden_grad,
        wanted=(training and student_hidden.requires_grad, training and student_weight.requires_grad),
        chunk_tokens=min(chunk_tokens or default_chunk(student_weight), max(1, tokens)),
    )
    targets = Targets(
        [one._replace(hidden=one.hidden.detach(), weight=one.weight.detach()) for one in teachers],
        [Kept.of(one, kind, vocabulary, dtype, group) for one in sparse],
        weights,
    )
    total, kd, lm = FusedDistillation.apply(student_hidden, student_weight, targets, kd_weights, its_labels, plan)
    kd_sum = weighted_sum(kd, kd_weights)
    lm_sum = torch.zeros_like(kd_sum) if lm_weights is None else weighted_sum(lm, lm_weights)
    return FusedLoss(total, kd_sum, lm_sum, kd, lm)


@dataclasses.dataclass(frozen=True)
class Labels:
    """Labels as rows of this rank.

    Attributes:
        rows: row in this rank's part of the vocabulary; 0 where the label is not there [t].
        own: which labels are there [t].
        valid: which tokens have a label at all [t].
        weights: of each token's cross entropy in the loss [t]; None: it is only shown.
    """

    rows: Tensor
    own: Tensor
    valid: Tensor
    weights: Tensor | None

    @classmethod
    def of(cls, labels: Tensor, weights: Tensor | None, vocabulary: int, group: "ProcessGroup | None") -> "Labels":
        """From entries of the whole vocabulary [t]; a negative one is no label."""
        return cls(*local_entries(labels, vocabulary, group), labels >= 0, weights)

    def __getitem__(self, rows: slice) -> "Labels":
        weights = None if self.weights is None else self.weights[rows]
        return Labels(self.rows[rows], self.own[rows], self.valid[rows], weights)


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the teachers give.

    Attributes:
        dense: hidden states and output weights.
        kept: entries of the others' distributions.
        weights: of each, dense ones first; their sum is 1.
    """

    dense: Sequence[Dense]
    kept: Sequence[Kept]
    weights: Sequence[float]

    @property
    def dense_weight(self) -> float:
        return sum(self.weights[: len(self.dense)])

    @property
    def kept_weights(self) -> Sequence[float]:
        return self.weights[len(self.dense) :]

    def __getitem__(self, rows: slice) -> "Targets":
        dense = [one._replace(hidden=one.hidden[rows]) for one in self.dense]
        return Targets(dense, [kept[rows] for kept in self.kept], self.weights)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the fused loss runs.

    Attributes:
        divergence: which.
        group: ranks that share the vocabulary; None: this rank has all of it.
        reduce_hidden_grad: whether the hidden states' gradient is summed over the group here.
        wanted: whether hidden states, and whether the output weight, want a gradient.
        chunk_tokens: tokens of a chunk.
    """

    divergence: Divergence
    group: "ProcessGroup | None"
    reduce_hidden_grad: bool
    wanted: tuple[bool, bool]
    chunk_tokens: int


class FusedDistillation(torch.autograd.Function):
    """Hidden states [t, h], output weight [v, h], targets, kd_weights [t] -> loss, kd [t], lm [t]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Targets,
        kd_weights: Tensor,
        labels: Labels | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens = len(hidden)
        student_logits = hidden.new_empty(plan.chunk_tokens, len(weight))  # [c, v]
        work = Workspace(student_logits, plan.divergence.buffers)
        buffers = [one.hidden.new_empty(student_logits.shape) for one in targets.dense[:1]]
        buffers += [torch.empty_like(student_logits, dtype=work.dtype) for _ in targets.dense[1:2]]
        kd = torch.empty(tokens, dtype=work.dtype, device=hidden.device)
        lm = None if labels is None else torch.empty_like(kd)
        grad_hidden = torch.empty_like(hidden) if plan.wanted[0] else None
        empty = torch.empty_like if tokens else torch.zeros_like
        grad_weight = empty(weight) if plan.wanted[1] else None
        for start in range(0, tokens, plan.chunk_tokens):
            chunk = slice(start, min(start + plan.chunk_tokens, tokens))
            student = torch.mm(hidden[chunk], weight.t(), out=student_logits[: chunk.stop - start])
            its_targets, its_labels = targets[chunk], None if labels is None else labels[chunk]
            teacher = _teacher_logits(its_targets, [buffer[: len(student)] for buffer in buffers], plan, work)
            kd[chunk], its_lm = _chunk(student, teacher, its_targets, kd_weights[chunk], its_labels, plan, work)
            if lm is not None and its_lm is not None:
                lm[chunk] = its_lm
            if grad_hidden is not None:
                torch.mm(student, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight.addmm_(student.t(), hidden[chunk], beta=float(start > 0))
        if grad_hidden is not None and plan.group is not None and plan.reduce_hidden_grad:
            torch.distributed.all_reduce(grad_hidden, group=plan.group)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(*(value for value in (kd, lm) if value is not None))
        loss = weighted_sum(kd, kd_weights)
        if lm is not None and labels is not None and labels.weights is not None:
            loss = loss + weighted_sum(lm, labels.weights)
        return loss, kd, lm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = [None if saved is None else saved.mul_(upstream.to(saved.dtype)) for saved in ctx.saved_tensors]
        return *gradients, None, None, None, None


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of weights times values; a weight of 0 leaves its token out, whatever the value."""
    return torch.where(weights == 0, 0.0, values * weights).sum()


def _teacher_logits(targets: Targets, buffers: Sequence[Tensor], plan: Plan, work: Workspace) -> Tensor | None:
    """The dense teachers' logits of a chunk, of several their mixture's; None where there is none.

    Args:
        buffers: [c, v] for each, one after another; and for the mixture, where there are several.
    """
    logits = (torch.mm(one.hidden, one.weight.t(), out=buffers[0]) for one in targets.dense)
    if len(buffers) < 2:
        return next(logits, None)
    d, mixture = plan.divergence, buffers[1].fill_(-torch.inf)
    for one, weight in zip(logits, targets.weights):
        add_to_mixture(mixture, one, weight / targets.dense_weight, d, plan.group, work)
    return mixture.div_(d.scale)


def _chunk(
    student: Tensor, teacher: Tensor | None, targets: Targets, kd_weights: Tensor, labels: Labels | None, plan: Plan,
    work: Workspace,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Divergence and cross entropy of each token; writes the loss's gradient over the student's logits [c, v]."""
    d, lm = plan.divergence, None
    label_weights = None if labels is None else labels.weights
    dense = None if teacher is None else measure(student, teacher, d, plan.group, work)
    kept = [measure_kept(student, one, d.scale, plan.group, work) for one in targets.kept]
    if labels is not None:
        norm = (dense or kept[0]).student if d.temperature == 1 else normaliser(student, LOG2E, plan.group, work)
        lm = _cross_entropy(student, norm, labels, plan.group)
    if any(plan.wanted):
        dtype = work.dtype if kept or label_weights is not None else None
        for rows, gradient in _kd_gradient(student, teacher, targets, dense, kept, kd_weights, d, work, dtype):
            if labels is not None and label_weights is not None:
                gradient += _label_gradient(student[rows], norm[rows], labels[rows], label_weights[rows], work)
            student[rows] = gradient
    values = [] if dense is None else [dense.value * targets.dense_weight]
    values += [measured.value * weight for measured, weight in zip(kept, targets.kept_weights)]
    return functools.reduce(torch.add, values), lm


def _kd_gradient(
    student: Tensor, teacher: Tensor | None, targets: Targets, dense: Measured | None, kept: Sequence[SparseMeasured],
    kd_weights: Tensor, d: Divergence, work: Workspace, dtype: torch.dtype | None,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """The rows of each block, and the weighted divergence's gradient there [r, v], as `scaled_gradient`."""
    if teacher is not None and dense is not None:
        scale = kd_weights / d.temperature * targets.dense_weight
        blocks = scaled_gradient(student, teacher, dense, scale, d, work, dtype)
    else:
        blocks = ((rows, buffers[1].zero_()) for rows, buffers in work.blocks(len(student)))
    scales = [kd_weights * weight for weight in targets.kept_weights]
    for rows, block in blocks:
        for one, measured, scale in zip(targets.kept, kept, scales):
            block += kept_gradient(student, one, measured, rows, scale, d.scale, out=work.free(len(block)))
        yield rows, block


def _cross_entropy(logits: Tensor, norm: Normaliser, labels: Labels, group: "ProcessGroup | None") -> Tensor:
    """-log softmax(logits)[label] of each token [c], in nats; inf for a label that no rank has, 0 for none."""
    picked = torch.add(-norm.top, logits.gather(1, labels.rows.unsqueeze(-1))[:, 0].to(norm.top.dtype), alpha=LOG2E)
    picked = torch.where(labels.own, picked, -torch.inf)
    if group is not None:
        torch.distributed.all_reduce(picked, op=torch.distributed.ReduceOp.MAX, group=group)
    return torch.where(labels.valid, (norm.log_sum - picked) * LN2, 0.0)


def _label_gradient(logits: Tensor, norm: Normaliser, labels: Labels, weights: Tensor, work: Workspace) -> Tensor:
    """The weighted cross entropy's gradient (softmax(logits) - one hot) * weight of a block [r, v]."""
    out = work.free(len(logits))
    log_probabilities(logits, LOG2E, norm, out=out).exp2_()
    out.scatter_add_(1, labels.rows.unsqueeze(-1), -labels.own.to(out.dtype).unsqueeze(-1))
    return scale_rows(out, torch.where(labels.valid, weights, 0.0))


def _fitting_layers(hidden: Tensor, weight: Tensor, teachers: Sequence[Dense]) -> None:
    """Raises ValueError where shapes or dtypes of hidden states and output weights do not fit."""
    layers = [("student", hidden, weight), *(("teacher", one.hidden, one.weight) for one in teachers)]
    shapes = ", ".join(str([*tensor.shape]) for _, *tensors in layers for tensor in tensors)
    if any(tensor.dim() != 2 for _, *tensors in layers for tensor in tensors):
        raise ValueError(f"hidden states and output weights must be matrices, not {shapes}")
    if any(len(one.hidden) != len(hidden) or len(one.weight) != len(weight) for one in teachers):
        raise ValueError(f"tokens and vocabulary must be the same for student and teacher: {shapes}")
    for name, states, layer in layers:
        if states.shape[1] != layer.shape[1] or states.dtype != layer.dtype:
            raise ValueError(
                f"{name}: hidden states {[*states.shape]} {states.dtype} and output weight {[*layer.shape]} "
                f"{layer.dtype} do not fit"
            )
    dtypes = {one.hidden.dtype for one in teachers}
    if len(dtypes) > 1:
        raise ValueError(f"teachers must be of one dtype, not {', '.join(sorted(map(str, dtypes)))}")


def default_chunk(weight: Tensor) -> int:
    """Tokens of a chunk for an output weight [v, h]."""
    size = CUDA_CHUNK if weight.is_cuda else CPU_CHUNK
    return max(CHUNK_TOKENS, size // (2 * len(weight) * weight.dtype.itemsize))
