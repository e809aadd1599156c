"""What a folder of answers says of itself, answers.json; written before the first answer."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import write_json
from nemo_minitron.config.schemas.teaching import KEEP, PRECISIONS
from nemo_minitron.errors import DataError

HEADER, OUTPUT, SHARDS = "answers.json", "output.safetensors", "shards"
VERSION = 1
LIMIT = 64 << 20
#: No size here is larger.
LARGEST = 1 << 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What was asked of which teacher.

    Attributes:
        keep, precision, draws, top_k: see AnswersConfig.
        hidden_size, vocab_size: the teacher's; the vocabulary with its padding.
        seq_length: labels that a sample had room for.
        text: whether the samples are windows of text, all of that length.
        teacher: Checkpoint.content.
        tokenizer: `tokenizer_fingerprint`.
        data: name -> sampled fingerprint of each file that was read.
        samples, tokens: of each shard.
        version: of this form.
    """

    keep: str
    precision: str
    draws: int
    top_k: int
    hidden_size: int
    vocab_size: int
    seq_length: int
    text: bool
    teacher: str
    tokenizer: str
    data: Mapping[str, str]
    samples: list[int]
    tokens: list[int]
    version: int = VERSION

    def write(self, folder: Path) -> None:
        write_json(folder / HEADER, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Header":
        """The header of a folder; raises DataError where there is none, or one that says no such things."""
        path = folder / HEADER
        if not path.is_file():
            raise DataError(f"{folder} holds no {HEADER}: it is no folder of a teacher's answers (minitron teach)")
        if path.stat().st_size > LIMIT:
            raise DataError(f"{path} has {path.stat().st_size} bytes, too many for what it is")
        try:
            header = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path} is damaged ({str(error)[:80]}); copy it again") from None
        problem = header._problem()
        if problem:
            raise DataError(f"{path} is not of the form that this version reads: {problem}")
        return header

    def _problem(self) -> str | None:
        """The first thing that is wrong with values from a file."""
        if self.version != VERSION:
            return f"version {self.version!r:.40} and not {VERSION}"
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), kinds[field.name]
            plain = typing.get_origin(kind) or kind
            fits = isinstance(value, dict) if plain not in (int, str, bool, list) else type(value) is plain
            sizes = value if isinstance(value, list) else [value] if kind is int else []
            if not fits or not all(type(size) is int and 0 <= size < LARGEST for size in sizes):
                return f"{field.name} = {value!r:.40}"
        if self.keep not in KEEP or self.precision not in PRECISIONS:
            return f"keep = {self.keep!r:.40}, precision = {self.precision!r:.40}"
        if not all((self.draws, self.top_k, self.hidden_size, self.vocab_size, self.seq_length)):
            return "a size of 0"
        if len(self.samples) != len(self.tokens):
            return f"samples of {len(self.samples)} shards and tokens of {len(self.tokens)}"
        return None


def shard_path(folder: Path, number: int) -> Path:
    return folder / SHARDS / f"{number:05}.safetensors"


def tokenizer_fingerprint(name: str) -> str:
    """SHA-256 of the tokens and their numbers: the same for the same vocabulary in any files."""
    import hashlib

    from nemo_minitron.data.tokenizer import load_tokenizer

    vocabulary: Any = sorted(load_tokenizer(name).get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
