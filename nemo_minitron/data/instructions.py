"""Instructions and answers from LMFlow's, NeMo's and alpaca's files, as conversations by split. Reads JSON only."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.config import InstructConfig
from nemo_minitron.errors import DataError

#: Split -> names that its file or folder may have.
NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
SUFFIXES = (".json", ".jsonl")
ROLES = ("system", "user", "assistant")
TEXT = "text"
#: Problems of one message.
SHOWN = 5


class Turn(NamedTuple):
    """What one side says: role system, user or assistant; or `text`, to be learnt whole.

    Attributes:
        context: alpaca's input: what the instruction is about.
    """

    role: str
    text: str
    context: str = ""


@dataclasses.dataclass(kw_only=True)
class Instructions:
    """Conversations by split.

    Attributes:
        alpaca: whether every row of the training split came in alpaca's form.
        files: the files that were read, by a name for the manifest.
    """

    train: list[list[Turn]]
    validation: list[list[Turn]]
    alpaca: bool
    files: dict[str, str]


def read_instructions(path: str, config: InstructConfig, seed: int) -> Instructions:
    """Reads the training and the validation split; the latter is drawn from the former where it has no file.

    Raises:
        DataError: nothing is there, or rows are malformed: file, row and field of the first few of them.
    """
    found = split_files(Path(path))
    rows: dict[str, list[list[Turn]]] = {"train": [], "validation": []}
    files, forms, problems = {}, set(), []
    for split in rows:
        for number, file in enumerate(found.get(split, [])):
            form, conversations, wrong = _read_file(file, config.format)
            rows[split] += conversations
            problems += wrong
            files[f"instructions-{split}{number}"] = str(file)
            forms |= {form} if split == "train" else set()
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError("malformed instructions:\n  " + "\n  ".join(problems[:SHOWN]) + more)
    for split, files_of_split in found.items():
        if split in rows and not rows[split]:
            raise DataError(f"{', '.join(map(str, files_of_split))}: no rows")
    if "validation" not in found:
        rows["train"], rows["validation"] = _carve(rows["train"], config.validation_share, seed, path)
    return Instructions(**rows, alpaca=forms == {"alpaca"}, files=files)


def split_files(path: Path) -> dict[str, list[Path]]:
    """Split -> its files: a file is all training; in a folder, names of files or of folders say the split.

    Files of other names in a folder are training files. The test split is told apart, so that it is not trained on.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path} is neither .json nor .jsonl")
        return {"train": [path]}
    if not path.is_dir():
        raise DataError(f"model.data.instructions={path} does not exist")
    found: dict[str, list[Path]] = {}
    for entry in sorted(path.iterdir()):
        named = split_name(entry.stem if entry.is_file() else entry.name)
        if entry.is_file() and entry.suffix in SUFFIXES:
            found.setdefault(named or "train", []).append(entry)
        elif entry.is_dir() and named:
            inside = [file for file in sorted(entry.iterdir()) if file.suffix in SUFFIXES]
            if inside:
                found.setdefault(named, []).extend(inside)
    if "train" not in found:
        raise DataError(
            f"{path} has no training data: no .json or .jsonl file in it, nor in a folder train/ "
            "(files named after validation or test are not trained on)"
        )
    return found


def split_name(name: str) -> str | None:
    """The split that a file's or folder's name says, if it does."""
    return next((split for split, names in NAMES.items() if name.lower() in names), None)


def _carve(rows: list[list[Turn]], share: float, seed: int, path: str) -> tuple[list, list]:
    count = max(1, round(len(rows) * share))
    if count >= len(rows):
        raise DataError(f"{path}: {len(rows)} row(s) are too few to keep {count} for validation; give more, or a file")
    kept = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for number, row in enumerate(rows) if number not in kept], [rows[number] for number in sorted(kept)]


class Malformed(Exception):
    """A row that is not what its format says: which field, and what is wrong with it."""


