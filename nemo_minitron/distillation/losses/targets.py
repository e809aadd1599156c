"""What a teacher answers to a batch of tokens: all of it, or of its distribution what may be kept.

Legend: t tokens, g hidden (teacher's), v vocabulary, n draws, k entries kept.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nemo_minitron.distillation.losses.api import top_k
from nemo_minitron.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Divergences that some entries of the teacher's distribution suffice for.
SPARSE_KINDS = ("forward_kl", "soft_cross_entropy")
#: Bytes of a block of float64 probabilities.
BLOCK = 64 << 20


class Dense(NamedTuple):
    """A teacher's last hidden states and output matrix, which together are its logits.

    Attributes:
        hidden: after the final norm [t, g].
        weight: output matrix, with a tensor-parallel group this rank's rows [v, g].
        share: of this teacher among several; shares count relative to their sum.
    """

    hidden: "Tensor"
    weight: "Tensor"
    share: float = 1.0


class Sparse(NamedTuple):
    """Some entries of a teacher's distribution p, at temperature 1: `drawn` from it, or its `largest`.

    Attributes:
        entries: of the whole vocabulary, each of a token's once [t, k], int64. Where the probability is 0 the place is
            not used, and the entry may be any.
        probabilities: p_i, of drawn ones their counts / n [t, k], float32.
        rest: r, what all other entries have together [t], float32; None: drawn, the others have none.
        entropy: of all of p, in nats [t], float32.
        share: of this teacher among several; shares count relative to their sum.
    """

    entries: "Tensor"
    probabilities: "Tensor"
    rest: "Tensor | None"
    entropy: "Tensor"
    share: float = 1.0


def drawn(logits: "Tensor", draws: int, generator: "torch.Generator", *, stratified: bool = True) -> Sparse:
    """n draws from p = softmax(logits) of each token, with their counts.

    counts / n is p in expectation, and so is what is linear in it: the gradient of the forward KL, and with p's entropy
    beside, its value. The draws are the inverses of p's distribution function at uniform numbers; these come from the
    CPU whatever the device is, token by token, so that blocks and batches do not change them.

    Source: arXiv 2503.16870 (Sparse Logit Sampling, ACL 2025), Random Sampling Knowledge Distillation, whose draws are
    independent.

    Args:
        logits: of the whole vocabulary [t, v].
        draws: n.
        generator: of a CPU, such as torch.Generator().manual_seed(seed of the sample) for the tokens of one sample.
        stratified: one uniform number in each of n equal parts of [0, 1) (stratified sampling): as unbiased, and no
            count is 2 or more from n p_i. False: independent ones.
    """
    import torch

    if draws < 1:
        raise ConfigError(f"draws = {draws} must be at least 1", "teacher's answers")
    uniforms = torch.rand(len(logits), draws, generator=generator, dtype=torch.float64)
    if stratified:
        uniforms = (uniforms + torch.arange(draws)) / draws
    uniforms = uniforms.to(logits.device)
    entries, entropy = [], []
    for rows, p in _probabilities(logits):
        cumulative = p.cumsum(dim=-1)
        total = cumulative[:, -1:]
        points = torch.minimum(uniforms[rows] * total, total.nextafter(torch.zeros_like(total)))
        # The first entry beyond a point has probability. Only logits that are no numbers have none there.
        entries.append(torch.searchsorted(cumulative, points, right=True).clamp_(max=logits.shape[-1] - 1))
        entropy.append(torch.special.entr(p).sum(dim=-1))
    return _counted(torch.cat(entries), torch.cat(entropy).float())


def largest(logits: "Tensor", k: int) -> Sparse:
    """The k largest probabilities of each token, and what all others have together.

    Args:
        logits: of the whole vocabulary [t, v].
    """
    import torch

    entries = top_k(logits, k).entries
    kept, rest, entropy = [], [], []
    for rows, p in _probabilities(logits):
        kept.append(p.gather(1, entries[rows]))
        entropy.append(torch.special.entr(p).sum(dim=-1))
        rest.append(p.scatter_(1, entries[rows], 0.0).sum(dim=-1))
    return Sparse(entries, torch.cat(kept).float(), torch.cat(rest).float(), torch.cat(entropy).float())


def joined(parts: Sequence[Sparse]) -> Sparse:
    """The tokens of all parts in a row, each part with a k of its own; the share is the first's.

    Raises:
        ValueError: some are drawn and some the largest.
    """
    import torch

    k = max(part.entries.shape[-1] for part in parts)
    padded = [
        [torch.nn.functional.pad(each, (0, k - each.shape[-1])) for each in (part.entries, part.probabilities)]
        for part in parts
    ]
    entries, probabilities = (torch.cat(each) for each in zip(*padded))
    rests = [part.rest for part in parts if part.rest is not None]
    if rests and len(rests) < len(parts):
        raise ValueError("drawn entries and largest ones cannot be joined")
    entropy = torch.cat([part.entropy for part in parts])
    return Sparse(entries, probabilities, torch.cat(rests) if rests else None, entropy, parts[0].share)


def relative(shares: Sequence[float]) -> list[float]:
    """Shares over their sum.

    Raises:
        ValueError: there is none, or one is not above 0 and finite.
    """
    if not shares or not all(0 < share < math.inf for share in shares):
        raise ValueError(f"shares of teachers must be above 0 and finite, one at least, not {[*shares]}")
    return [share / sum(shares) for share in shares]


def check_sparse(teachers: Sequence[Sparse], kind: str, temperature: float) -> None:
    """Raises ValueError where a teacher's tensors do not fit each other, or cannot give this divergence."""
    if teachers and (kind not in SPARSE_KINDS or temperature != 1):
        raise ValueError(
            f"entries of a teacher's distribution give {' and '.join(SPARSE_KINDS)} at temperature 1, "
            f"not {kind} at {temperature}"
        )
    for one in teachers:
        tokens = one.entries.shape[:-1]
        by_token = [part for part in (one.rest, one.entropy) if part is not None]
        if one.probabilities.shape != one.entries.shape or any(part.shape != tokens for part in by_token):
            raise ValueError(
                f"entries {[*one.entries.shape]}, probabilities {[*one.probabilities.shape]}, rest and entropy "
                f"{[[*part.shape] for part in by_token]} do not fit"
            )


def _counted(drawn: "Tensor", entropy: "Tensor") -> Sparse:
    """Draws [t, n] as entries, each once in ascending order, and their shares of the draws."""
    import torch

    ordered = drawn.sort(dim=-1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    places = new.cumsum(dim=-1) - 1
    k = int(places.max()) + 1 if len(places) else 1
    empty = torch.zeros(len(ordered), k, device=ordered.device)
    counts = empty.scatter_add(1, places, torch.ones_like(places, dtype=empty.dtype))
    return Sparse(empty.long().scatter(1, places, ordered), counts / ordered.shape[1], None, entropy)


def _probabilities(logits: "Tensor") -> "Iterator[tuple[slice, Tensor]]":
    """The tokens of each block, and their probabilities in float64 [r, v]."""
    count = max(1, BLOCK // (8 * logits.shape[-1]))
    for first in range(0, max(1, len(logits)), count):
        rows = slice(first, first + count)
        yield rows, logits[rows].detach().double().softmax(dim=-1)
