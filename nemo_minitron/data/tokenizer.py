"""Tokenizers: a Hugging Face name or directory, or a byte-level BPE trained here."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.errors import DataError
from nemo_minitron.packages.versions import tokenizer_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_DOCUMENT = "<|endoftext|>"


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains a byte-level BPE on `texts` and writes it to `folder` as a Hugging Face tokenizer.

    The end-of-document token serves as beginning and end of sequence and as padding. The same texts give the same
    files.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_DOCUMENT,
        eos_token=END_OF_DOCUMENT,
        pad_token=END_OF_DOCUMENT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(folder))


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The Hugging Face tokenizer of a directory or a hub name; no code that comes with it is run.

    Raises:
        DataError: there is none, the hub is out of reach, or it has no end-of-sequence token.
    """
    looks_like_path = Path(name).exists() or name.startswith((".", "/", "~"))
    if looks_like_path and not Path(name).is_dir():
        raise DataError(f"the tokenizer {name} is not a directory; give one with a tokenizer.json or tokenizer.model")
    place = tokenizers.loadable(name)
    try:
        tokenizer = tokenizer_class(Path(place)).from_pretrained(place, use_fast=True, trust_remote_code=False)
        tokenizer.decode(tokenizer("a").input_ids)  # some of what is wrong shows only then
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a file that is not what it should be: the Rust library has errors of no kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = (
            "give a directory with a whole tokenizer.json or tokenizer.model"
            if looks_like_path
            else "it is not a local directory, and the hub did not give it: check name, network and login, or download "
            "it and give the directory"
        )
        raise DataError(f"the tokenizer {name} cannot be loaded ({reason}); {remedy}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer {name} has no end-of-sequence token, which ends each document")
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", name: str, folder: Path) -> None:
    """Puts a tokenizer's files into `folder`: a directory's own, a hub's as transformers saves them."""
    if Path(name).is_dir():
        tokenizers.from_directory(name).copy_to(folder)
    else:
        tokenizer.save_pretrained(str(folder))
