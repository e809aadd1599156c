"""The tokenizer of a checkpoint: files, or only the name that they have on the Hugging Face hub."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints import sentencepiece as sentencepiece_file
from nemo_minitron.checkpoints.file_bytes import Bytes, InMemory
from nemo_minitron.checkpoints.files import Files, folder_files
from nemo_minitron.checkpoints.tokenizer_config import CONFIG, check_same_class, common_words, for_sentencepiece
from nemo_minitron.errors import CheckpointError

HUGGINGFACE, SENTENCEPIECE = "huggingface", "sentencepiece"
MODEL, DEFINITION = "tokenizer.model", "tokenizer.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
#: Folder beside the others with further templates of conversations.
TEMPLATES = "additional_chat_templates"
#: Files with a vocabulary: one of them makes a tokenizer.
VOCABULARIES = (
    DEFINITION, MODEL, "tokenizer.model.v*", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "*.tiktoken",
)  # fmt: skip
#: Files that make up a tokenizer in a Hugging Face directory, as patterns of the hub's library too.
FILES = (
    *VOCABULARIES, CONFIG, SPECIAL_MAP, ADDED, "merges.txt", "chat_template.jinja", "chat_template.json",
    f"{TEMPLATES}/*.jinja",
)  # fmt: skip
#: The model's configuration: transformers takes the tokenizer's class from it where tokenizer_config.json names none.
MODEL_CONFIG = "config.json"
HUB_TIMEOUT = 5.0
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
#: Keys of config.json and generation_config.json with ids of special tokens.
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer on disk.

    Attributes:
        kind: ``huggingface`` (files that transformers loads) or ``sentencepiece`` (one model file).
        name: its name on the hub, where that is known.
        files: name -> bytes; empty where only the name is known.
    """

    kind: str = HUGGINGFACE
    name: str | None = None
    files: Mapping[str, Bytes] = dataclasses.field(default_factory=dict)

    def hub_name(self) -> str:
        """The name of a tokenizer that is nothing but a name."""
        assert self.name is not None
        return self.name

    def describe(self) -> str:
        """One line for people."""
        if not self.files:
            return f"{self.name} on the hub; its files are not in the checkpoint"
        return f"{self.kind}, {', '.join(sorted(self.files))}"

    def contents(self) -> dict[str, bytes]:
        """Name -> bytes of the files, as transformers reads them.

        Raises:
            CheckpointError: a SentencePiece model is damaged.
        """
        contents = {name: data.read() for name, data in self.files.items()}
        if self.kind == SENTENCEPIECE:
            contents[CONFIG] = (json.dumps(for_sentencepiece(self._sentencepiece()), indent=2) + "\n").encode()
        return contents

    def copy_to(self, folder: Path) -> None:
        """Writes the files as transformers reads them; a config.json that is there stays.

        Raises:
            CheckpointError: a SentencePiece model is damaged, or the config.json that is there means another class of
                tokenizers.
        """
        for name, data in self.contents().items():
            path = folder / name
            if name == MODEL_CONFIG and path.is_file():
                check_same_class(data, path)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def size(self) -> int | None:
        """Tokens that the files know: one more than the highest id; None where they do not say."""
        ids = self._vocabulary.values()
        return max(ids) + 1 if ids else None

    def special_tokens(self) -> dict[str, int]:
        """``bos_token_id``, ``eos_token_id``, ``pad_token_id`` -> id, of those that the files name."""
        texts = self._special_texts()
        return {name: self._vocabulary[text] for name, text in texts.items() if text in self._vocabulary}

    def _special_texts(self) -> dict[str, str]:
        """Key of SPECIAL_TOKENS -> the token's text. A map of special tokens counts where tokenizer_config.json is of
        the older kind, which does not list the added tokens."""
        config = self._json(CONFIG)
        stated = config if "added_tokens_decoder" in config else {**config, **self._json(SPECIAL_MAP)}
        texts = {}
        for key in SPECIAL_TOKENS:
            value = stated.get(key.removesuffix("_id"))
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                texts[key] = value
        if texts or MODEL not in self.files:
            return texts
        try:
            model = self._sentencepiece()
        except CheckpointError:
            return {}
        ids = {f"{name}_token_id": number for name, number in model.ids.items()}
        return {key: model.pieces[ids[key]] for key in SPECIAL_TOKENS if key in ids}

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        """Token -> id, with the tokens that are added to the vocabulary; empty where the files do not say.

        Where there is a tokenizer.json, it alone counts, as in transformers.
        """
        definition = self._json(DEFINITION)
        ids: dict[Any, Any]
        if DEFINITION in self.files:
            ids = dict(_ids_of_model(definition.get("model")))
            added = definition.get("added_tokens")
            tokens = [token for token in (added if isinstance(added, list) else []) if isinstance(token, dict)]
            ids = ids and ids | {token.get("content"): token.get("id") for token in tokens}
        else:
            ids = dict(self._pieces() or self._json("vocab.json"))
            decoder = self._json(CONFIG).get("added_tokens_decoder")
            listed = {
                token.get("content"): int(number)
                for number, token in (decoder if isinstance(decoder, dict) else {}).items()
                if isinstance(token, dict) and number.isdecimal()
            }
            ids = ids and ids | self._json(ADDED) | listed
        return {text: number for text, number in ids.items() if isinstance(text, str) and type(number) is int}

    def _pieces(self) -> dict[str, int]:
        """Token -> id of a SentencePiece model; empty where there is none, or it is of another kind or damaged."""
        if MODEL not in self.files:
            return {}
        try:
            return {piece: number for number, piece in enumerate(self._sentencepiece().pieces)}
        except CheckpointError:
            return {}

    def _json(self, name: str) -> dict[str, Any]:
        """A mapping in a file of JSON; an empty one where there is none."""
        try:
            loaded = json.loads(self.files[name].read()) if name in self.files else {}
        except (ValueError, RecursionError):
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def _sentencepiece(self) -> sentencepiece_file.SentencePieceModel:
        data = self.files[MODEL]
        try:
            return sentencepiece_file.read(data.read())
        except CheckpointError as error:
            raise CheckpointError(f"{data.path}: {MODEL}: {error}") from None


