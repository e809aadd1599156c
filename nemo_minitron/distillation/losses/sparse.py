"""Divergences from some entries of a teacher's distribution, over a vocabulary that ranks may share: the arithmetic.

Legend: t tokens, r tokens of a block, v vocabulary rows of this rank, k entries kept.

    p_i the entries' probabilities, r that of all others together (0 of drawn ones), m = sum_i p_i + r (1 but for
    rounding), q = softmax(b), b = student / T, R = sum of the others' q

    value = c - sum_i p_i log q_i - r log R, with a number c that no student changes (`Kept.of`)

    d value / d b    m q_i - p_i               of an entry kept
                     (m R - r) q_j / R         of any other

R is summed over the others themselves, and never is 1 - sum_i q_i. One pass over the logits gives its maximum and sum;
ranks that share the vocabulary exchange them with the entries' own, in one all-reduce of maxima and one of sums.
Logarithms are to base 2 inside, values in nats outside, as in `divergences`.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_minitron.distillation.losses.compiled import FLOOR, LN2
from nemo_minitron.distillation.losses.divergences import (
    Normaliser,
    Workspace,
    centred,
    log_probabilities,
    scale_rows,
)
from nemo_minitron.distillation.losses.targets import Sparse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclasses.dataclass(frozen=True)
class Kept:
    """A teacher's entries as rows of this rank.

    Attributes:
        rows: row in this rank's part of the vocabulary; 0 where the entry is not there [t, k].
        own: which are there, and are used [t, k].
        p: probabilities; 0 where a place is not used [t, k].
        rest: r [t].
        constant: c, in nats [t].
    """

    rows: Tensor
    own: Tensor
    p: Tensor
    rest: Tensor
    constant: Tensor

    @classmethod
    def of(
        cls, teacher: Sparse, kind: str, vocabulary: int, dtype: torch.dtype, group: "ProcessGroup | None"
    ) -> "Kept":
        """From [..., k], in `dtype`.

        c is -H(p) of the whole distribution for drawn entries and sum_i p_i log p_i + r log r for the largest, whatever
        the others are, so that the value is KL(p||q); for soft_cross_entropy H(p) more. It is inf where an entry is
        outside the vocabulary.

        Args:
            kind: forward_kl or soft_cross_entropy.
            vocabulary: rows of each rank.
        """
        entries, p = teacher.entries.flatten(0, -2), teacher.probabilities.flatten(0, -2).to(dtype)
        entropy = teacher.entropy.flatten().to(dtype)
        rest = torch.zeros_like(entropy) if teacher.rest is None else teacher.rest.flatten().to(dtype)
        known = entropy if teacher.rest is None else torch.special.entr(p).sum(dim=-1) + torch.special.entr(rest)
        constant = entropy - known if kind == "soft_cross_entropy" else -known
        rows, own = local_entries(entries, vocabulary, group)
        ranks = 1 if group is None else torch.distributed.get_world_size(group)
        outside = (p > 0) & ((entries < 0) | (entries >= vocabulary * ranks))
        return cls(rows, own & (p > 0), p, rest, constant.masked_fill(outside.any(dim=-1), torch.inf))

    def __getitem__(self, rows: slice) -> "Kept":
        return Kept(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class SparseMeasured:
    """What the pass over the logits measured.

    Attributes:
        value: the divergence of each token [t], in nats.
        student: the normaliser over all entries.
        others: that over those that are not kept.
        at_kept: d value / d b of this rank's entries kept, 0 elsewhere [t, k].
        at_others: that of all others together [t].
    """

    value: Tensor
    student: Normaliser
    others: Normaliser
    at_kept: Tensor
    at_others: Tensor


def measure_kept(
    student: Tensor, kept: Kept, scale: float, group: "ProcessGroup | None", work: Workspace
) -> SparseMeasured:
    """The divergence of each token and what its gradient needs; logits [t, v] are this rank's part of the vocabulary.

    Args:
        scale: of logits, to base 2.
    """
    tops, logits, others = _relative(student, kept, scale, work)
    if group is not None:
        local = tops[0].clone()
        torch.distributed.all_reduce(tops, op=torch.distributed.ReduceOp.MAX, group=group)
        others *= (local - tops[0]).exp2()
    top = tops.amax(dim=0)
    logits -= top.unsqueeze(-1)
    cross = torch.where(kept.own, kept.p * logits, 0.0).sum(dim=-1)
    sums = torch.stack((others, logits.exp2().sum(dim=-1), cross))
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    others, of_kept, cross = sums
    below = tops[0] - top
    log_sum = (others * below.exp2() + of_kept).log2()
    log_rest = below + others.log2() - log_sum
    of_rest = torch.where(kept.rest > 0, kept.rest * log_rest, 0.0)
    p_sum = kept.p.sum(dim=-1)
    mass = p_sum + kept.rest
    q = (logits - log_sum.unsqueeze(-1)).exp2()
    return SparseMeasured(
        value=kept.constant - (cross - p_sum * log_sum + of_rest) * LN2,
        student=Normaliser(top, log_sum),
        # Where there are no others the sum is 0, and no logit is left to normalise.
        others=Normaliser(tops[0], others.clamp(min=1.0).log2()),
        at_kept=torch.where(kept.own, mass.unsqueeze(-1) * q - kept.p, 0.0),
        at_others=mass * log_rest.exp2() - kept.rest,
    )


def _relative(student: Tensor, kept: Kept, scale: float, work: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima of this rank's others and entries kept [2, t], the latter [t, k], and the others' sum of 2^x [t].

    Logits are scaled, those of entries that are not there -inf; the sum is relative to the others' maximum.
    """
    tops = torch.empty(2, len(student), dtype=work.dtype, device=student.device)
    total = torch.empty_like(tops[0])
    for rows, (x, *_) in work.blocks(len(student)):
        tops[0, rows] = centred(_others(student[rows], kept[rows], out=x), scale, out=x)
        total[rows] = x.exp2_().sum(dim=-1)
    logits = torch.where(kept.own, student.gather(1, kept.rows).to(work.dtype) * scale, -torch.inf)
    tops[1] = logits.amax(dim=-1).clamp_(min=FLOOR)
    return tops, logits, total


