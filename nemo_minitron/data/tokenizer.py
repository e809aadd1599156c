"""Tokenizers: a Hugging Face name or directory, or a byte-level BPE trained here."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_minitron.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt",
    "added_tokens.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip


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


def load_tokenizer(name: str) -> Any:
    """The Hugging Face tokenizer of a directory or a hub name; no code that comes with it is run.

    Raises:
        DataError: there is none, the hub is out of reach, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    looks_like_path = Path(name).exists() or name.startswith((".", "/", "~"))
    if looks_like_path and not Path(name).is_dir():
        raise DataError(f"the tokenizer {name} is not a directory; give one with a tokenizer.json or tokenizer.model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = (
            "give a directory with a tokenizer.json or tokenizer.model"
            if looks_like_path
            else "it is not a local directory, and the hub did not give it: check name, network and login, or download "
            "it and give the directory"
        )
        raise DataError(f"the tokenizer {name} cannot be loaded ({reason}); {remedy}") from None
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer {name} has no end-of-sequence token, which ends each document")
    return tokenizer


def save_tokenizer(tokenizer: Any, name: str, folder: Path) -> None:
    """Puts a tokenizer's files into `folder`: a directory's own as they are, a hub's as transformers saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    if Path(name).is_dir():
        for file in FILES:
            if (Path(name) / file).is_file():
                shutil.copyfile(Path(name) / file, folder / file)
        return
    tokenizer.save_pretrained(str(folder))