def _read_file(file: Path, form: str) -> tuple[str, list[list[Turn]], list[str]]:
    """The format, the conversations, and a message for each malformed row of one file."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return form, [], [f"{file}: byte {error.start} is not UTF-8"]
    parsed = _whole(content)
    if isinstance(parsed, dict) and ("instances" in parsed or "type" in parsed):
        return _read_lmflow(file, parsed, form)
    if form == "lmflow":
        return form, [], [f"{file}: not an object with `type` and `instances`, as LMFlow's files are"]
    rows = _json_rows(parsed) if isinstance(parsed, list) else _jsonl_rows(content)
    found, chosen, wrong = [], form, []
    for number, row in rows:
        chosen = _form_of(row) if chosen == "auto" else chosen
        turns = row if isinstance(row, Malformed) else _turns(READERS.get(chosen, _unknown), row)
        if isinstance(turns, Malformed):
            wrong.append(f"{file}, row {number}: {turns}")
        else:
            found.append(turns)
    return chosen, found, wrong


def _turns(reader: Callable[[Any], list[Turn]], row: Any) -> "list[Turn] | Malformed":
    try:
        return reader(row)
    except Malformed as problem:
        return problem


def _whole(content: str) -> Any:
    """The content as one JSON value; None where it is not one."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _json_rows(rows: list) -> Iterator[tuple[int, Any]]:
    yield from enumerate(rows, 1)


def _jsonl_rows(content: str) -> Iterator[tuple[int, Any]]:
    """Line number and value of each line; a Malformed where it is no JSON."""
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, Malformed(f"not JSON ({error})")


def _form_of(row: Any) -> str:
    """The format of a row by its fields; auto where they do not say."""
    keys = set(row) if isinstance(row, dict) else set()
    if "instruction" in keys:
        return "alpaca"
    return "nemo" if {"input", "output", "messages"} & keys else "auto"


def _unknown(row: Any) -> list[Turn]:
    fields = f"has the fields {', '.join(map(str, row))}" if isinstance(row, dict) else "is not an object"
    raise Malformed(f"{fields}; known are instruction and output, input and output, messages")


def _read_lmflow(file: Path, content: dict, form: str) -> tuple[str, list[list[Turn]], list[str]]:
    kind, instances = content.get("type"), content.get("instances")
    if form not in ("auto", "lmflow"):
        return form, [], [f"{file}: is LMFlow's (type, instances), not {form}'s"]
    if not isinstance(kind, str) or kind not in LMFLOW:
        return "lmflow", [], [f"{file}: type is {kind!r}; known are {', '.join(LMFLOW)}"]
    if not isinstance(instances, list):
        return "lmflow", [], [f"{file}: instances is not a list"]
    found, wrong = [], []
    for number, row in enumerate(instances, 1):
        turns = _turns(LMFLOW[kind], row)
        if isinstance(turns, Malformed):
            wrong.append(f"{file}, row {number}: {turns}")
        else:
            found.append(turns)
    return "lmflow", found, wrong


def _text(row: Any, field: str, *, optional: bool = False) -> str:
    if not isinstance(row, dict):
        raise Malformed("is not an object")
    value = row.get(field)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"field {field} " + ("is missing" if field not in row else f"is {_kind(value)}, not text"))
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _text_only(row: Any) -> list[Turn]:
    text = _text(row, "text")
    if not text:
        raise Malformed("field text is empty")
    return [Turn(TEXT, text)]


def _pair(row: Any) -> list[Turn]:
    return [Turn("user", _text(row, "input")), Turn("assistant", _text(row, "output"))]


def _alpaca(row: Any) -> list[Turn]:
    asked = Turn("user", _text(row, "instruction"), _text(row, "input", optional=True))
    return [asked, Turn("assistant", _text(row, "output"))]


def _conversation(row: Any) -> list[Turn]:
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise Malformed("field messages is missing or not a list")
    system = _text(row, "system", optional=True)
    turns = [Turn("system", system)] if system else []
    for number, message in enumerate(row["messages"], 1):
        try:
            role = _text(message, "role")
            turns.append(Turn(role, _text(message, "content")))
        except Malformed as problem:
            raise Malformed(f"field messages, message {number}: {problem}") from None
        if role not in ROLES:
            raise Malformed(f"field messages, message {number}: role is {role!r}; known are {', '.join(ROLES)}")
    while turns and turns[-1].role != "assistant":
        turns.pop()  # nothing after the last answer is learnt
    if not turns:
        raise Malformed("field messages has no message of the assistant")
    return turns


def _nemo(row: Any) -> list[Turn]:
    return _conversation(row) if isinstance(row, dict) and "messages" in row else _pair(row)


READERS: dict[str, Callable[[Any], list[Turn]]] = {"nemo": _nemo, "alpaca": _alpaca}
LMFLOW: dict[str, Callable[[Any], list[Turn]]] = {
    "text_only": _text_only,
    "text2text": _pair,
    "conversation": _conversation,
}
