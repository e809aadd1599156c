"""Settings by name into a configuration class, one after the other; all that is wrong with them is collected."""

import dataclasses
import difflib
import fnmatch
import typing
from collections.abc import Iterator
from typing import Any

from nemo_minitron.config import Config
from nemo_minitron.config.compat import RENAMED, UNUSED
from nemo_minitron.config.reflect import describe_type, leaf_types
from nemo_minitron.errors import ConfigError


class Merge:
    """A configuration that takes settings by name and collects what is wrong with them."""

    def __init__(self, schema: type[Config], nemo_names: bool):
        from omegaconf import OmegaConf

        self.schema = schema
        self.types = leaf_types(schema)
        self.renamed = RENAMED if nemo_names else {}
        self.ignored = [name for names in UNUSED.values() for name in names.split()] if nemo_names else []
        self.values = OmegaConf.structured(schema)
        self.given: dict[str, Any] = {}
        self.problems: list[str] = []
        self.unused: list[str] = []

    def set_all(self, values: dict[str, Any]) -> None:
        """Sets every value of a tree, mappings taken apart down to the fields."""
        for key, value in self._flat(values):
            self._set(self._field_name(key), value)

    def override(self, key: str, text: str | None) -> None:
        """Sets `key` to what `text` says; None: back to its default."""
        name = self._field_name(key)
        if text is None:
            self._reset(name)
        else:
            self.set_all({name: _parse(text, self.types.get(name))})

    def result(self, source: str) -> Any:
        """The configuration; raises ConfigError where an interpolation in it leads nowhere."""
        from omegaconf.errors import OmegaConfBaseException

        try:
            return _build(self.schema, plain(self.values, resolve=True))
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).strip(), source) from None

    def _flat(self, values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and self.types.get(key) is not Any:
                yield from self._flat(value, f"{key}.")
            else:
                yield key, value

    def _field_name(self, key: str) -> str:
        return key if key in self.types else self.renamed.get(key, key)

    def _field(self, key: str) -> str | None:
        """The field that is `key`, or that is a mapping around it."""
        parts = key.split(".")
        around = (".".join(parts[:count]) for count in range(1, len(parts)))
        return key if key in self.types else next((name for name in around if _is_mapping(self.types.get(name))), None)

    def _set(self, key: str, value: Any) -> None:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        field = self._field(key)
        if field is None:
            self._unknown(key)
            return
        try:
            for mapping in _mappings_around(key, field):
                if OmegaConf.select(self.values, mapping) is None:
                    OmegaConf.update(self.values, mapping, {}, merge=False)
            OmegaConf.update(self.values, key, value)
            self.given[key] = value
        except OmegaConfBaseException:
            self.problems.append(f"{key} = {value!r} is not {describe_type(self.types[field])}")

    def _reset(self, key: str) -> None:
        from omegaconf import OmegaConf

        self.given.pop(key, None)
        if key in self.types:
            default: Any = plain(OmegaConf.structured(self.schema))
            for name in key.split("."):
                default = default[name]
            OmegaConf.update(self.values, key, default, merge=False)
        elif self._field(key) is None:
            self._unknown(key)
        else:
            parent, _, name = key.rpartition(".")
            (OmegaConf.select(self.values, parent) or {}).pop(name, None)

    def _unknown(self, key: str) -> None:
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in self.ignored):
            self.unused.append(key)
            return
        nearest = _nearest(key, list(self.types))
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ", see --help"
        self.problems.append(f"{key} is not a setting{hint}")


def plain(config: Any, resolve: bool = False) -> dict[str, Any]:
    """A tree of OmegaConf as dicts and lists."""
    from omegaconf import OmegaConf

    return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=resolve))


def _is_mapping(annotation: Any) -> bool:
    return any(typing.get_origin(choice) is dict for choice in (annotation, *typing.get_args(annotation)))


def _mappings_around(key: str, field: str) -> list[str]:
    """The mappings that `key` lies in, from the field downwards."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(field.count(".") + 1, len(parts))]


def _nearest(key: str, names: list[str]) -> list[str]:
    """Names that look like `key`, and names that end as it does."""
    last = key.rpartition(".")[2]
    same_end = [name for name in names if name.rpartition(".")[2] == last]
    return list(dict.fromkeys([*same_end, *difflib.get_close_matches(key, names, n=3, cutoff=0.75)]))[:3]


def _parse(text: str, annotation: Any) -> Any:
    """The value that `text` stands for: as it is for a field of text, else by Hydra's grammar of override values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    structured = text[:1] in tuple("[{'\"")
    if str in (annotation, *typing.get_args(annotation)) and not structured:
        return None if text == "null" else text
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return text
    return text if override.is_sweep_override() else override.value()


def _build(schema: type, values: dict[str, Any]) -> Any:
    """The configuration class `schema` from its values, groups of fields built along."""
    types = typing.get_type_hints(schema)
    return schema(
        **{
            name: _build(types[name], value) if dataclasses.is_dataclass(types[name]) else value
            for name, value in values.items()
        }
    )
