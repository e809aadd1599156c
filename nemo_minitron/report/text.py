"""Values as a person reads them."""

from collections.abc import Mapping
from typing import Any

#: Letters of a value in a table; of longer ones the start is shown.
MAX_CELL = 2000


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of everything in a tree that is not itself a mapping."""
    values: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            values |= flat(entry, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = entry
    return values


def flat_rows(value: Mapping[str, Any]) -> list[list[str]]:
    return [[name, text_of(entry)] for name, entry in flat(value).items()]


def text_of(value: object) -> str:
    """A value as a person reads it; a long one shortened, with a word of that."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    text = f"[{', '.join(map(text_of, value))}]" if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}… ({len(text)} letters)"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
