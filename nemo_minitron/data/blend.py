"""Several sets of samples as one, in exact shares, which may follow the losses.

Legend: k sources.
"""

import bisect
import collections
import itertools
import math
import os
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.data.sample_sets import Passes, Piece, SampleSet

#: A worker of a data loader looks so often whether the shares that it waits for are there.
LOOK_SECONDS = 0.002


def normalised(weights: Sequence[float]) -> list[float]:
    """Positive weights as shares, which add up to 1."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def followed(shares: Sequence[float], losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Shares moved towards the sources whose loss is furthest above its reference.

    w'_i = w_i exp(d_i) / sum_j w_j exp(d_j),  d_i = max(l_i - r_i, 0)

    w shares, l validation losses and r reference losses in nats a token. Dynamic batch loading, Sheared LLaMA,
    arXiv 2310.06694, section 2.2, Algorithm 1.
    """
    excess = [max(loss - aim, 0.0) for loss, aim in zip(losses, reference, strict=True)]
    top = max(excess)  # the same shares, and no overflow
    return normalised([share * math.exp(one - top) for share, one in zip(shares, excess, strict=True)])


class Blend:
    """The samples of several sources under one row of numbers: those of the first, then those of the next.

    Args:
        sets: name -> samples of a source.
    """

    def __init__(self, sets: Mapping[str, SampleSet]):
        self.names, self.sets = tuple(sets), tuple(sets.values())
        self.length = max(samples.length for samples in self.sets)
        self.starts = [0, *itertools.accumulate(len(samples) for samples in self.sets)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: int) -> Sequence[Piece]:
        source = self.source(number)
        return self.sets[source][number - self.starts[source]]

    def source(self, number: int) -> int:
        """The source that a sample is of."""
        return bisect.bisect_right(self.starts, number) - 1

    def place(self, number: int) -> str:
        source = self.source(number)
        return f"{self.names[source]}: {self.sets[source].place(number - self.starts[source])}"

    def counts(self) -> list[int]:
        """Samples of each source [k]."""
        return [len(samples) for samples in self.sets]


class Shares:
    """The shares of each period of a run; the processes of a data loader see what is set once they run.

    Args:
        shares: of the first two periods, and of all where there is no other.
        samples: of a period; None: the shares stay.
        periods: of the run.
    """

    def __init__(self, shares: Sequence[float], samples: int | None = None, periods: int = 1):
        import torch

        self.samples = samples
        self.table = torch.full((max(periods, 2), len(shares)), math.nan, dtype=torch.float64).share_memory_()
        for period in range(2 if samples else len(self.table)):
            self.set(period, shares)

    def period(self, number: int) -> int:
        """The period that the `number`-th sample of a run is of."""
        return number // self.samples if self.samples else 0

    def known(self, period: int) -> list[float] | None:
        """The shares of a period, where they are set."""
        row: list[float] = self.table[period].tolist()
        return None if any(map(math.isnan, row)) else row

    def set(self, period: int, shares: Sequence[float]) -> None:
        """Sets the shares of a period; one behind the run's end is left out."""
        import torch

        if period < len(self.table):
            self.table[period] = torch.tensor(shares, dtype=torch.float64)

    def wait(self, period: int) -> list[float]:
        """The shares of a period, once they are set; only a process of a data loader waits.

        Raises:
            RuntimeError: this is the process that sets them, or that process is gone.
        """
        from torch.utils.data import get_worker_info

        parent = os.getppid()
        while (shares := self.known(period)) is None:
            if get_worker_info() is None or os.getppid() != parent:
                raise RuntimeError(f"the shares of period {period} are not set")
            time.sleep(LOOK_SECONDS)
        return shares


