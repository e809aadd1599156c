"""A folder of answers, read: mapped into memory, found by what the teacher read.

Folders are untrusted: every size is checked before it is believed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from nemo_minitron.checkpoints.file_bytes import whole
from nemo_minitron.checkpoints.storage import safetensors
from nemo_minitron.checkpoints.tensors import Runs
from nemo_minitron.data.sample_sets import Piece
from nemo_minitron.distillation.teach.forms import ENDS, ENTRY_ENDS, KEYS, LOSS, Column, form_of
from nemo_minitron.distillation.teach.header import HEADER, OUTPUT, Header, shard_path
from nemo_minitron.distillation.teach.listing import KEY_BYTES, key_of, several
from nemo_minitron.errors import CheckpointError, DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

T = TypeVar("T")
#: Dtypes that NumPy has not, as what has the same size.
CARRIERS = {"bfloat16": "int16", "float8_e4m3fn": "uint8"}


class _Place(NamedTuple):
    """Where the answers to a piece lie: the shard, and its rows of tokens and of entries there."""

    shard: int
    tokens: slice
    entries: slice


class Kept:
    """The answers in a folder.

    Attributes:
        folder: where they lie.
        header: what they are.
        form: how they are written.

    Raises:
        DataError: it is no such folder, or not all that it says is there and whole.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.header = Header.read(self.folder)
        self.form = form_of(self.header)
        try:
            self._shards = [self._checked_shard(number) for number in range(len(self.header.samples))]
            self._output = self._checked_output()
        except CheckpointError as error:
            raise self._cut_short(str(error)) from None
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        self._index()

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps, which each process makes for itself."""
        return self.__dict__ | {"_maps": {}}

    def found(self, keys: "np.ndarray") -> "np.ndarray":
        """Whether each of the keys [n, 16] is there [n]."""
        return self._rows(keys) >= 0

    def fields(self, piece: Piece) -> "dict[str, Tensor] | None":
        """The answers to a piece, each [n, ..]; None: they are not there."""
        place = self._place(piece)
        if place is None:
            return None
        return self.form.decode(
            {
                name: self._tensor(place.shard, name, column.dtype, place.entries if column.by_entry else place.tokens)
                for name, column in self.form.columns.items()
            }
        )

    def loss(self, piece: Piece) -> "Tensor | None":
        """The teacher's own loss of each label of a piece [n], in nats; None: it is not there."""
        place = self._place(piece)
        return None if place is None else self._tensor(place.shard, LOSS, "float16", place.tokens).double()

    def _place(self, piece: Piece) -> "_Place | None":
        import numpy

        row = int(self._rows(numpy.frombuffer(key_of(piece), dtype=numpy.uint8).reshape(1, KEY_BYTES))[0])
        if row < 0:
            return None
        tokens, entries = slice(*self._tokens[row]), slice(*self._entries[row])
        if tokens.stop - tokens.start != len(piece.ids) - 1:
            raise self._cut_short(f"a sample of {len(piece.ids) - 1} tokens has {tokens.stop - tokens.start} answers")
        return _Place(int(self._shard[row]), tokens, entries)

    def output_matrix(self, first: int, rows: int) -> "Tensor":
        """Rows of the output matrix [rows, g]; of hidden states only."""
        assert self._output is not None, "only hidden states have an output matrix"
        return self._output.rows(first, first + rows).read()

    def _tensor(self, shard: int, name: str, dtype: str, rows: slice) -> "Tensor":
        """Rows of a shard's tensor, copied."""
        import torch

        return torch.from_numpy(self._map(shard, name, dtype)[rows].copy()).view(getattr(torch, dtype))

    def _map(self, shard: int, name: str, dtype: str) -> "np.ndarray":
        import numpy

        if (shard, name) not in self._maps:
            tensor = self._shards[shard][name]
            run = tensor.runs[0]
            self._maps[shard, name] = (
                numpy.memmap(run.path, CARRIERS.get(dtype, dtype), "r", run.offset, tensor.shape)
                if run.length
                else numpy.empty(tensor.shape, CARRIERS.get(dtype, dtype))
            )
        return self._maps[shard, name]

    def _index(self) -> None:
        """The table of all samples, in the order of their keys."""
        import numpy

        keys, shard = [], []
        tokens: list[np.ndarray] = []
        entries: list[np.ndarray] = []
        for number, tensors in enumerate(self._shards):
            for ends, total, spans in (
                (tensors[ENDS].read().numpy(), self.header.tokens[number], tokens),
                (tensors[ENTRY_ENDS].read().numpy(), self._entries_of(number), entries),
            ):
                starts = numpy.concatenate([[0], ends[:-1]]).astype(numpy.int64)
                if len(ends) and (ends[-1] != total or (ends < starts).any() or ends[0] < 0):
                    raise self._cut_short(f"{shard_path(self.folder, number)}: its samples do not add up")
                spans.append(numpy.stack([starts, ends], axis=-1))
            keys.append(tensors[KEYS].read().numpy())
            shard.append(numpy.full(len(keys[-1]), number, dtype=numpy.uint32))
        flat = several(keys)
        order = numpy.argsort(flat, kind="stable")
        self._keys = flat[order]
        self._shard = numpy.concatenate([*shard, numpy.empty(0, dtype=numpy.uint32)])[order]
        nothing = numpy.empty((0, 2), dtype=numpy.int64)
        self._tokens = numpy.concatenate([*tokens, nothing])[order]
        self._entries = numpy.concatenate([*entries, nothing])[order]

    def _rows(self, keys: "np.ndarray") -> "np.ndarray":
        """The row of each of the keys [n, 16] in the table; -1: it is not there [n]."""
        import numpy

        wanted = several([keys])
        if not len(self):
            return numpy.full(len(wanted), -1)
        rows = numpy.searchsorted(self._keys, wanted).clip(max=len(self) - 1)
        return numpy.where(self._keys[rows] == wanted, rows, -1)

    def _entries_of(self, shard: int) -> int:
        tensors = self._shards[shard]
        return next((tensors[name].shape[0] for name, one in self.form.columns.items() if one.by_entry), 0)

    def _checked_shard(self, number: int) -> dict[str, Runs]:
        """The tensors of a shard, of the shapes that the header and the form give."""
        path = shard_path(self.folder, number)
        tensors = safetensors.read(whole(path))
        samples, tokens = self.header.samples[number], self.header.tokens[number]
        shapes = {KEYS: ("uint8", (samples, KEY_BYTES)), ENDS: ("int64", (samples,)), ENTRY_ENDS: ("int64", (samples,))}
        by_entry = [name for name, column in self.form.columns.items() if column.by_entry and name in tensors]
        entries = tensors[by_entry[0]].shape[:1] if by_entry else (0,)
        for name, column in {**self.form.columns, LOSS: Column("float16")}.items():
            rows = entries if column.by_entry else (tokens,)
            shapes[name] = (column.dtype, rows if column.width is None else (*rows, column.width))
        for name, (dtype, shape) in shapes.items():
            if name not in tensors or (tensors[name].dtype, tensors[name].shape) != (dtype, shape):
                found = f"{tensors[name].dtype} {[*tensors[name].shape]}" if name in tensors else "none"
                raise CheckpointError(f"{path}: {name} should be {dtype} {[*shape]}, it has {found}")
        return tensors

    def _checked_output(self) -> Runs | None:
        if self.header.keep != "hidden":
            return None
        path = self.folder / OUTPUT
        weight = safetensors.read(whole(path)).get("weight")
        shape = (self.header.vocab_size, self.header.hidden_size)
        if weight is None or weight.shape != shape or weight.dtype not in ("float32", "bfloat16", "float16"):
            raise CheckpointError(f"{path} should hold an output matrix {[*shape]}")
        return weight

    def _cut_short(self, reason: str) -> DataError:
        return DataError(
            f"{self.folder} is not whole, {self.folder / HEADER} says more than is there: {reason}. Copy it again, or "
            "give the command that made it again"
        )


