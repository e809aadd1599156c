"""Corpora: the embedded one, WikiText-103 from the hub, or the user's own files, as documents by split."""

import dataclasses
import itertools
import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_minitron.config import DataConfig
from nemo_minitron.errors import DataError

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".tokens", ".jsonl", ".parquet")
NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "heldout", "eval"),
}
#: Files that lie beside a corpus and are none.
NOT_TEXT = re.compile(r"(?i)^(readme|licen[cs]e|copying|notice|changelog)")
#: ` = Title = ` starts a document of WikiText's; ` = = Section = = ` does not.
TITLE = re.compile(r"^\s*= [^=].*[^=] =\s*$")
#: One document in so many goes to a split that has to be carved out of another.
CARVE_EVERY = 20
#: A plain text without headings that is longer than this, or its split's only file, is cut at its blank lines.
WHOLE_FILE_BYTES = 100_000
logger = logging.getLogger(__name__)

Documents = Callable[[], Iterator[str]]


@dataclasses.dataclass(kw_only=True)
class Corpus:
    """Documents by split.

    Attributes:
        splits: split -> a call that starts the documents from the first.
        inputs: name -> file that is read, for the manifest.
        notes: what a user should know of how the splits came about.
    """

    splits: dict[str, Documents]
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def open_corpus(config: DataConfig) -> Corpus:
    """Opens the corpus that `config.source` names; every split has at least one document.

    Raises:
        DataError: it is missing, empty, unreadable or out of reach.
    """
    if config.source == "embedded":
        corpus = _embedded(config)
    elif config.source == "wikitext103":
        corpus = _wikitext103()
    else:
        corpus = _files(Path(config.source).expanduser(), config.seed)
    if config.limit_documents is not None:
        corpus.splits = {
            split: lambda documents=documents: itertools.islice(documents(), config.limit_documents)
            for split, documents in corpus.splits.items()
        }
    for split in SPLITS:
        if next(corpus.splits[split](), None) is None:
            raise DataError(f"the {split} split of {config.source} is empty: there is no text in it")
    for note in corpus.notes:
        logger.warning("%s", note)
    return corpus


def _embedded(config: DataConfig) -> Corpus:
    from nemo_minitron.data import embedded

    return Corpus(
        splits={
            split: lambda split=split: embedded.documents(config.domain, split, config.words, config.seed)
            for split in SPLITS
        }
    )


def _wikitext103() -> Corpus:
    """Salesforce/wikitext, wikitext-103-v1, whose rows are WikiText's lines."""
    try:
        from datasets import load_dataset

        loaded = load_dataset("Salesforce/wikitext", "wikitext-103-v1")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"WikiText-103 could not be had from the Hugging Face hub ({reason}). Check the network, or download "
            "Salesforce/wikitext elsewhere and give its folder, source=PATH"
        ) from None
    return Corpus(
        splits={split: lambda split=split: articles(row["text"] for row in loaded[split]) for split in SPLITS}
    )


def split_of(path: Path) -> str | None:
    """The split that a file's name says, or else its nearest folder's: `wiki.train.tokens`, `test/en/a.jsonl`.

    Args:
        path: relative to the corpus, so that no folder above it counts.
    """
    for name in reversed(path.parts):
        words = re.split(r"[^a-z]+", name.lower())
        for split, known in NAMES.items():
            if any(word in known for word in words):
                return split
    return None


def _files(source: Path, seed: int) -> Corpus:
    files = _text_files(source)
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    unnamed = []
    for file in files:
        split = split_of(file.relative_to(source) if source.is_dir() else Path(file.name))
        (found[split] if split else unnamed).append(file)
    notes = [f"{file} names no split: it is training text" for file in unnamed if len(unnamed) < len(files)]
    found["train"] += unnamed
    whole = {split: _reader(paths) for split, paths in found.items() if paths}
    splits, carved = _fill(whole, source, seed)
    inputs = {f"file{number}": str(file) for number, file in enumerate(files)}
    return Corpus(splits=splits, inputs=inputs, notes=notes + carved)


def read_documents(source: Path) -> Iterator[str]:
    """All documents of a file or folder, whatever split its name says; raises DataError where there is no text."""
    yield from _reader(_text_files(source))()


