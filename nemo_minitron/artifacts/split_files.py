"""Files that are split in parts, NAME-00001-of-00003.SUFFIX, as llama.cpp has them: together they are one input."""

import re
from pathlib import Path

#: How llama-gguf-split names the parts of a file.
PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)")


def part(path: Path, number: int) -> Path:
    """The part of that number beside a part, whether or not it is there."""
    named = PART.fullmatch(path.name)
    assert named is not None, path
    return path.with_name(f"{named['stem']}-{number:05}-of-{named['count']}{named['suffix']}")


def parts_of(path: Path) -> list[Path]:
    """The parts, of those that are there, of the file that `path` is a part of; itself where it is no part."""
    named = PART.fullmatch(path.name)
    if named is None:
        return [path]
    there = {int(found["number"]) for found in map(PART.fullmatch, _names_in(path.parent))
             if found is not None and (found["stem"], found["count"]) == (named["stem"], named["count"])}  # fmt: skip
    return [part(path, number) for number in sorted(there)]


def _names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]
