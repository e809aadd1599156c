"""Settings of generation: which tokens begin, end and pad a text, and how the next token is drawn.

transformers keeps them in generation_config.json and, the special tokens, in config.json too. NeMo has no place for
them: a conversion keeps them in a file of their own, which NeMo passes over.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.files import Files, read_json
from nemo_minitron.checkpoints.tokenizer import SPECIAL_TOKENS, Tokenizer
from nemo_minitron.checkpoints.untrusted import shown
from nemo_minitron.errors import CheckpointError

FILE = "generation_config.json"
#: What transformers notes of itself there.
VERSION = "transformers_version"


def read(files: Files, name: str = FILE) -> dict[str, Any]:
    """Settings in the file `name`; none where it is not there.

    Raises:
        CheckpointError: it is no JSON mapping, or a special token's id is none.
    """
    if name not in files:
        return {}
    loaded = read_json(files, name)
    return checked({key: value for key, value in loaded.items() if key != VERSION}, f"{files.where}/{name}")


def checked(settings: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The settings; raises CheckpointError where a special token is neither an id nor, at the end, several."""
    for name in SPECIAL_TOKENS:
        value = settings.get(name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(number) is int for number in ids):
            raise CheckpointError(f"{source}: {name} = {shown(value)} is no token's id")
    return settings


def completed(settings: Mapping[str, Any], tokenizer: Tokenizer | None, tokens: int) -> dict[str, Any]:
    """The settings, with the tokenizer's special tokens where they name none.

    A token that ends a text and pads as well is the end only: transformers pads with the end where nothing is named for
    it, and does not train the embedding of what is.

    Args:
        tokens: of the model's vocabulary; others than these are not added.
    """
    known = tokenizer.special_tokens() if tokenizer is not None else {}
    begin, end, pad = SPECIAL_TOKENS
    if known.get(pad) in (known.get(begin), known.get(end)):
        known.pop(pad, None)
    return {name: number for name, number in known.items() if number < tokens} | dict(settings)
