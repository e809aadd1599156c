"""Which samples a run reads, each once, and how they are shared out over shards."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nemo_minitron.data.sample_sets import Piece, SampleSet

if TYPE_CHECKING:
    import numpy as np

KEY_BYTES = 16


def key_of(piece: Piece) -> bytes:
    """What a piece's answers are found by: BLAKE2b of the tokens that a causal teacher reads, its last label not
    among them, as int32."""
    import numpy

    read = numpy.ascontiguousarray(piece.ids[:-1], dtype="<i4")
    return hashlib.blake2b(read.tobytes(), digest_size=KEY_BYTES).digest()


class Place(NamedTuple):
    """Where a piece lies: split, number of the sample there, and of the piece in it."""

    split: str
    sample: int
    piece: int


@dataclasses.dataclass(frozen=True)
class Listing:
    """Pieces in the order in which they are answered; none reads the same tokens as another.

    Attributes:
        sets: split -> samples.
        places: of each piece.
        keys: of each piece [n, 16].
        tokens: of each piece, those with a label [n].
    """

    sets: dict[str, SampleSet]
    places: list[Place]
    keys: "np.ndarray"
    tokens: "np.ndarray"

    def __len__(self) -> int:
        return len(self.places)

    def piece(self, number: int) -> Piece:
        place = self.places[number]
        return self.sets[place.split][place.sample][place.piece]

    def shown(self, number: int) -> str:
        """Where a piece stands, for messages."""
        place = self.places[number]
        return self.sets[place.split].place(place.sample)

    def only(self, numbers: "np.ndarray") -> "Listing":
        """These of the pieces."""
        return Listing(self.sets, [self.places[number] for number in numbers], self.keys[numbers], self.tokens[numbers])

    def shards(self, shard_bytes: int, token_bytes: float, batch: int) -> list[range]:
        """The pieces of each shard: whole batches, as many as fit, one at least."""
        shards, start, size = [], 0, 0.0
        for first in range(0, len(self), batch):
            more = float(self.tokens[first : first + batch].sum()) * token_bytes
            if size and size + more > shard_bytes:
                shards.append(range(start, first))
                start, size = first, 0.0
            size += more
        return [*shards, range(start, len(self))] if len(self) > start else shards


def list_pieces(sets: dict[str, SampleSet], numbers: dict[str, Iterable[int]], tokens: int | None = None) -> Listing:
    """The pieces of samples of each split, each once.

    Args:
        numbers: split -> samples in their order.
        tokens: of training, only as many samples as have so many.
    """
    import numpy

    places, keys, counts, known = [], [], [], set()
    for split, chosen in numbers.items():
        read = 0
        for sample in chosen:
            if split == "train" and tokens is not None and read >= tokens:
                break
            for number, piece in enumerate(sets[split][sample]):
                read += len(piece.ids) - 1
                key = key_of(piece)
                if key not in known:
                    known.add(key)
                    places.append(Place(split, sample, number))
                    keys.append(key)
                    counts.append(len(piece.ids) - 1)
    table = numpy.frombuffer(b"".join(keys), dtype=numpy.uint8).reshape(-1, KEY_BYTES)
    return Listing(sets, places, table, numpy.array(counts, dtype=numpy.int64))


def several(keys: "Sequence[np.ndarray]") -> "np.ndarray":
    """Keys [n, 16] of several tables as one vector of NumPy's bytes [n], which it sorts and finds."""
    import numpy

    table = numpy.concatenate([*keys, numpy.empty((0, KEY_BYTES), dtype=numpy.uint8)])
    return numpy.ascontiguousarray(table).view(f"S{KEY_BYTES}")[:, 0]
