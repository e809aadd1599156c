"""The command that makes a result again, from the configuration in its manifest."""

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping, Set
from typing import Any

from nemo_minitron.config.commands import COMMANDS
from nemo_minitron.config.compose import AUTO, presets, read
from nemo_minitron.config.reflect import leaf_types
from nemo_minitron.errors import ConfigError

#: A word that Hydra's grammar takes as text in lists and mappings without quotes.
WORD = re.compile(r"[A-Za-z_][\w./-]*")
NOT_WORDS = {"null", "true", "false", "nan", "inf"}
#: How to put the result there, not what it is.
LEFT_OUT = ("overwrite", "dry_run")


def repeat(command: str, config: Mapping[str, Any]) -> str | None:
    """`minitron COMMAND ...` that composes to `config`; None where this version's command has no such configuration.

    Every setting that a preset or a default does not give already is an override. What comes out is composed again and
    compared, so that a command that is shown is right.
    """
    if command not in COMMANDS:
        return None
    wanted = _settings(command, config)
    if not _has_all_fields(command, wanted):
        return None
    choices = _choices(command, config)
    try:
        overrides = choices + _overrides(wanted, _values(command, choices))
        if _values(command, overrides) != wanted:
            return None
    except (ConfigError, AttributeError, LookupError, TypeError, ValueError):  # values of kinds that no field takes
        return None
    return " ".join(["minitron", command, *(shlex.quote(override) for override in overrides)])


def _choices(command: str, config: Mapping[str, Any]) -> list[str]:
    """The presets whose names the configuration carries (`model.name`, `hardware.name`)."""
    choices = []
    for group, names in presets(command).items():
        part = config.get(group)
        name = part.get("name") if isinstance(part, Mapping) else None
        if name in names:
            choices.append(f"{group}={name}")
        elif AUTO in names and isinstance(part, Mapping) and part.get("init") == "checkpoint":
            choices.append(f"{group}={AUTO}")  # called like its checkpoint
    return choices


def _has_all_fields(command: str, wanted: Mapping[str, Any]) -> bool:
    """Whether every field of the command's configuration is there: otherwise another version wrote it."""
    fields = [name for name in leaf_types(COMMANDS[command].schema) if name.partition(".")[0] not in LEFT_OUT]
    return all(name in wanted or any(key.startswith(f"{name}.") for key in wanted) for name in fields)


def _values(command: str, overrides: list[str]) -> dict[str, Any]:
    return _settings(command, dataclasses.asdict(read(command, overrides)))


def _settings(command: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of all that says what the result is."""
    whole = {name for name, annotation in leaf_types(COMMANDS[command].schema).items() if annotation is Any}
    return _flat({name: value for name, value in config.items() if name not in LEFT_OUT}, whole)


def _flat(value: Mapping[str, Any], whole: Set[str], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, mappings taken apart but for the fields that take `anything`."""
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        key = f"{prefix}{name}"
        if isinstance(entry, Mapping) and entry and key not in whole:
            flat |= _flat(entry, whole, f"{key}.")
        else:
            flat[key] = json.loads(json.dumps(entry))
    return flat


def _overrides(flat: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """What turns `known` values into those of `flat`."""
    around = {
        ".".join(parts[:count]) for parts in (name.split(".") for name in flat) for count in range(1, len(parts) + 1)
    }
    gone = dict.fromkeys(f"~{_outermost(name, around)}" for name in known if name not in around)
    changed = [f"{name}={_text(value)}" for name, value in flat.items() if name not in known or known[name] != value]
    return [*gone, *changed]


def _outermost(name: str, around: set[str]) -> str:
    """The mapping around `name` that is gone with it, or `name` itself."""
    parts = name.split(".")
    return next(".".join(parts[:count]) for count in range(1, len(parts) + 1) if ".".join(parts[:count]) not in around)


def _text(value: Any, inside: bool = False) -> str:
    """A value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        plain = not inside or (WORD.fullmatch(value) and value.lower() not in NOT_WORDS)
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_text(entry, True)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_text(entry, True) for entry in value) + "]"
    return repr(value)
