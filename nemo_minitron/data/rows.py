"""Rows of JSON, JSON-lines and parquet files with their numbers; what is wrong with a row is a value like any other.

A row's number is its line in a file of JSON lines, and its place, counted from 1, in an array or a parquet file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.data import files
from nemo_minitron.errors import DataError

KINDS = (".jsonl", ".json", ".parquet")
#: Names of a message.
SHOWN = 12


class Malformed(Exception):
    """What is wrong with a row; its reader says where that lies."""


class Row(NamedTuple):
    """A row and where it lies.

    Attributes:
        place: `file:line`, or `file, row number`.
        number: of the line or row, counted from 1.
        value: what it holds, or a Malformed.
    """

    place: str
    number: int
    value: Any


class Several:
    """That a file holds JSON lines, not one JSON value."""


def rows(path: Path) -> Iterator[Row]:
    """Rows of a .jsonl, .json or .parquet file; a .json file holds an array, one object, or JSON lines.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    if files.kind(path) == ".parquet":
        yield from parquet_rows(path)
    elif files.kind(path) == ".jsonl":
        yield from json_lines(path)
    else:
        value = whole(path)
        yield from json_lines(path) if value is Several else rows_of(path, value)


def records(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; raises DataError with the place of one that is no object, or whose text is none."""
    return [_record(row) for row in rows(path)]


def _record(row: Row) -> dict[str, Any]:
    try:
        if isinstance(row.value, Malformed):
            raise Malformed(*row.value.args)
        if not isinstance(row.value, dict):
            raise Malformed(f"it is {kind_of(row.value)}, and rows that are no JSON objects have no fields")
        return {
            name: sound(part, f"field {name}") if isinstance(part, str | bytes) else part
            for name, part in row.value.items()
        }
    except Malformed as problem:
        raise DataError(f"{row.place} cannot be read: {problem}") from None


def json_lines(path: Path) -> Iterator[Row]:
    """A row for each line that is not blank."""
    for number, line in enumerate(files.lines(path), 1):
        if line.strip():
            yield Row(f"{path}:{number}", number, _decoded(line.removeprefix(files.MARK)))


def rows_of(path: Path, value: Any) -> Iterator[Row]:
    """The rows that one JSON value holds: an array's values, or itself."""
    if isinstance(value, list):
        yield from (Row(f"{path}, row {number}", number, entry) for number, entry in enumerate(value, 1))
    else:
        yield Row(str(path), 1, value)


def whole(path: Path) -> Any:
    """The one JSON value that a file holds, a Malformed, or Several where its first line is a value and more follow."""
    filled = (line for line in files.lines(path) if line.strip())
    first, second = next(filled, ""), next(filled, None)
    value = _decoded(first)
    if second is None or not first:
        return value
    return _decoded(files.content(path)) if isinstance(value, Malformed) else Several


def _decoded(text: str) -> Any:
    """The value of a JSON text, or a Malformed."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return Malformed(f"not JSON ({error.msg}: {line}column {error.colno})")
    except RecursionError:
        return Malformed("not JSON that can be read (nested too deeply)")
    except ValueError as error:  # an integer of thousands of digits
        return Malformed(f"not JSON that can be read ({error})")


def field(row: Any, key: str) -> Any:
    """The value of a row's field `key`, or of the field inside a field that its dots say.

    Raises:
        Malformed: there is none; the message names the fields that are there.
    """
    if isinstance(row, Malformed):
        raise Malformed(*row.args)
    if not isinstance(row, dict):
        raise Malformed("is not an object")
    if key in row:
        return row[key]
    value = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise Malformed(f"has no field {key!r}{_keys_of(row)}; name the one that holds the text, text_key=NAME")
        value = value[part]
    return value


def _keys_of(row: dict) -> str:
    """`, but` and the names of all fields, dots between an outer and an inner one."""
    names = list(_nested(row))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f", but {', '.join(f'{name!r:.60}' for name in names[:SHOWN])}{more}" if names else ""


def _nested(row: dict, prefix: str = "") -> Iterator[str]:
    """The dotted names of fields that hold no further ones."""
    for name, value in row.items():
        if isinstance(value, dict) and value and prefix.count(".") < SHOWN:
            yield from _nested(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def sound(text: str | bytes, name: str = "the text") -> str:
    """The text; raises Malformed where it could not be written as UTF-8, or its bytes are not."""
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8")
        if not text.isascii():
            text.encode("utf-8")
        return text
    except UnicodeDecodeError as error:
        raise Malformed(f"{name} is not UTF-8 (its byte {error.start})") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise Malformed(
            f"{name} holds {half} (its character {error.start}), half of a surrogate pair: remove it or put \\ufffd"
        ) from None


def text_of(row: Row, key: str) -> str:
    """The text of a row's field, an empty one where that is null; a bare text has no fields and is itself the text.

    Raises:
        DataError: with the row's place: there is no such field, or it is not text.
    """
    try:
        value = row.value if isinstance(row.value, str) else field(row.value, key)
        if value is None:
            return ""
        if not isinstance(value, str | bytes):
            raise Malformed(f"field {key} is {kind_of(value)}, not text")
        return sound(value, f"field {key}")
    except Malformed as problem:
        raise DataError(f"{row.place}: {problem}") from None


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {
        str: "a text",
        dict: "an object",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null" if value is None else f"of type {type(value).__name__}")


def parquet_rows(path: Path, key: str | None = None) -> Iterator[Row]:
    """Rows of a parquet file as objects, of all columns or of the one that holds text.

    Args:
        key: name of a column, or of a field in it behind a dot.

    Raises:
        DataError: it is no parquet file, is truncated or damaged, or the column is missing or holds something else.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            if key is not None:
                _check_column(path, file.schema_arrow, key)
            for batch in file.iter_batches(columns=None if key is None else [key]):
                for value in _batch_rows(batch):
                    number += 1
                    yield Row(f"{path}, row {number}", number, value)
            if number != file.metadata.num_rows:
                raise ValueError(f"{number} rows are in it, and {file.metadata.num_rows} by what it says of itself")
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} is not a parquet file that can be read: {reason:.200}") from None


def _batch_rows(batch: Any) -> Iterator[Any]:
    """The rows of a record batch; a Malformed for each that holds bytes where its type says text."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                (value,) = batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                value = Malformed(f"a text is not UTF-8 (its byte {error.start})")
            yield value


def _check_column(path: Path, schema: Any, key: str) -> None:
    """Raises DataError unless the schema has the column, or the field inside a column, and it may hold text."""
    from pyarrow import types

    columns = dict(_columns_of(schema))
    if key not in columns:
        raise DataError(
            f"{path} has no column {key!r}, but {', '.join(columns) or 'none'}; name the one that holds the text, "
            "text_key=NAME"
        )
    held = columns[key].value_type if types.is_dictionary(columns[key]) else columns[key]
    checks = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    if not any(getattr(types, check)(held) for check in checks if hasattr(types, check)):
        raise DataError(f"{path}: column {key} is of type {columns[key]}, not text; name another, text_key=NAME")


def _columns_of(fields: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of each column, of the fields of structures in their place."""
    from pyarrow import types

    for entry in fields:
        name = f"{prefix}{entry.name}"
        if types.is_struct(entry.type):
            yield from _columns_of([entry.type.field(place) for place in range(entry.type.num_fields)], f"{name}.")
        else:
            yield name, entry.type
