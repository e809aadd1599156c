"""What a compensated cut puts in place of what it takes away: linear algebra on second moments.

Legend: h hidden, h' hidden of the student, f FFN, n heads, g query groups, d head size, v vocabulary rows, k any width,
k' what stays of it; C = E[x x^T] over calibration tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_minitron.pruning.ridge import ridge

if TYPE_CHECKING:
    from torch import Tensor


def gain_groups(gain: Tensor, tolerance: float) -> list[Tensor]:
    """Channels whose gains are so alike that a rotation may mix them: indices, each channel in one group.

    A tied output layer makes E diag(G) n of a normalised stream n, and E is the embedding as well, so that G cannot be
    folded into it. G commutes with a rotation that mixes only channels of equal gain: E diag(G) n = E P diag(G') P^T n,
    P made of one rotation a group, G' its gains. What is within `tolerance` of a common value is taken for equal.

    The largest group is formed first, then the largest of what is left: of all windows [c (1 - t), c (1 + t)] the one
    that holds the most channels. Gains of two signs are never in one group; zeros are one of their own.

    Args:
        gain: the final norm's, as it multiplies [h].
        tolerance: t, 0 to 1; with 0 only equal gains share a group.
    """
    import torch

    gain, groups = gain.double(), []
    reach = (1 + tolerance) / (1 - tolerance) if tolerance < 1 else float("inf")
    for sign in (1.0, 0.0, -1.0):
        left = (gain.sign() == sign).nonzero().flatten()
        left = left[gain[left].abs().argsort(stable=True)]
        while len(left):
            sizes = gain[left].abs()
            ends = torch.searchsorted(sizes, sizes * reach if sign else sizes, right=True)
            first = int((ends - torch.arange(len(left))).argmax())
            group = slice(first, int(ends[first]))
            groups.append(left[group].sort().values)
            left = torch.cat([left[: group.start], left[group.stop :]])
    return groups


def stream_basis(pooled: Tensor, size: int, centred: bool, groups: Sequence[Tensor] | None = None) -> Tensor:
    """The directions P [h, h'] of the residual stream that stay: x' = P^T x, for the whole model.

    SliceGPT (arXiv 2401.15024, section 3.2), with one rotation for all layers instead of one a block, so that no matrix
    is left between them: P = the first h' eigenvectors of the pooled C, by falling eigenvalue. P^T P = I.

    With LayerNorm the stream is centred, and must stay so for the norm to commute with the rotation: P = U R, U the
    first h' - 1 eigenvectors orthogonal to the ones vector, R [h' - 1, h'] with orthonormal rows orthogonal to it, so
    that every P^T x has mean 0. With h' = h nothing is lost but the mean, which the norms take away anyhow.

    Args:
        pooled: mean over the norms of C of their normalised inputs [h, h].
        centred: whether the norms take the mean away.
        groups: channels that may be mixed with each other (gain_groups): eigenvectors within each group, and of all of
            them the h' of largest eigenvalue; none: all channels.
    """
    import torch

    pooled = pooled.double()
    if groups is not None:
        return _grouped(pooled, size, groups)
    keep = size - 1 if centred else size
    values, vectors = torch.linalg.eigh((pooled + pooled.T) / 2)
    if centred:
        ones = torch.ones(len(pooled), dtype=torch.float64) / len(pooled) ** 0.5
        vectors, values = _without(vectors, values, ones)
    basis = vectors.flip(1)[:, :keep]
    basis = basis * _signs(basis)
    return basis @ _centred_rows(size) if centred else basis


def _grouped(pooled: Tensor, size: int, groups: Sequence[Tensor]) -> Tensor:
    """The h' eigenvectors of largest eigenvalue over all groups [h, h'], each nonzero within its group only."""
    import torch

    values, vectors = [], []
    for group in groups:
        block = pooled[group][:, group]
        eigenvalues, inside = torch.linalg.eigh((block + block.T) / 2)
        whole = torch.zeros(len(pooled), len(group), dtype=torch.float64)
        whole[group] = inside
        values.append(eigenvalues)
        vectors.append(whole)
    order = torch.cat(values).argsort(descending=True, stable=True)[:size]
    basis = torch.cat(vectors, dim=1)[:, order]
    return basis * _signs(basis)


def _without(vectors: Tensor, values: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors, the one along `direction` left out and the others exactly orthogonal to it."""
    import torch

    along = int((vectors.T @ direction).abs().argmax())
    others = [index for index in range(len(values)) if index != along]
    rest = vectors[:, others]
    rest = rest - torch.outer(direction, direction @ rest)
    orthonormal, triangular = torch.linalg.qr(rest.flip(1))  # the leading ones change least
    return (orthonormal * triangular.diagonal().sign()).flip(1), values[others]


def _signs(basis: Tensor) -> Tensor:
    """Signs that make the largest element of each column positive, so that the same moments give the same basis."""
    largest = basis.abs().argmax(dim=0, keepdim=True)
    return basis.gather(0, largest).sign()


def _centred_rows(size: int) -> Tensor:
    """R [size - 1, size]: orthonormal rows, each with sum 0 (Helmert)."""
    import torch

    rows = torch.zeros(size - 1, size, dtype=torch.float64)
    for number in range(1, size):
        rows[number - 1, :number] = 1
        rows[number - 1, number] = -number
        rows[number - 1] /= (number * (number + 1)) ** 0.5
    return rows


def norm_gain(moments: Tensor, basis: Tensor) -> float:
    """The scale g of a student's norm: g^2 = (tr(P^T C P) / h') / (tr(C) / h), so 1 where all directions stay.

    The student's norm makes the h' directions that stay of mean square 1 whatever they had in the teacher; g gives that
    back on average.
    """
    moments = moments.double()
    kept, width = ((moments @ basis) * basis).sum() / basis.shape[1], len(moments)
    return float(kept / (moments.diagonal().sum() / width)) ** 0.5


def reader_map(moments: Tensor, basis: Tensor, strength: float) -> Tensor:
    """M [h, h'] of W M, which reads P^T x as W reads x: least squares over the norm's own inputs.

    M = P + (I - P P^T) C P (P^T C P + lambda I)^-1. The second term reads what was lost from what stayed; C pooled over
    all norms has none of it, that of one norm has.
    """
    moments = moments.double()
    kept = moments @ basis  # [h, h'] = C P
    lost = kept - basis @ (basis.T @ kept)
    return basis + ridge(basis.T @ kept, lost.T, strength).T


def columns_map(moments: Tensor, keep: Tensor, strength: float) -> Tensor:
    """X [k, k'] of W X, which makes of the k' inputs that stay what W makes of all: least squares, ridge to the cut.

    X has a 1 for each input that stays, and C_rs (C_ss + lambda I)^-1 in the rows of those that go; s stay, r go.
    """
    import torch

    moments = moments.double()
    gone = torch.ones(len(moments), dtype=torch.bool)
    gone[keep] = False
    columns = torch.zeros(len(moments), len(keep), dtype=torch.float64)
    columns[keep, torch.arange(len(keep))] = 1.0
    if gone.any():
        stay = moments[keep][:, keep]
        columns[gone] = ridge(stay, moments[keep][:, gone], strength).T
    return columns


def grouped_gain(gain: Tensor, basis: Tensor) -> Tensor:
    """The final norm's gain [h'] of a tied student: diag(P^T diag(G) P), of each direction the mean of its channels'.

    Exact where the gains of a group are equal (gain_groups with tolerance 0).
    """
    basis = basis.double()
    return (basis.square() * gain.double()[:, None]).sum(dim=0)


def tied_gain(embedding: Tensor, gain: Tensor, moments: Tensor, basis: Tensor, strength: float = 1e-6) -> Tensor:
    """The final norm's gain [h'] of a student whose output matrix is its embedding E' = E P.

    For LayerNorm, whose centring mixes all channels (stream_basis), so that there are no groups of equal gains.
    E diag(gain) cannot be its output matrix, since E also writes. The diagonal w that comes nearest is the least
    squares of ||E diag(gain) x - E' diag(w) P^T x|| over the norm's inputs:
    ((E'^T E') * (P^T C P)) w = diag(E'^T E diag(gain) C P), with * by elements.

    Args:
        embedding: E [v, h].
        gain: the teacher's [h].
        moments: C of the final norm [h, h].
    """
    embedding, moments = embedding.double(), moments.double()
    small = embedding @ basis  # [v, h']
    cross = small.T @ (embedding * gain.double()) @ moments @ basis  # [h', h']
    gram = (small.T @ small) * (basis.T @ moments @ basis)
    return ridge(gram, cross.diagonal()[:, None], strength).flatten()


def input_bias(weight: Tensor, bias: Tensor, student: Tensor) -> Tensor:
    """The norm's bias b' [h'] of least ||W' b' - W b||: what a reader W [k, h] made of the teacher's norm's bias b."""
    target = (weight.double() @ bias.double())[:, None]
    student = student.double()
    return ridge(student.T @ student, student.T @ target, 1e-12).flatten()


def saliency(writer: Tensor, moments: Tensor, strength: float, unit: int = 1) -> Tensor:
    """What removing each input of a matrix costs its output once the others are refitted [k / unit].

    Optimal Brain Surgeon on a linear layer: ||W a||^2 grows by tr(W_u H_u^-1 W_u^T) with H_u the block of
    (C + lambda I)^-1 that belongs to the input u (for one column: ||w_u||^2 / [(C + lambda I)^-1]_uu). Hassibi & Stork
    (1993); of blocks as in arXiv 2203.07259, section 3.

    Args:
        writer: W [m, k], which reads these inputs.
        moments: C of its inputs [k, k].
        strength: lambda over the mean of C's diagonal.
        unit: inputs that go together, one after another (a head's channels).
    """
    import torch

    writer, moments = writer.double(), moments.double()
    identity = torch.eye(len(moments), dtype=torch.float64)
    inverse = ridge(moments, identity, strength)
    if unit == 1:
        return writer.square().sum(dim=0) / inverse.diagonal()
    count = len(moments) // unit
    blocks = inverse.view(count, unit, count, unit)[torch.arange(count), :, torch.arange(count)]  # [k/u, u, u]
    columns = writer.view(len(writer), count, unit).permute(1, 2, 0)  # [k/u, u, m]
    return (torch.linalg.solve(blocks, columns) * columns).sum(dim=(1, 2))


def merged_queries(queries: Tensor, ranking: Tensor, stay: int) -> Tensor:
    """Query heads that stay, with the residual of those that go (arXiv 2407.14679, section 2.3).

    Of a group's L heads H_1 .. H_L by importance the first K stay; head i of the last L - K of them becomes
    2 H_i - H_(2K - i + 1). For grouped queries only the query projection is merged. K < L / 2 leaves nothing to pair
    the rest with; those are dropped.

    Args:
        queries: the query rows of one group's heads [L, d, h] (or their biases [L, d]).
        ranking: its heads, the most important first [L].
        stay: K.
    """
    ordered = queries[ranking]
    kept = ordered[:stay].clone()
    for i in range(max(1, 2 * stay - len(ranking) + 1), stay + 1):
        kept[i - 1] = 2 * ordered[i - 1] - ordered[2 * stay - i]
    return kept