class Together:
    """The answers of one teacher in one folder, or in several: what a first one lacks a second one has."""

    def __init__(self, folders: Sequence[Kept]):
        self.folders = list(folders)
        self.header, self.form = folders[0].header, folders[0].form

    def found(self, keys: "np.ndarray") -> "np.ndarray":
        """Whether each of the keys [n, 16] is there [n]."""
        import numpy

        return numpy.logical_or.reduce([folder.found(keys) for folder in self.folders])

    def output_matrix(self, first: int, rows: int) -> "Tensor":
        return self.folders[0].output_matrix(first, rows)

    def sample(self, pieces: Sequence[Piece], length: int) -> "dict[str, Tensor]":
        """The fields of a sample's batch, each [length, ..]: its pieces behind one another, nothing in padding.

        Raises:
            DataError: the answers to one are not there.
        """
        fields = self.form.empty(length)
        start = 0
        for piece in pieces:
            stop = start + len(piece.ids) - 1
            for name, value in self._first(piece, Kept.fields).items():
                fields[name][start:stop] = value
            start = stop
        return fields

    def loss(self, piece: Piece) -> "Tensor":
        """The teacher's own loss of each label of a piece [n], in nats."""
        return self._first(piece, Kept.loss)

    def _first(self, piece: Piece, read: "Callable[[Kept, Piece], T | None]") -> "T":
        for folder in self.folders:
            found = read(folder, piece)
            if found is not None:
                return found
        raise DataError(f"{self.folders[0].folder} lacks the answers to a sample of {len(piece.ids) - 1} tokens")
