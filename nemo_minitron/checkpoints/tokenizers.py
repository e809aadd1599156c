"""The tokenizer of a checkpoint: files, or only the name that they have on the Hugging Face hub."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from nemo_minitron.checkpoints.files import Files, folder_files
from nemo_minitron.checkpoints.tensors import Bytes
from nemo_minitron.errors import CheckpointError

HUGGINGFACE, SENTENCEPIECE = "huggingface", "sentencepiece"
#: Files that make up a tokenizer in a Hugging Face directory.
FILES = re.compile(
    r"tokenizer(_config)?\.json|tokenizer\.model(\.v\d+)?|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|chat_template\.(jinja|json)|spiece\.model|tekken\.json|[\w.-]+\.tiktoken"
)
MODEL = "tokenizer.model"
#: The same, as the hub's library takes them.
HUB_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
HUB_TIMEOUT = 5.0
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
#: What lets transformers take a bare SentencePiece model; `legacy` gives its own ids to text that begins with a space.
FOR_SENTENCEPIECE = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
}


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

    def describe(self) -> str:
        """One line for people."""
        if not self.files:
            return f"{self.name} on the hub; its files are not in the checkpoint"
        return f"{self.kind}, {', '.join(sorted(self.files))}"

    def copy_to(self, folder: Path) -> None:
        """Writes the files as transformers reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data.read())
        if self.kind == SENTENCEPIECE:
            (folder / "tokenizer_config.json").write_text(json.dumps(FOR_SENTENCEPIECE, indent=2) + "\n")

    def size(self) -> int | None:
        """Tokens that the files know: one more than the highest id; None where they do not say."""
        if "tokenizer.json" in self.files:
            try:
                loaded = json.loads(self.files["tokenizer.json"].read())
                vocabulary = loaded["model"]["vocab"]
                ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
                ids += [token["id"] for token in loaded.get("added_tokens", [])]
                return max(ids) + 1 if all(type(number) is int for number in ids) else None
            except (ValueError, KeyError, TypeError, RecursionError):
                return None
        return None


def in_folder(files: Files, name: str | None = None) -> Tokenizer | None:
    """The tokenizer among `files`; with none there, the one called `name`, or None."""
    found = {file: files[file] for file in files.names() if FILES.fullmatch(file)}
    usable = {"tokenizer.json", MODEL, "vocab.json", "vocab.txt", "tekken.json", "spiece.model"} & found.keys()
    if usable or any(file.endswith(".tiktoken") for file in found):
        only_model = {MODEL} == found.keys()
        return Tokenizer(kind=SENTENCEPIECE if only_model else HUGGINGFACE, name=name, files=found)
    return Tokenizer(name=name) if name else None


def from_hub(tokenizer: Tokenizer, note: Callable[[str], None]) -> Tokenizer:
    """A tokenizer that is only a name, with its files from the Hugging Face hub where that can be reached.

    Args:
        note: is told, in one message, where it cannot; the name then travels alone.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = snapshot_download(tokenizer.name, allow_patterns=list(HUB_PATTERNS), etag_timeout=HUB_TIMEOUT)
        found = in_folder(folder_files(Path(folder), deep=False), tokenizer.name)
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        found = None
    if found is None or not found.files:
        note(
            f"note: the tokenizer {tokenizer.name} is only named in the checkpoint and could not be had from the hub; "
            "it travels as that name. tokenizer=DIR puts its files in"
        )
        return tokenizer
    return found


def named(name: str) -> Tokenizer | None:
    """The tokenizer of a directory or a hub name, as settings name it."""
    return from_directory(name) if Path(name).is_dir() else Tokenizer(name=name)


def from_directory(path: str | Path) -> Tokenizer:
    """The tokenizer that a user names by its directory; raises CheckpointError where there is none."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"tokenizer={path} is not a directory; name the one that holds the tokenizer's files")
    found = in_folder(folder_files(folder, deep=False))
    if found is None:
        raise CheckpointError(f"tokenizer={path} holds no tokenizer (tokenizer.json, tokenizer.model...)")
    return found
