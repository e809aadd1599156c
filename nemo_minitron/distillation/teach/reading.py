"""Which samples a run reads, by the order that its data module will read them in."""

from collections.abc import Iterable

from nemo_minitron.config import TrainingConfig
from nemo_minitron.data.sample_sets import Passes, SampleSet
from nemo_minitron.distillation.teach.listing import Listing, list_pieces
from nemo_minitron.training.inputs import Inputs, mixture_of


def what_is_read(config: TrainingConfig, inputs: Inputs, samples: int | None, tokens: int | None = None) -> Listing:
    """The pieces of what a run reads in training and then in validation, each once.

    Shares of a blend that follow the losses may lead anywhere: then it is all of the training split.

    Args:
        samples: that training reads; None: all there are, or with `tokens` as many as have so many.
        tokens: of training, at most.
    """
    sets = inputs.sets()
    assert sets is not None, "kept answers are of fixed windows or rows"
    limit = config.trainer.limit_val_batches * config.model.global_batch_size
    every = len(sets["train"])
    order = Passes(every, config.seed)
    in_passes: Iterable[int] = (order[number] for number in range(min(every, samples or every)))
    if not inputs.sources:
        numbers = {"train": in_passes, "validation": range(min(len(sets["validation"]), limit))}
        return list_pieces(sets, numbers, tokens)
    mixture = mixture_of(config, inputs.sources, sets)
    whole = config.model.data.dynamic or (samples is None and tokens is None)
    drawn = (mixture.train[number] for number in range(_most(sets["train"], samples, tokens)))
    training = range(every) if whole else drawn
    return list_pieces(sets, {"train": training, "validation": mixture.validation.numbers}, tokens)


def _most(training: SampleSet, samples: int | None, tokens: int | None) -> int:
    """No run of so many samples or tokens reads more samples; each has a token."""
    return samples if samples is not None else tokens if tokens is not None else len(training)
