"""How long work takes: its operations over a rate that is assumed, measured, or learnt from the stages that ran."""

import dataclasses

#: What a stage takes beside its work: ranks, model, files, manifest.
SETUP_SECONDS = 4.0
#: Share of a large matrix product's rate that training achieves (SmolLM2-135M on one thread: 0.066 of 0.096 TFLOP/s).
ACHIEVED = 0.65
#: Rates of other kinds of work where nothing is learnt yet: the cut's, over that of training (1.0 for SmolLM2-135M's
#: width student); bytes of text that a process tokenises in a second.
CUT_RATE = 0.8
TEXT_RATE = 1e6
#: A measurement's seconds.
MOMENT = 0.3


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage has to do.

    Attributes:
        kind: `train`, `run` (forward passes), `cut`, or `text`.
        amount: floating-point operations; of `text`, bytes.
    """

    kind: str
    amount: float


class Pace:
    """Seconds of work, from a first rate and then from what ran.

    Attributes:
        flops: FLOP/s of all ranks in training, to start from.
        source: where that comes from, in words.
        processes: that tokenise.
    """

    def __init__(self, flops: float, source: str, processes: int = 1):
        self.flops, self.source, self.processes = flops, source, processes
        self.ran: dict[str, tuple[float, float]] = {}

    def learn(self, work: Work, seconds: float) -> None:
        """Takes in what a stage took; one that is mostly set-up says nothing of its work."""
        worked = seconds - SETUP_SECONDS
        if worked > SETUP_SECONDS / 2:
            amount, before = self.ran.get(work.kind, (0.0, 0.0))
            self.ran[work.kind] = (amount + work.amount, before + worked)

    def rate(self, kind: str) -> float:
        """Operations (or bytes) of that kind in a second."""
        for known in {"train": ("train", "run"), "run": ("run", "train")}.get(kind, (kind,)):
            if known in self.ran:
                amount, seconds = self.ran[known]
                return amount / seconds
        if kind == "text":
            return TEXT_RATE * self.processes
        return (CUT_RATE if kind == "cut" else 1.0) * self.flops

    def seconds(self, work: Work) -> float:
        return SETUP_SECONDS + work.amount / self.rate(work.kind)


def measured_flops() -> float:
    """FLOP/s that training should achieve on this CPU: a share of a matrix product's rate, timed for a moment."""
    import time

    import torch

    left, right = torch.randn(1024, 768), torch.randn(768, 1536)
    torch.mm(left, right)
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < MOMENT:
        torch.mm(left, right)
        count += 1
    return ACHIEVED * count * 2 * 1024 * 768 * 1536 / passed


def in_words(seconds: float) -> str:
    """`about 40 s`, `about 12 min`, `about 3.5 h`."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h"
