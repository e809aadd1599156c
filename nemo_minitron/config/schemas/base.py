"""What every configuration class is, and checks that several share."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from nemo_minitron.errors import ConfigError

T = TypeVar("T")


class Config:
    """Base of all configuration classes, which are dataclasses."""

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def problems(self) -> list[str]:
        """One message for each thing that is wrong with these values on their own."""
        return []


def all_problems(config: object, prefix: str = "") -> list[str]:
    """Problems of `config` and of every Config below it, each with the dotted name of the place."""
    problems = []
    if isinstance(config, Config):
        problems += [f"{prefix}{problem}" for problem in config.problems()]
        for entry in dataclasses.fields(config):
            problems += all_problems(getattr(config, entry.name), f"{prefix}{entry.name}.")
    return problems


def validated(config: T, source: str = "configuration") -> T:
    """Returns `config`; raises one ConfigError with all its problems."""
    problems = all_problems(config)
    if problems:
        raise ConfigError(problems, source)
    return config


def at_least(minimum: float, **values: float | None) -> list[str]:
    """A problem for each named value that is given and below `minimum`."""
    return [
        f"{name} = {value} must be at least {minimum}"
        for name, value in values.items()
        if value is not None and value < minimum
    ]


def above_zero(**values: float | None) -> list[str]:
    """A problem for each named value that is given and is no finite number above 0."""
    return [
        f"{name} = {value} must be above 0"
        for name, value in values.items()
        if value is not None and not 0 < value < math.inf
    ]


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> list[str]:
    """A problem unless `value` is among `allowed`."""
    return [] if value in allowed else [f"{name} = {value!r} must be one of {', '.join(map(str, allowed))}"]


def text_key_problems(key: str) -> list[str]:
    """A problem unless `key` may be a field's name."""
    return [] if key.strip() else ["text_key is empty: name the field that holds the text, text_key=text"]


def text_problems(**values: str | None) -> list[str]:
    """A problem for each named text that is not UTF-8: bytes of another encoding came with the command."""
    return [
        f"{name} = {value!r:.60} is not UTF-8 text: the terminal or script has another encoding"
        for name, value in values.items()
        if value is not None and any("\ud800" <= character <= "\udfff" for character in value)
    ]
