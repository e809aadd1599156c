"""Losses between a student's and a teacher's logits, a token: pure functions on tensors.

Legend: s sequence, b micro batch, v vocabulary rows of this rank, k entries kept.

z_s, z_t are the student's and the teacher's logits [..., v], of any leading shape ([s, b] in Megatron), T is the
temperature, p = softmax(z_t / T), q = softmax(z_s / T). Losses are in nats a token [...], float32 for logits in bf16,
fp16 or float32 and float64 for float64; the gradient, for the student alone, has its logits' dtype. Logits of -inf are
entries without probability: where the teacher has none they add nothing, where only the student has none the forward
KL is inf; tokens whose logits are all -inf give NaN.

Where a vocabulary is split over the ranks of a tensor-parallel `group`, every rank passes its part and gets the whole
loss of each token and the gradient of its own part, as from Megatron's vocabulary-parallel cross entropy. No float32
copy of whole logits is made.

`overwrite_student` lets backward write the gradient over the student's logits, which saves their size. Nothing
may read the logits once backward has begun; autograd raises an error where another backward would.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_minitron.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from nemo_minitron.distillation.losses.targets import Sparse

#: What logs and manifests call the loss between the logits of student and teacher.
KD_LOSS = "kd_loss"


def forward_kl(
    student: "Tensor",
    teacher: "Tensor",
    *,
    temperature: float = 1.0,
    times_t_squared: bool = False,
    group: "ProcessGroup | None" = None,
    overwrite_student: bool = False,
) -> "Tensor":
    """KL(p||q) = sum_v p (log p - log q), the loss of the Minitron papers.

    Source: arXiv 1503.02531, section 2; arXiv 2407.14679, section 3; temperature 1 was best there.

    Args:
        student, teacher: logits [..., v].
        temperature: T.
        times_t_squared: multiplies by T^2, so that gradients keep their size when T changes (1503.02531, section 2).
            NeMo's LogitsKLLoss does not, ModelOpt's LogitsDistillationLoss does.
        group: tensor-parallel group that shares the vocabulary; None: each rank has all of it.
        overwrite_student: see above.
    """
    return divergence(
        student, teacher, "forward_kl", temperature=temperature, times_t_squared=times_t_squared, group=group,
        overwrite_student=overwrite_student,
    )  # fmt: skip


def reverse_kl(student: "Tensor", teacher: "Tensor", **options: Any) -> "Tensor":
    """KL(q||p) = sum_v q (log q - log p); inf where the teacher has no probability and the student has some.

    Source: arXiv 2306.08543 (MiniLLM), section 2. Arguments as in `forward_kl`.
    """
    return divergence(student, teacher, "reverse_kl", **options)


def jensen_shannon(student: "Tensor", teacher: "Tensor", beta: float = 0.5, **options: Any) -> "Tensor":
    """JSD_beta = beta KL(p||m) + (1 - beta) KL(q||m) with m = beta p + (1 - beta) q; the generalised JSD.

    At beta = 0 this is KL(p||q) and at beta = 1 KL(q||p), the limits of JSD_beta / beta and JSD_beta / (1 - beta):
    JSD_beta itself tends to 0 at both ends, so the value jumps there, as in Liger and TRL.

    Source: arXiv 2306.13649 (GKD), section 2. Arguments as in `forward_kl`.

    Args:
        beta: the teacher's share of the mixture, from 0 to 1.
    """
    if beta in (0, 1):
        return divergence(student, teacher, "forward_kl" if beta == 0 else "reverse_kl", **options)
    return divergence(student, teacher, "jensen_shannon", beta=beta, **options)


def soft_cross_entropy(student: "Tensor", teacher: "Tensor", **options: Any) -> "Tensor":
    """H(p, q) = -sum_v p log q, the forward KL plus the teacher's entropy; its gradient is the forward KL's.

    Source: arXiv 1503.02531, section 2. Arguments as in `forward_kl`.
    """
    return divergence(student, teacher, "soft_cross_entropy", **options)


def divergence(
    student: "Tensor",
    teacher: "Tensor",
    kind: str,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    times_t_squared: bool = False,
    group: "ProcessGroup | None" = None,
    overwrite_student: bool = False,
) -> "Tensor":
    """The divergence that `kind` names (one of the four functions above), a token [...]."""
    from nemo_minitron.distillation.losses.chunked import LogitsDivergence
    from nemo_minitron.distillation.losses.divergences import Divergence

    d = Divergence(kind, temperature, beta)
    _same_shape(student, teacher)
    value = LogitsDivergence.apply(student, teacher.detach(), d, group, overwrite_student)
    return value * temperature**2 if times_t_squared else value


class TopK(NamedTuple):
    """A teacher's k largest logits of each token, as they may be cached.

    Attributes:
        values: logits, in descending order [..., k].
        entries: their places in the whole vocabulary [..., k].
    """

    values: "Tensor"
    entries: "Tensor"


def top_k(teacher: "Tensor", k: int, *, group: "ProcessGroup | None" = None) -> TopK:
    """The k largest of the teacher's logits [..., v] over the whole vocabulary.

    With a group, each rank passes its part and gets the same result.
    """
    import torch

    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    vocabulary = teacher.shape[-1]
    if not 1 <= k <= vocabulary * ranks:
        raise ConfigError(f"k = {k} must lie between 1 and the vocabulary of {vocabulary * ranks}", "distillation loss")
    values, entries = teacher.detach().topk(min(k, vocabulary), dim=-1)
    if group is None:
        return TopK(values, entries)
    entries = entries + vocabulary * torch.distributed.get_rank(group)
    gathered = []
    for part in (values, entries):
        parts = [torch.empty_like(part) for _ in range(ranks)]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        gathered.append(torch.cat(parts, dim=-1))
    values, order = gathered[0].topk(k, dim=-1)
    return TopK(values, gathered[1].gather(-1, order))


def top_k_forward_kl(
    student: "Tensor",
    teacher: TopK,
    *,
    temperature: float = 1.0,
    times_t_squared: bool = False,
    group: "ProcessGroup | None" = None,
    overwrite_student: bool = False,
) -> "Tensor":
    """KL(p_k||q) of the teacher's distribution restricted to k entries and renormalised, p_k = softmax(values / T).

    q stays the student's distribution over the whole vocabulary. With k = v it equals `forward_kl`; below, p_k gives
    the k entries more probability than the teacher does. arXiv 2407.14679, section 4, found k up to 100 to hurt and
    larger k to gain nothing; it saves memory where teachers' logits are cached.

    Arguments as in `forward_kl`.

    Args:
        student: logits [..., v].
        teacher: from `top_k`.
    """
    import torch

    from nemo_minitron.distillation.losses.chunked import SparseDivergence
    from nemo_minitron.distillation.losses.divergences import Divergence
    from nemo_minitron.distillation.losses.targets import Sparse

    d = Divergence("forward_kl", temperature)
    _same_tokens(student, teacher.values)
    values = teacher.values.detach().to(torch.promote_types(student.dtype, torch.float32))
    p = (values / temperature).softmax(dim=-1)
    whole = Sparse(teacher.entries, p, None, torch.special.entr(p).sum(dim=-1))
    value = SparseDivergence.apply(student, whole, d, group, overwrite_student)
    return value * temperature**2 if times_t_squared else value


def sparse_divergence(
    student: "Tensor",
    teacher: "Sparse",
    kind: str = "forward_kl",
    *,
    temperature: float = 1.0,
    group: "ProcessGroup | None" = None,
    overwrite_student: bool = False,
) -> "Tensor":
    """The forward KL from some entries of the teacher's distribution p, a token; q is whole.

    Drawn entries: -sum_i p_i log q_i - H(p), an unbiased estimate of KL(p||q) with an unbiased gradient. The largest
    with their rest r: sum_i p_i log(p_i / q_i) + r log(r / (1 - sum_i q_i)), the KL where all other entries are one,
    which is at most KL(p||q). As soft_cross_entropy either has H(p) more.

    Args:
        student: logits [..., v].
        teacher: [..., k], its share counts for nothing here.
        kind: forward_kl or soft_cross_entropy.
        temperature: 1.
        group, overwrite_student: see above.

    Raises:
        ValueError: of another kind or temperature, which these entries cannot give.
    """
    from nemo_minitron.distillation.losses.chunked import SparseDivergence
    from nemo_minitron.distillation.losses.divergences import Divergence
    from nemo_minitron.distillation.losses.targets import check_sparse

    d = Divergence(kind, temperature)
    check_sparse([teacher], kind, temperature)
    _same_tokens(student, teacher.entries)
    return SparseDivergence.apply(student, teacher, d, group, overwrite_student)


def mixture(
    teachers: "Sequence[Tensor]",
    shares: Sequence[float],
    *,
    temperature: float = 1.0,
    group: "ProcessGroup | None" = None,
) -> "Tensor":
    """Logits of several teachers' mixture, T log sum_i share_i softmax(z_i / T) [..., v], for `divergence` at this T.

    Float32 (float64 for float64); of one teacher, its own logits.

    Args:
        teachers: logits [..., v] each.
        shares: of each teacher, relative to their sum.
    """
    import torch

    from nemo_minitron.distillation.losses.divergences import Divergence, Workspace, add_to_mixture
    from nemo_minitron.distillation.losses.targets import relative

    weights = relative(shares)
    first, *others = (teacher.detach() for teacher in teachers)
    if not others:
        return first
    d, rows = Divergence(temperature=temperature), [one.reshape(-1, one.shape[-1]) for one in (first, *others)]
    work = Workspace(rows[0], 1)
    mixed = torch.full_like(rows[0], -torch.inf, dtype=work.dtype)
    for logits, weight in zip(rows, weights, strict=True):
        add_to_mixture(mixed, logits, weight, d, group, work)
    return mixed.div_(d.scale).view(first.shape)


def masked_mean(losses: "Tensor", mask: "Tensor") -> "Tensor":
    """sum_t mask loss / sum_t mask, in nats a token; 0 where the mask has no token.

    A masked token's loss counts for nothing even where it is not a number.

    Args:
        losses, mask: of one shape, such as [s, b]; mask is boolean or has weights of 0 and above.
    """
    import torch

    mask = mask.to(losses.dtype)
    total = torch.where(mask == 0, 0.0, losses * mask).sum()
    count = mask.sum()
    return total / torch.where(count == 0, 1.0, count)


def mixed(kd: "Tensor", lm: "Tensor", alpha: float) -> "Tensor":
    """alpha kd + (1 - alpha) lm: distillation and language-model loss, in nats a token.

    Source: arXiv 1503.02531, section 2. arXiv 2407.14679 found alpha = 1, the distillation loss alone, best.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha = {alpha} must lie between 0 (LM loss alone) and 1 (none of it)", "distillation loss")
    return alpha * kd + (1 - alpha) * lm