class Drawn:
    """An order that takes the next sample of a source as often as its share says, each source in its own passes.

    With shares that stay, no source is ever a whole sample ahead of its share or behind it. Of the sources that are
    behind, the one is next whose share would be a whole sample ahead of it first: earliest deadline first, which holds
    that bound wherever it can be held (Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980). The
    largest deficit first, as Megatron's BlendedDataset chooses, does not hold it for more than two sources.

    Args:
        counts: samples of each source [k].
        seed: of the passes.
    """

    def __init__(self, counts: Sequence[int], shares: Shares, seed: int):
        self.shares, self.starts = shares, [0, *itertools.accumulate(counts)]
        self.passes = [Passes(count, seed) for count in counts]
        self._sources, self._places = array("H"), array("q")
        self._taken, self._due = [0] * len(counts), [0.0] * len(counts)
        self._period, self._now, self._within = -1, [0.0] * len(counts), 0

    def __getitem__(self, number: int) -> int:
        """The sample that is read as the `number`-th of a run."""
        while len(self._sources) <= number:
            self._draw()
        source = self._sources[number]
        return self.starts[source] + self.passes[source][self._places[number]]

    def sources(self, count: int) -> list[int]:
        """The sources of the first `count` samples of a run."""
        while len(self._sources) < count:
            self._draw()
        return self._sources[:count].tolist()

    def _draw(self) -> None:
        period = self.shares.period(len(self._sources))
        if period != self._period:
            shares = self.shares.wait(period)
            self._due = [due + self._within * share for due, share in zip(self._due, self._now)]
            self._period, self._now, self._within = period, shares, 0
        self._within += 1
        best, least = -1, math.inf
        for source, share in enumerate(self._now):
            due = self._due[source] + self._within * share
            taken = self._taken[source]
            if share > 0 and due > taken and (left := (taken + 1 - due) / share) < least:
                best, least = source, left
        if best < 0:  # what is behind has no share any more
            best = max(range(len(self._now)), key=self._now.__getitem__)
        self._sources.append(best)
        self._places.append(self._taken[best])
        self._taken[best] += 1


class Turns:
    """One pass over the samples of each source as they lie, the sources in turn, and nothing behind it.

    Args:
        counts: samples of each source [k].
        limit: of all together.

    Attributes:
        taken: samples of each source [k].
    """

    def __init__(self, counts: Sequence[int], limit: int):
        starts = [0, *itertools.accumulate(counts)]
        rounds = (
            starts[source] + place
            for place in range(max(counts))
            for source, count in enumerate(counts)
            if place < count
        )
        self.numbers = list(itertools.islice(rounds, limit))
        self.taken = [
            sum(start <= number < stop for number in self.numbers) for start, stop in itertools.pairwise(starts)
        ]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> int | None:
        return self.numbers[number] if number < len(self.numbers) else None


class Mixture:
    """How a run reads a blend: training in exact shares, validation in turns.

    Shares that follow the losses belong to periods from one validation to the next. Those that a validation gives count
    from the next validation on: data loaders read ahead, and so what they read does not depend on how far.

    Args:
        train, validation: the blends of the two splits.
        shares: of training samples, by source [k]; they add up to 1.
        batch: samples a step.
        steps: of the run.
        interval: steps between validations.
        limit: batches a validation.
        dynamic: whether shares follow the losses.
        reference: losses in nats a token that they follow, by source [k]; it may be set later.
        facts: what else the manifest says of each source [k].
    """

    def __init__(
        self,
        train: Blend,
        validation: Blend,
        shares: Sequence[float],
        *,
        batch: int,
        steps: int,
        interval: int,
        limit: int,
        seed: int,
        dynamic: bool = False,
        reference: Sequence[float] | None = None,
        facts: Sequence[Mapping[str, Any]] = (),
    ):
        self.facts = list(facts) or [{} for _ in shares]
        self.names, self.given, self.interval = train.names, list(shares), interval
        self.dynamic, self.reference, self.batch = dynamic, reference, batch
        self.shares = Shares(shares, batch * interval if dynamic else None, -(-steps // interval))
        self.train = Drawn(train.counts(), self.shares, seed)
        self.validation = Turns(validation.counts(), batch * limit)
        self._last = self.given

    def weights(self) -> list[float]:
        """What a token of each source's validation weighs [k], so that all together stand for the given shares."""
        return [share / taken for share, taken in zip(self.given, self.validation.taken, strict=True)]

    def follow(self, step: int, losses: Sequence[float]) -> list[float]:
        """The shares that follow from the losses of the validation after `step`; they count one interval later."""
        assert self.reference is not None, "dynamic shares have a reference"
        return followed(self._last, losses, self.reference)

    def keep(self, step: int, shares: Sequence[float]) -> None:
        """Takes the shares that the validation after `step` gave."""
        self._last = list(shares)
        self.shares.set(step // self.interval + 1, shares)

    def told(self, steps: int) -> dict[str, dict[str, Any]]:
        """Source -> what a run of `steps` read of it, for the manifest."""
        read = collections.Counter(self.train.sources(steps * self.batch))
        return {
            name: {"share": self.given[k], "samples": read[k], "validation_samples": self.validation.taken[k]}
            | {**self.facts[k]}
            | ({} if self.reference is None else {"reference": self.reference[k]})
            for k, name in enumerate(self.names)
        }
