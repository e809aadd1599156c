"""How answers are written as tensors of a shard, and read back: a form for each of `teach.keep`.

Legend: n tokens of a sample, e entries of all of them, g hidden (teacher's), k entries a token, w bytes of a number.

Whole numbers are little-endian bytes [.., w], as few as hold the largest one; logarithms are natural.
"""

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from nemo_minitron.distillation.teach.header import Header
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.distillation.losses.targets import Sparse

#: The largest number of float8 e4m3.
E4M3 = 448.0
LOSS = "loss"
KEYS, ENDS, ENTRY_ENDS, ERROR = "keys", "ends", "entry_ends", "error"


class Column(NamedTuple):
    """A tensor of a shard.

    Attributes:
        dtype: by torch's name.
        width: numbers a row; None: it is a vector.
        by_entry: whether a row is an entry's, and not a token's.
    """

    dtype: str
    width: int | None = None
    by_entry: bool = False


class Form(abc.ABC):
    """How the answers to a sample are written.

    Attributes:
        header: of the folder.
        columns: name -> tensor of a shard; the loss of each token besides.
    """

    columns: dict[str, Column]

    def __init__(self, header: Header):
        self.header = header

    @property
    @abc.abstractmethod
    def token_bytes(self) -> float:
        """Bytes a token; where that differs, the most."""

    @abc.abstractmethod
    def decode(self, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Fields of a batch, each [n, ..], from what was written of a sample."""

    @abc.abstractmethod
    def empty(self, length: int) -> "dict[str, Tensor]":
        """The fields of `length` tokens without answers."""

    def entries(self, tensors: "Mapping[str, Tensor]") -> int:
        """e of what was written."""
        return 0


class Hidden(Form):
    """Last hidden states, in one of three precisions."""

    def __init__(self, header: Header):
        super().__init__(header)
        dtypes = {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "fp32": "float32"}
        self.columns = {"hidden": Column(dtypes[header.precision], header.hidden_size)}
        if header.precision == "fp8":
            self.columns["scale"] = Column("float32")

    @property
    def token_bytes(self) -> float:
        size = {"bf16": 2, "fp8": 1, "fp32": 4}[self.header.precision]
        return size * self.header.hidden_size + (4 if self.header.precision == "fp8" else 0)

    def encode(self, hidden: "Tensor") -> "dict[str, Tensor]":
        """From hidden states [n, g]; fp8 is scaled so that a token's largest number is e4m3's."""
        import torch

        if self.header.precision != "fp8":
            return {"hidden": hidden.to(getattr(torch, self.columns["hidden"].dtype))}
        largest = hidden.float().abs().amax(dim=-1)
        scale = torch.where(largest > 0, largest / E4M3, 1.0)
        return {"hidden": (hidden.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), "scale": scale}

    def decode(self, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        import torch

        hidden = tensors["hidden"]
        if self.header.precision == "fp8":
            hidden = (hidden.float() * tensors["scale"].unsqueeze(-1)).to(torch.bfloat16)
        return {"hidden": hidden}

    def empty(self, length: int) -> "dict[str, Tensor]":
        import torch

        dtype = torch.float32 if self.header.precision == "fp32" else torch.bfloat16
        return {"hidden": torch.zeros(length, self.header.hidden_size, dtype=dtype)}


class Entries(Form):
    """Entries of each token's distribution: drawn ones with their counts less 1, or the largest with what is left.

    The counts of a token add up to the draws, so nothing says how many entries it has.
    """

    def __init__(self, header: Header):
        super().__init__(header)
        self.drawn = header.keep == "sampled"
        self.most = min(header.draws if self.drawn else header.top_k, header.vocab_size)
        self.columns = {"entries": Column("uint8", _width(header.vocab_size - 1), by_entry=True)}
        if self.drawn:
            self.columns["more"] = Column("uint8", _width(header.draws - 1), by_entry=True)
        else:
            self.columns["log_probabilities"] = Column("float16", by_entry=True)
            self.columns["log_rest"] = Column("float16")
        self.columns["entropy"] = Column("float16")

    @property
    def token_bytes(self) -> float:
        sizes = {True: 0, False: 0}
        for column in self.columns.values():
            sizes[column.by_entry] += (2 if column.dtype == "float16" else 1) * (column.width or 1)
        return sizes[True] * self.most + sizes[False]

    def encode(self, answer: "Sparse") -> "dict[str, Tensor]":
        """From entries [n, k] of the whole vocabulary."""
        import torch

        used = answer.probabilities > 0 if self.drawn else torch.ones_like(answer.entries, dtype=torch.bool)
        tensors = {"entries": _to_bytes(answer.entries[used], self._bytes("entries"))}
        if answer.rest is None:
            counts = (answer.probabilities[used].double() * self.header.draws).round().long()
            tensors["more"] = _to_bytes(counts - 1, self._bytes("more"))
        else:
            tensors["log_probabilities"] = answer.probabilities[used].log().half()
            tensors["log_rest"] = answer.rest.log().half()
        return tensors | {"entropy": answer.entropy.half()}

    def entries(self, tensors: "Mapping[str, Tensor]") -> int:
        return len(tensors["entries"])

    def decode(self, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        import torch

        tokens, fields = len(tensors["entropy"]), self.empty(len(tensors["entropy"]))
        counts = _from_bytes(tensors["more"]) + 1 if self.drawn else None
        used = torch.arange(self.most) < self._numbers(tokens, counts).unsqueeze(-1)
        if int(used.sum()) != len(tensors["entries"]):
            raise DataError("a sample's answers are damaged: its tokens have other entries than their counts say")
        fields["entries"][used] = _from_bytes(tensors["entries"]).to(torch.int32)
        if counts is not None:
            fields["probabilities"][used] = counts.float() / self.header.draws
        else:
            fields["probabilities"][used] = tensors["log_probabilities"].float().exp()
            fields["rest"] = tensors["log_rest"].float().exp()
        return fields | {"entropy": tensors["entropy"].float()}

    def _numbers(self, tokens: int, counts: "Tensor | None") -> "Tensor":
        """Entries of each token [n]: of drawn ones as many as have its draws between them."""
        import torch

        if counts is None:
            return torch.full((tokens,), self.most)
        owners = torch.div(counts.cumsum(0) - 1, self.header.draws, rounding_mode="floor")
        return torch.bincount(owners.clamp(max=tokens), minlength=tokens)[:tokens]

    def empty(self, length: int) -> "dict[str, Tensor]":
        import torch

        fields = {
            "entries": torch.zeros(length, self.most, dtype=torch.int32),
            "probabilities": torch.zeros(length, self.most),
            "entropy": torch.zeros(length),
        }
        return fields if self.drawn else fields | {"rest": torch.zeros(length)}

    def _bytes(self, name: str) -> int:
        width = self.columns[name].width
        assert width is not None
        return width


def form_of(header: Header) -> "Hidden | Entries":
    return Hidden(header) if header.keep == "hidden" else Entries(header)


def _width(largest: int) -> int:
    """Bytes that hold a number up to `largest`."""
    return max(1, -(-largest.bit_length() // 8))


def _to_bytes(numbers: "Tensor", width: int) -> "Tensor":
    import torch

    return torch.stack([(numbers >> 8 * place) & 255 for place in range(width)], dim=-1).to(torch.uint8)


def _from_bytes(data: "Tensor") -> "Tensor":
    import torch

    places = torch.tensor([256**place for place in range(data.shape[-1])])
    result: torch.Tensor = (data.long() * places).sum(dim=-1)
    return result