def kept_gradient(
    student: Tensor, kept: Kept, measured: SparseMeasured, rows: slice, scale: Tensor, logit_scale: float, out: Tensor
) -> Tensor:
    """d value / d b of the block `rows` times each row's scale [r, v], in `out`; all else is whole [t, ...].

    Args:
        scale: of each row [t]; where it is 0 the gradient is, whatever the logits hold.
        logit_scale: of logits, to base 2.
    """
    scale, kept = scale[rows], kept[rows]
    of_others, of_kept = (
        torch.where(_like(scale, part) == 0, 0.0, part * _like(scale, part))
        for part in (measured.at_others[rows], measured.at_kept[rows])
    )
    log_probabilities(_others(student[rows], kept, out), logit_scale, measured.others[rows], out=out).exp2_()
    return scale_rows(out, of_others).scatter_add_(1, kept.rows, of_kept)


def local_entries(entries: Tensor, vocabulary: int, group: "ProcessGroup | None") -> tuple[Tensor, Tensor]:
    """Vocabulary entries as rows of this rank's part (0 where they are another's), and which are this rank's."""
    first = vocabulary * torch.distributed.get_rank(group) if group is not None else 0
    own = (entries >= first) & (entries < first + vocabulary)
    return torch.where(own, entries - first, 0), own


def _others(logits: Tensor, kept: Kept, out: Tensor) -> Tensor:
    """The logits [r, v] with -inf for what is kept, in `out`."""
    hidden = torch.where(kept.own, -torch.inf, 0.0).to(out.dtype)
    return out.copy_(logits).scatter_add_(1, kept.rows, hidden)


def _like(scale: Tensor, part: Tensor) -> Tensor:
    """A scale a row [r] beside a part [r] or [r, k]."""
    return scale.view(-1, *[1] * (part.dim() - 1))
