"""NeMo's data module on samples of instructions. Import it late: it imports NeMo."""

import random
from typing import Any

import torch
from nemo.collections.llm import PreTrainingDataModule

from nemo_minitron.data.instruction_samples import Sample, Samples


class Padded(torch.utils.data.Dataset):
    """Samples as what Megatron's model takes, padded at their end; the causal mask keeps padding out of what is before.

    Args:
        samples: in the order of one pass.
        length: tokens a sample [s].
        total: how many samples to give.
        repeat: pass after pass, each in an order of its own; false: one pass as it is, then samples that weigh nothing.
        seed: of the orders.
    """

    def __init__(self, samples: list[Sample], length: int, total: int, *, repeat: bool, seed: int, padding: int):
        self.samples, self.length, self.total = samples, length, total
        self.repeat, self.seed, self.padding = repeat, seed, padding
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if self.repeat:
            return self.item(self.samples[self.order(number // len(self.samples))[number % len(self.samples)]])
        return self.item(
            self.samples[number] if number < len(self.samples) else Sample([self.padding] * 2, [False] * 2)
        )

    def order(self, epoch: int) -> list[int]:
        """The order of a pass; the same whatever was read before."""
        if self._order[0] != epoch:
            numbers = list(range(len(self.samples)))
            random.Random(f"{self.seed}-{epoch}").shuffle(numbers)
            self._order = (epoch, numbers)
        return self._order[1]

    def item(self, sample: Sample) -> dict[str, torch.Tensor]:
        missing = self.length + 1 - len(sample.ids)
        ids = torch.tensor(sample.ids + [self.padding] * missing)  # [s + 1]
        learnt = torch.tensor(sample.learnt + [False] * missing)
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": learnt[1:].float(),
            "position_ids": torch.arange(self.length),
        }


class InstructionDataModule(PreTrainingDataModule):
    """Gives samples in place of text; where a run goes on from is NeMo's own count of consumed samples.

    Args:
        samples: the samples of each split.
        padding: the token that fills samples up.
        settings: further arguments of PreTrainingDataModule.
    """

    def __init__(self, samples: Samples, *, padding: int, **settings: Any):
        super().__init__(paths=list(samples.files.values())[:1], **settings)
        self.samples, self.padding = samples, padding

    def build(
        self,
        trainer_max_steps: int,
        trainer_val_check_interval: int,
        trainer_limit_val_batches: int | float,
        trainer_limit_test_batches: int | float,
    ) -> None:
        """Makes the datasets: training goes on for as many passes as it takes, validation is one pass at most."""
        batch = self.data_sampler.global_batch_size
        batches = min(-(-len(self.samples.validation) // batch), int(trainer_limit_val_batches))
        common = {"seed": self.seed, "padding": self.padding}
        self._train_ds = Padded(self.samples.train, self.seq_length, trainer_max_steps * batch, repeat=True, **common)
        self._validation_ds = Padded(self.samples.validation, self.seq_length, batches * batch, repeat=False, **common)
        self._test_ds = self._validation_ds