def _ids_of_model(model: Any) -> dict[str, int]:
    """Token -> id of the model in a tokenizer.json: a mapping, or a list of tokens and scores."""
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return vocabulary
    if isinstance(vocabulary, list) and all(isinstance(entry, list) and entry for entry in vocabulary):
        return {entry[0]: number for number, entry in enumerate(vocabulary) if isinstance(entry[0], str)}
    return {}


def is_file(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer; folders with slashes."""
    return any(fnmatchcase(name, pattern) for pattern in FILES if name.count("/") == pattern.count("/"))


def in_folder(files: Files, name: str | None = None) -> Tokenizer | None:
    """The tokenizer among `files`; with none there, the one called `name`, or None.

    What only transformers 5 reads is put in words that transformers 4 reads as well.

    Raises:
        CheckpointError: a file is not there but for its Git-LFS pointer.
    """
    own = {file: files[file] for file in files.names() if is_file(file)}
    if not any(fnmatchcase(file, pattern) for file in own for pattern in VOCABULARIES):
        return Tokenizer(name=name) if name else None
    if own.keys() == {MODEL}:
        return Tokenizer(kind=SENTENCEPIECE, name=name, files=own)
    tokenizer = Tokenizer(name=name, files=own)
    config = tokenizer._json(CONFIG)
    common = common_words(config)
    if common != config:
        data = (json.dumps(common, indent=2) + "\n").encode()
        own[CONFIG] = InMemory(own[CONFIG].path, 0, len(data), data)
    if not config.get("tokenizer_class") and MODEL_CONFIG in files:
        own[MODEL_CONFIG] = files[MODEL_CONFIG]
    return dataclasses.replace(tokenizer, files=own)


def cached(tokenizer: Tokenizer) -> Path:
    """A folder in the user's cache with the tokenizer's files as transformers reads them, named by their content.

    Raises:
        CheckpointError: a file is damaged.
    """
    contents, digest = tokenizer.contents(), hashlib.sha256()
    for name in sorted(contents):
        digest.update(f"\0{name}\0".encode() + hashlib.sha256(contents[name]).digest())
    folder = _cache() / digest.hexdigest()[:32]
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as beside:
            tokenizer.copy_to(Path(beside) / "tokenizer")
            try:
                os.rename(Path(beside) / "tokenizer", folder)
            except OSError:
                if not folder.is_dir():
                    raise
    return folder


def _cache() -> Path:
    """The user's cache of tokenizers; in a home that cannot be written to, a folder of this process."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_minitron" / "tokenizers"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="minitron-"))


def loadable(name: str) -> str:
    """The directory or hub name that transformers, of any version, loads the tokenizer `name` from.

    That is the user's own directory, unless its files have to be put in other words first.

    Raises:
        CheckpointError: a file is damaged, or not there but for its Git-LFS pointer.
    """
    if not Path(name).is_dir():
        return name
    tokenizer = in_folder(_files(Path(name)))
    if tokenizer is None:
        return name
    changed = any(isinstance(data, InMemory) for data in tokenizer.files.values())
    return str(cached(tokenizer)) if changed or tokenizer.kind == SENTENCEPIECE else name


def _files(folder: Path) -> Files:
    return folder_files(folder, deep=False, entered=(TEMPLATES,))


def from_hub(tokenizer: Tokenizer, note: Callable[[str], None]) -> Tokenizer:
    """A tokenizer that is only a name, with its files from the Hugging Face hub where that can be reached.

    Args:
        note: is told, in one message, where it cannot; the name then travels alone.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = snapshot_download(tokenizer.hub_name(), allow_patterns=list(FILES), etag_timeout=HUB_TIMEOUT)
        fetched = in_folder(_files(Path(folder)), tokenizer.name)
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        fetched = None
    if fetched is None or not fetched.files:
        note(
            f"note: the tokenizer {tokenizer.name} is only named in the checkpoint and could not be had from the hub; "
            "it travels as that name. tokenizer=DIR puts its files in"
        )
        return tokenizer
    return fetched


def named(name: str) -> Tokenizer | None:
    """The tokenizer of a directory or a hub name, as settings name it."""
    return from_directory(name) if Path(name).is_dir() else Tokenizer(name=name)


def from_directory(path: str | Path) -> Tokenizer:
    """The tokenizer that a user names by its directory; raises CheckpointError where there is none."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"tokenizer={path} is not a directory; name the one that holds the tokenizer's files")
    tokenizer = in_folder(_files(folder))
    if tokenizer is None:
        raise CheckpointError(f"tokenizer={path} holds no tokenizer (tokenizer.json, tokenizer.model...)")
    return tokenizer
