"""Instructions and answers from LMFlow's, NeMo's and alpaca's files, as conversations by split."""

import dataclasses
import logging
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.config import InstructConfig
from nemo_minitron.data import files
from nemo_minitron.data.rows import KINDS, Malformed, Row, Several, kind_of, rows_of, sound, whole
from nemo_minitron.data.rows import rows as rows_in
from nemo_minitron.data.sources import BESIDE, INSTANCES, split_of
from nemo_minitron.errors import DataError

#: What a message calls the files that are read.
KNOWN = (*KINDS, "and the first two as .gz or .zst")
ROLES = ("system", "user", "assistant")
TEXT = "text"
#: Problems of one message.
SHOWN = 5
logger = logging.getLogger(__name__)


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
        notes: what a user should know of files that were not.
    """

    train: list[list[Turn]]
    validation: list[list[Turn]]
    alpaca: bool
    files: dict[str, str]
    notes: list[str]


def read_instructions(path: str, config: InstructConfig, seed: int) -> Instructions:
    """Reads the training and the validation split; the latter is drawn from the former where it has no file.

    Raises:
        DataError: nothing is there, or rows are malformed: file, row and field of the first few of them.
    """
    by_split, notes = split_files(Path(path).expanduser())
    rows: dict[str, list[list[Turn]]] = {"train": [], "validation": []}
    read, forms, problems = {}, set(), []
    for split in rows:
        for number, file in enumerate(by_split.get(split, [])):
            form, conversations, wrong = _read_file(file, config.format)
            rows[split] += conversations
            problems += wrong
            read[f"instructions-{split}{number}"] = str(file)
            forms |= {form} if split == "train" else set()
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError("malformed instructions:\n  " + "\n  ".join(problems[:SHOWN]) + more)
    for split, files_of_split in by_split.items():
        if split in rows and not rows[split]:
            raise DataError(f"{', '.join(map(str, files_of_split))}: no rows")
    if "validation" not in by_split:
        rows["train"], rows["validation"] = _carve(rows["train"], config.validation_share, seed, path)
    for note in notes:
        logger.warning("%s", note)
    return Instructions(**rows, alpaca=forms == {"alpaca"}, files=read, notes=notes)


def split_files(path: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Split -> its files, and notes on files that are not trained on.

    A file is all training; in a folder, names of files or of folders say the split. Files of other names in a folder
    are training files. The test split is told apart, so that it is not trained on.
    """
    if path.is_file():
        if files.kind(path) not in KINDS:
            raise DataError(f"{path} is neither .json nor .jsonl; read are {', '.join(KNOWN)}")
        return {"train": [path]}, []
    if not path.is_dir():
        raise DataError(f"model.data.instructions={path} does not exist")
    inside = [file for file in files.files_in(path) if not BESIDE.fullmatch(file.name)]
    chosen = [file for file in inside if files.kind(file) in KINDS and file.is_file()]
    notes = files.left_out(path, [file for file in inside if file not in set(chosen)], KNOWN)
    chosen, copies = files.without_copies(chosen)
    by_split: dict[str, list[Path]] = {}
    for file in chosen:
        by_split.setdefault(split_of(file.relative_to(path)) or "train", []).append(file)
    if "train" not in by_split:
        raise DataError(
            "\n  ".join(
                [
                    f"{path} has no training data: no file in it that is named after no split or after training (files "
                    f"named after validation or test are not trained on); read are {', '.join(KNOWN)}",
                    *notes,
                ]
            )
        )
    unused = [f"{file} is the test split: it is not read" for file in by_split.get("test", [])]
    return by_split, notes + copies + unused


def _carve(rows: list[list[Turn]], share: float, seed: int, path: str) -> tuple[list, list]:
    count = max(1, round(len(rows) * share))
    if count >= len(rows):
        raise DataError(f"{path}: {len(rows)} row(s) are too few to keep {count} for validation; give more, or a file")
    kept = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for number, row in enumerate(rows) if number not in kept], [rows[number] for number in sorted(kept)]


def _read_file(file: Path, form: str) -> tuple[str, list[list[Turn]], list[str]]:
    """The format, the conversations, and a message for each malformed row of one file."""
    value = Several if files.kind(file) == ".parquet" else whole(file)
    if isinstance(value, dict) and (INSTANCES in value or "type" in value):
        return _read_lmflow(file, value, form)
    if form == "lmflow":
        return form, [], [f"{file}: not an object with `type` and `instances`, as LMFlow's files are"]
    if isinstance(value, Malformed) and files.kind(file) == ".jsonl":
        value = Several  # each line says what is wrong with it
    rows = list(rows_in(file) if value is Several else rows_of(file, value))
    said = (_form_of(row.value) for row in rows)
    chosen = next((stated for stated in said if stated != "auto"), form) if form == "auto" else form
    return chosen, *_conversations(file, rows, READERS.get(chosen, _unknown))


def _conversations(
    file: Path, rows: Iterable[Row], reader: Callable[[Any], list[Turn]]
) -> tuple[list[list[Turn]], list[str]]:
    """What `reader` makes of the rows, and a message for each that is malformed."""
    conversations, wrong = [], []
    for row in rows:
        turns = row.value if isinstance(row.value, Malformed) else _turns(reader, row.value)
        if isinstance(turns, Malformed):
            wrong.append(f"{file}, row {row.number}: {turns}")
        else:
            conversations.append(turns)
    return conversations, wrong


def _turns(reader: Callable[[Any], list[Turn]], row: Any) -> list[Turn] | Malformed:
    try:
        return reader(row)
    except Malformed as problem:
        return problem


def _form_of(row: Any) -> str:
    """The format of a row by its fields; auto where they do not say."""
    keys = set(row) if isinstance(row, dict) else set()
    if "instruction" in keys:
        return "alpaca"
    return "nemo" if {"input", "output", "messages"} & keys else "auto"


def _unknown(row: Any) -> list[Turn]:
    fields = (
        f"has the fields {', '.join(f'{name:.60}' for name in list(row)[:SHOWN])}"
        if isinstance(row, dict)
        else "is not an object"
    )
    raise Malformed(f"{fields}; known are instruction and output, input and output, messages")


def _read_lmflow(file: Path, content: dict, form: str) -> tuple[str, list[list[Turn]], list[str]]:
    kind, instances = content.get("type"), content.get(INSTANCES)
    if form not in ("auto", "lmflow"):
        return form, [], [f"{file}: is LMFlow's (type, instances), not {form}'s"]
    if not isinstance(kind, str) or kind not in LMFLOW:
        return "lmflow", [], [f"{file}: type is {kind!r:.60}; known are {', '.join(LMFLOW)}"]
    if not isinstance(instances, list):
        return "lmflow", [], [f"{file}: instances is not a list"]
    return "lmflow", *_conversations(file, rows_of(file, instances), LMFLOW[kind])


def _text(row: Any, field: str, *, optional: bool = False) -> str:
    if not isinstance(row, dict):
        raise Malformed("is not an object")
    value = row.get(field)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"field {field} " + ("is missing" if field not in row else f"is {kind_of(value)}, not text"))
    return sound(value, f"field {field}")


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
            raise Malformed(f"field messages, message {number}: role is {role!r:.60}; known are {', '.join(ROLES)}")
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