def dynamic_scale(
    logits_loss: "Tensor | float",
    intermediate_loss: "Tensor | float",
    running: "Tensor | None" = None,
    decay: float = 0.0,
) -> "Tensor":
    """alpha = L_logits / L_is, which lifts the intermediate loss to the size of the logits loss; no gradient.

    Source: arXiv 2407.14679, section 3 (L = L_CLM + L_logits + alpha L_is). It takes the current ratio; with
    `running` and `decay` this is decay * running + (1 - decay) * ratio. A ratio that is not finite (L_is = 0) counts
    as 0.

    Args:
        logits_loss, intermediate_loss: means over tokens, over all data-parallel ranks where they shall agree.
        running: the last step's scale; None at the first.
    """
    import torch

    ratio = torch.as_tensor(logits_loss).detach() / torch.as_tensor(intermediate_loss).detach()
    ratio = torch.where(ratio.isfinite(), ratio, 0.0)
    return ratio if running is None else decay * running + (1 - decay) * ratio


def _same_tokens(student: "Tensor", teacher: "Tensor") -> None:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student's logits {[*student.shape]} do not fit the teacher's {[*teacher.shape]}")


def _same_shape(student: "Tensor", teacher: "Tensor") -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"student's logits {[*student.shape]} and teacher's {[*teacher.shape]} differ in shape")
