"""Sets of samples: what training reads by number, whatever it is made of, and in which order.

Legend: s labels of a sample.
"""

import bisect
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    import numpy as np


class Piece(NamedTuple):
    """A row of instructions or a window of text: token ids [n + 1], and for each whether it is learnt.

    The first is never a label. Until a row of instructions is fitted to the length, `learnt` marks its answers.
    """

    ids: "Sequence[int] | np.ndarray"
    learnt: "Sequence[bool] | np.ndarray"

    def part(self, start: int, stop: int) -> "Piece":
        """Tokens start..stop, the last one not included."""
        return Piece(self.ids[start:stop], self.learnt[start:stop])


class SampleSet(Protocol):
    """Samples by number, always the same under the same number.

    Attributes:
        length: labels that a sample has room for [s].
    """

    length: int

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Sequence[Piece]:
        """The pieces of a sample: one, or several that are packed into it."""

    def place(self, number: int) -> str:
        """Where the sample's text stands, for messages."""


class Windows:
    """Windows of a corpus side by side, as it lies: the same in each pass, and each token a label once a pass.

    The rest of a dataset that fills no window is left out.

    Args:
        prefixes: of indexed datasets.
        length: labels a window [s].

    Raises:
        DataError: there is no whole window.
    """

    def __init__(self, prefixes: Sequence[str], length: int):
        import numpy

        from nemo_minitron.data.samples import token_stream

        self.prefixes, self.length = list(prefixes), length
        self.streams = [token_stream(prefix) for prefix in prefixes]
        counts = [max(0, len(stream) - 1) // length for stream in self.streams]
        self.ends = numpy.cumsum(counts)
        if not len(self):
            raise DataError(
                f"{', '.join(prefixes)}: fewer tokens than one sequence of {length} + 1; give a shorter length"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> tuple[Piece]:
        import numpy

        which, start = self._start(number)
        ids = numpy.asarray(self.streams[which][start : start + self.length + 1], dtype=numpy.int64)
        return (Piece(ids, numpy.ones(len(ids), dtype=bool)),)

    def place(self, number: int) -> str:
        which, start = self._start(number)
        return f"{self.prefixes[which]}, tokens {start} to {start + self.length}"

    def _start(self, number: int) -> tuple[int, int]:
        """The dataset that a window is of, and its first token there."""
        import numpy

        which = int(numpy.searchsorted(self.ends, number, side="right"))
        return which, (number - (int(self.ends[which - 1]) if which else 0)) * self.length


class Rows:
    """Rows of instructions, one a sample.

    Args:
        length: labels that a sample has room for [s]; no row has more.
        name: of the split, for messages.
    """

    def __init__(self, rows: list[Piece], length: int, name: str):
        self.rows, self.length, self.name = rows, length, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Piece]:
        return (self.rows[number],)

    def place(self, number: int) -> str:
        return f"row {number + 1} of the {self.name} split, as they were read"


class Packed:
    """Rows of instructions packed into sequences: each whole, in one of them.

    Best-fit decreasing: the longest row first, each into the fullest sequence that still has room for it. Rows that are
    long leave room that short ones fill, and no order of reading decides. Source: arXiv 2404.10830, section 3.

    Sequences, and the rows of each, are in the order in which the rows were read, so that the first sequences are not
    those of the longest rows.
    """

    def __init__(self, rows: Rows):
        self.rows, self.length = rows, rows.length
        self.sequences = best_fit([labels_of(row) for row in rows.rows], rows.length)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, number: int) -> tuple[Piece, ...]:
        return tuple(self.rows.rows[row] for row in self.sequences[number])

    def place(self, number: int) -> str:
        numbers = ", ".join(str(row + 1) for row in self.sequences[number])
        return f"rows {numbers} of the {self.rows.name} split, as they were read"


def labels_of(piece: Piece) -> int:
    """How many labels a piece takes of a sample."""
    return len(piece.ids) - 1


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the items of each bin, by best-fit decreasing; bins in the order of their first items.

    Args:
        sizes: of the items, `room` at most.
        room: of a bin.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # what is left of a bin, and its number; in ascending order
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        place = bisect.bisect_left(free, (sizes[item], 0))
        left, number = free.pop(place) if place < len(free) else (room, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(item)
        if left > sizes[item]:
            bisect.insort(free, (left - sizes[item], number))
    return sorted(sorted(items) for items in bins)


def padding(samples: SampleSet) -> float:
    """The share of padding in samples: their labels' places that no piece takes."""
    taken = sum(labels_of(piece) for number in range(len(samples)) for piece in samples[number])
    return 1 - taken / (len(samples) * samples.length)


class Passes:
    """Pass after pass over `count` samples, each pass in an order of its own; the same whatever was read before."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, number: int) -> int:
        """The sample that is read as the `number`-th of a run."""
        epoch, position = divmod(number, self.count)
        if self._order[0] != epoch:
            numbers = list(range(self.count))
            random.Random(f"{self.seed}-{epoch}").shuffle(numbers)
            self._order = (epoch, numbers)
        return self._order[1][position]


class Once:
    """One pass over `count` samples as they lie, and nothing behind it."""

    def __init__(self, count: int):
        self.count = count

    def __getitem__(self, number: int) -> int | None:
        return number if number < self.count else None


class Order(Protocol):
    """From the number of a sample in a run to its number in the set; None: nothing, a sample that weighs nothing."""

    def __getitem__(self, number: int) -> int | None: ...