def _text_files(source: Path) -> list[Path]:
    if not source.exists():
        raise DataError(f"the corpus {source} does not exist; give a folder or file, embedded, or wikitext103")
    if source.is_file():
        if source.suffix not in SUFFIXES:
            raise DataError(f"{source} is not a text that is known here: {', '.join(SUFFIXES)}")
        return [source]
    files = sorted(
        path
        for path in source.rglob("*")
        if path.is_file() and path.suffix in SUFFIXES and not NOT_TEXT.match(path.name)
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    )  # fmt: skip
    if not files:
        raise DataError(f"{source} holds no text: files must end in {', '.join(SUFFIXES)}")
    return files


def _fill(whole: dict[str, Documents], source: Path, seed: int) -> tuple[dict[str, Documents], list[str]]:
    """Every split: those that are there, and the missing ones carved out of the training text, with a note for each."""
    notes = []
    if "train" not in whole:
        spare = "validation" if "validation" in whole else "test"
        whole["train"] = whole.pop(spare)
        notes.append(f"{source} has no training split: its {spare} split is used for training")
    missing = [split for split in ("validation", "test") if split not in whole]
    if not missing:
        return whole, notes
    train = whole["train"]
    every = sum(1 for _ in itertools.islice(train(), CARVE_EVERY))
    if 0 < every <= len(missing):
        raise DataError(
            f"{source} holds {every} documents, too few to have a {' and a '.join(missing)} split carved out of them; "
            "give more text, or a file for each split: train.txt, validation.txt, test.txt"
        )
    for number, split in enumerate(missing):
        whole[split] = lambda number=number: _carved(train(), seed, every, {number})
        notes.append(f"{source} has no {split} split left: one document in {every} of the training text is it")
    whole["train"] = lambda: _carved(train(), seed, every, set(range(len(missing), every)))
    return whole, notes


def _carved(documents: Iterable[str], seed: int, every: int, places: set[int]) -> Iterator[str]:
    """The documents at `places` of each `every`, whose order is drawn anew for each by the seed."""
    generator = random.Random(seed)
    order: list[int] = []
    for number, document in enumerate(documents):
        if number % every == 0:
            order = generator.sample(range(every), every)
        if order[number % every] in places:
            yield document


def _reader(paths: list[Path]) -> Documents:
    def documents() -> Iterator[str]:
        for path in paths:
            read = READERS.get(path.suffix, lambda path: _text(path, alone=len(paths) == 1))
            yield from (document for document in read(path) if document.strip())

    return documents


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Joins WikiText's lines to documents, which start at ` = Title = `."""
    document: list[str] = []
    for line in lines:
        line = line.rstrip("\n")
        if TITLE.match(line) and any(part.strip() for part in document):
            yield "\n".join(document)
            document = []
        document.append(line)
    if any(part.strip() for part in document):
        yield "\n".join(document)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _text(path: Path, *, alone: bool) -> Iterator[str]:
    """Documents of a text file: WikiText's articles; without headings the whole file, or the blocks between its blank
    lines if it is large or the only file of its split."""
    if any(TITLE.match(line) for line in _lines(path)):
        yield from articles(_lines(path))
    elif not alone and path.stat().st_size <= WHOLE_FILE_BYTES:
        yield "".join(_lines(path))
    else:
        for blank, lines in itertools.groupby(_lines(path), key=lambda line: not line.strip()):
            if not blank:
                yield "".join(lines).rstrip("\n")


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise DataError(f'{path}:{number} is not a JSON object with a field "text"')
        yield text


def _parquet(path: Path) -> Iterator[str]:
    """Rows of a parquet file's column `text`: documents, or WikiText's lines as the hub stores them."""
    rows = _rows(path)
    head = list(itertools.islice(rows, 1000))
    documents = articles if any(TITLE.match(row) for row in head) else iter
    yield from documents(itertools.chain(head, rows))


def _rows(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise DataError(f"{path} has no column `text`; it has {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(columns=["text"]):
            yield from (row or "" for row in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file that can be read: {str(error).splitlines()[0]}") from None


READERS = {".jsonl": _jsonl, ".parquet": _parquet}
