"""The text that a model is calibrated on, as random sequences of full length."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config import DataConfig, QuantizeConfig
from nemo_minitron.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from nemo_minitron.data.sources import Corpus

DEFAULT_LENGTH = 512
#: Characters of text that are read for each token that is wanted: more than any tokenizer puts into one on average.
CHARACTERS_A_TOKEN = 8
#: Below this many sequences the largest activations of a squared ReLU are easily missed.
FEW_SAMPLES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Where sequences come from, checked.

    Attributes:
        length: tokens a sequence.
        inputs: name -> file that is read, for the manifest.
        draw: returns the sequences [n, length] (int64).
    """

    length: int
    inputs: dict[str, str]
    draw: "Callable[[], torch.Tensor]"


def prepare(config: QuantizeConfig, model: Checkpoint) -> Calibration:
    """The calibration text of a configuration, checked to fit the model before anything is run.

    Raises:
        ConfigError: no tokenizer, or sequences longer than the model takes.
        DataError: the text is missing, unreadable, too short, or was tokenised for another model.
    """
    a = model.architecture
    length = config.seq_length or min(DEFAULT_LENGTH, a.seq_length)
    if length > a.seq_length:
        raise ConfigError(f"seq_length = {length} is above the model's {a.seq_length}", "minitron quantize")
    source = Path(_source(config)).expanduser()
    if (source / "train.idx").is_file():
        return _from_indexed(str(source), config, a.vocab_size - a.vocab_padding, length)
    return _from_text(config, model, length)


def _source(config: QuantizeConfig) -> str:
    """What the text is read from; the configuration was checked to name it."""
    assert config.data.source is not None
    return config.data.source


def check_enough(tokens: int, config: QuantizeConfig, length: int) -> None:
    """Raises DataError where the text does not hold the sequences that are asked for."""
    if tokens < config.num_samples * length + 1:
        fitting = (tokens - 1) // length
        remedy = f"num_samples={fitting}, " if fitting else ""
        raise DataError(
            f"{config.data.source} holds {tokens} tokens, {config.num_samples} sequences of {length} are "
            f"{config.num_samples * length}: give {remedy}a shorter seq_length or more text"
        )


def _from_indexed(folder: str, config: QuantizeConfig, tokens: int, length: int) -> Calibration:
    from nemo_minitron.data.module import check_fits, paths, read_header, resolve_prefixes

    blend = resolve_prefixes(folder)["train"]
    prefixes = paths(blend)
    check_enough(sum(read_header(prefix).tokens for prefix in prefixes), config, length)
    check_fits({"train": blend}, seq_length=length, vocab_size=tokens)

    def draw() -> "torch.Tensor":
        from nemo_minitron.data.samples import random_sequences

        return random_sequences(prefixes, config.num_samples, length, config.seed)[0][:, :-1]

    return Calibration(length=length, inputs={"data": f"{prefixes[0]}.bin"}, draw=draw)


def _from_text(config: QuantizeConfig, model: Checkpoint, length: int) -> Calibration:
    """Documents drawn at random from all of the text, tokenised, joined by their end-of-document tokens."""
    from nemo_minitron.data.sources import open_corpus
    from nemo_minitron.data.tokenizer import load_tokenizer

    name = config.data.tokenizer or model.tokenizer
    if name is None:
        raise ConfigError(
            f"{model.path} has no tokenizer to read {config.data.source} with: give data.tokenizer=DIR",
            "minitron quantize",
        )
    documents, inputs = _documents(config, open_corpus)
    tokenizer = load_tokenizer(name)
    wanted = config.num_samples * length + 1
    stream: list[int] = []
    for text in _shuffled(documents, wanted * CHARACTERS_A_TOKEN, config.seed):
        stream += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    check_enough(len(stream), config, length)
    rows = model.architecture.vocab_size - model.architecture.vocab_padding
    if max(stream) >= rows:
        raise DataError(
            f"the tokenizer {name} makes the token {max(stream)}, the model's embedding has {rows} rows: give "
            "data.tokenizer=DIR with the model's own"
        )

    def draw() -> "torch.Tensor":
        import torch

        starts = random.Random(config.seed).sample(range(len(stream) - length), config.num_samples)
        return torch.tensor([stream[start : start + length] for start in starts])

    local = {"calibration_tokenizer": name} if config.data.tokenizer and Path(name).is_dir() else {}
    return Calibration(length=length, inputs=inputs | local, draw=draw)


def _documents(
    config: QuantizeConfig, open_corpus: "Callable[[DataConfig], Corpus]"
) -> tuple[Callable[[], Iterator[str]], dict[str, str]]:
    """All documents that may be drawn, and the files that they come from; a single file is not split."""
    source = Path(_source(config)).expanduser()
    if source.is_file():
        from nemo_minitron.data.sources import read_documents

        return (lambda: read_documents(source, config.data.text_key)), {"data": str(source)}
    data = DataConfig(output="-", source=_source(config), text_key=config.data.text_key, seed=config.seed)
    corpus = open_corpus(data)
    return corpus.splits["train"], corpus.inputs


def _shuffled(documents: Callable[[], Iterator[str]], characters: int, seed: int) -> Iterator[str]:
    """Documents in an order drawn by the seed, until they hold so many characters; reads all of them twice."""
    lengths = [len(text) for text in documents()]
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    chosen, total = {}, 0
    for place, number in enumerate(order):
        if total >= characters:
            break
        chosen[number] = place
        total += lengths[number]
    texts = {chosen[number]: text for number, text in enumerate(documents()) if number in chosen}
    for place in sorted(texts):
        yield texts[place]
