"""NeMo's data module on sets of samples. Import it late: it imports NeMo."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nemo.collections.llm import PreTrainingDataModule
from torch import Tensor

from nemo_minitron.data.blend import Blend, Mixture
from nemo_minitron.data.sample_sets import Once, Order, Passes, Piece, SampleSet, labels_of

#: Further fields of a sample's batch, from its pieces and the labels that it has room for.
Fields = Callable[[Sequence[Piece], int], dict[str, Tensor]]


class SampleDataset(torch.utils.data.Dataset):
    """Samples as what Megatron's model takes, padded at their end; the causal mask keeps padding out of what is before.

    Args:
        samples: by number.
        order: which of them is read when.
        total: how many samples a run reads.
        padding: the token that fills samples up.
        packed: whether the pieces of a sample see themselves alone.
        fields: gives further fields of the batch.
    """

    def __init__(
        self,
        samples: SampleSet,
        order: Order,
        total: int,
        *,
        padding: int,
        packed: bool = False,
        fields: Fields | None = None,
    ):
        self.samples, self.order, self.total = samples, order, total
        self.padding, self.packed, self.fields = padding, packed, fields

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        which = self.order[number]
        pieces = () if which is None else self.samples[which]
        item = filled(pieces, self.samples.length, self.padding)
        if self.packed:
            item |= boundaries(pieces, self.samples.length)
        if isinstance(self.samples, Blend):
            item["source"] = one_hot(self.samples, which)
        return item if self.fields is None else item | self.fields(pieces, self.samples.length)


def one_hot(blend: Blend, number: int | None) -> Tensor:
    """1 at the source that a sample is of, 0 at the others [k]; all 0 where there is no sample."""
    sources = torch.zeros(len(blend.names))
    if number is not None:
        sources[blend.source(number)] = 1.0
    return sources


def filled(pieces: Sequence[Piece], length: int, padding: int) -> dict[str, Tensor]:
    """Pieces behind one another and padding up to `length` [s]; a label is learnt where its piece says so."""
    tokens = torch.full((length,), padding)
    labels, mask = torch.full((length,), padding), torch.zeros(length)
    start = 0
    for piece in pieces:
        ids = torch.as_tensor(piece.ids)
        stop = start + len(ids) - 1
        tokens[start:stop], labels[start:stop] = ids[:-1], ids[1:]
        mask[start:stop] = torch.as_tensor(piece.learnt)[1:].float()
        if stop < length:
            tokens[stop] = ids[-1]
        start = stop
    return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": torch.arange(length)}


def boundaries(pieces: Sequence[Piece], length: int) -> dict[str, Tensor]:
    """Where pieces that see themselves alone begin and end, by the names of NeMo's packed data.

    Positions start anew in each. Padding is a piece of its own behind them.
    """
    lengths = [labels_of(piece) for piece in pieces]
    left = length - sum(lengths)
    lengths += [left] if left else []
    return {
        "position_ids": torch.cat([torch.arange(count) for count in lengths]),  # [s]
        "cu_seqlens": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),  # [pieces + 1]
        "max_seqlen": torch.tensor(max(lengths)),
    }


class SampleDataModule(PreTrainingDataModule):
    """Gives sets of samples in place of Megatron's; where a run goes on from is NeMo's own count of consumed samples.

    Args:
        train, validation: the samples of each split.
        files: what they were read from.
        padding: the token that fills samples up.
        packed: whether the pieces of a sample see themselves alone; a micro batch then is one sample.
        fields: gives further fields of a sample's batch.
        mixture: the orders in which blends are read.
        settings: further arguments of PreTrainingDataModule.
    """

    def __init__(
        self,
        train: SampleSet,
        validation: SampleSet,
        *,
        files: Sequence[str],
        padding: int,
        packed: bool = False,
        fields: Fields | None = None,
        mixture: Mixture | None = None,
        **settings: Any,
    ):
        super().__init__(paths=list(files)[:1], **settings)
        self.train, self.validation = train, validation
        self.options: dict[str, Any] = {"padding": padding, "packed": packed, "fields": fields}
        self.mixture = mixture

    def build(
        self,
        trainer_max_steps: int,
        trainer_val_check_interval: int,
        trainer_limit_val_batches: int | float,
        trainer_limit_test_batches: int | float,
    ) -> None:
        """Makes the datasets: training goes on for as many passes as it takes, validation is one pass at most."""
        batch = self.data_sampler.global_batch_size
        batches = min(-(-len(self.validation) // batch), int(trainer_limit_val_batches))
        training: Order = Passes(len(self.train), self.seed) if self.mixture is None else self.mixture.train
        once: Order = Once(len(self.validation)) if self.mixture is None else self.mixture.validation
        self._train_ds = SampleDataset(self.train, training, trainer_max_steps * batch, **self.options)
        self._validation_ds = SampleDataset(self.validation, once, batches * batch, **self.options)
        self._test_ds = self._validation_ds
