"""The two passes over a block of logits as single expressions, which torch.compile makes one or two kernels of.

Legend: r tokens of a block, v vocabulary rows of this rank.

On a GPU the loops of `divergences`, one elementwise kernel after another over a float32 block, move some ten times the
bytes that have to be moved. Compiled, each pass reads the logits twice (maxima, then sums; or once, for the gradient)
and writes what it is for. On a CPU those loops stay: their blocks lie in its cache.

Where torch.compile does not work (no Triton, no C compiler), `run` says so once and the loops do the work.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LN2 = math.log(2.0)
#: The least maximum of a row, so that one of -inf alone has differences that are numbers.
FLOOR = -1e30
#: Kinds of device that compile. Elements of a block: Triton counts them in 32 bits, and its gradient is a copy.
DEVICES, ELEMENTS = ("cuda",), 1 << 27
logger = logging.getLogger(__name__)
_failed: set[str] = set()


def compiles(device: torch.device, kind: str) -> bool:
    """Whether the passes of this divergence are compiled on a device."""
    return device.type in DEVICES and device.type not in _failed and kind != "jensen_shannon"


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` of the arguments, compiled; None where that cannot be done, from then on for all."""
    device = arguments[0].device.type
    if device in _failed:
        return None
    try:
        return _compiled(function)(*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _failed.add(device)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("the distillation loss runs without torch.compile, at half its speed: %s", reason)
        return None


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True)


def sums(lead: Tensor, other: Tensor, scale: float, kind: str) -> tuple[Tensor, Tensor]:
    """Of logits [r, v]: maxima of both [2, r], and sum 2^x, sum 2^y and the expectation relative to them [3, r].

    As in `divergences.measure`: x, y are the scaled logits of lead and other less their maxima; the expectation is
    sum 2^x (x - y), or -sum 2^x y for the soft cross entropy.
    """
    dtype = torch.promote_types(lead.dtype, torch.float32)
    x, y = lead.to(dtype) * scale, other.to(dtype) * scale
    top_x, top_y = x.amax(dim=-1).clamp(min=FLOOR), y.amax(dim=-1).clamp(min=FLOOR)
    x, y = x - top_x.unsqueeze(-1), y - top_y.unsqueeze(-1)
    weight = x.exp2()
    # nansum: 0 * inf, of entries without probability, counts as 0
    expectation = (weight * (-y if kind == "soft_cross_entropy" else x - y)).nansum(dim=-1)
    return torch.stack((top_x, top_y)), torch.stack((weight.sum(dim=-1), y.exp2().sum(dim=-1), expectation))


def gradient(
    student: Tensor,
    teacher: Tensor,
    norms: Tensor,
    value: Tensor,
    row_scale: Tensor,
    scale: float,
    kind: str,
    rounded_to: torch.dtype,
) -> Tensor:
    """The gradient of logits [r, v], times each row's scale; a scale of 0 gives 0 whatever the logits hold.

    Args:
        norms: log2 of the sums of student and teacher, as top and rest: student's two, teacher's two [4, r].
        value: the divergence [r], in nats.
    """
    dtype = norms.dtype
    log_q = student.to(dtype) * scale - norms[0].unsqueeze(-1) - norms[1].unsqueeze(-1)
    log_p = teacher.to(dtype) * scale - norms[2].unsqueeze(-1) - norms[3].unsqueeze(-1)
    if kind == "reverse_kl":
        of_logits = ((log_q - log_p) * LN2 - value.unsqueeze(-1)) * log_q.exp2()
        of_logits = of_logits.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    else:
        of_logits = log_q.exp2() - log_p.exp2()
    weights = row_scale.unsqueeze(-1)
    return torch.where(weights == 0, 0.0, of_logits * weights).to(rounded_to)
