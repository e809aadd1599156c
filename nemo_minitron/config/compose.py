"""A command's configuration: conf/<command>.yaml with its presets, then `key=value` overrides, in its dataclass.

Hydra composes the files and the presets (`model=tiny`). Everything after that happens on the dataclass, so that each of
its fields can be set whether or not a file mentions it, and so that all unknown names and wrong types are reported at
once, by name.
"""

import dataclasses
import functools
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.config import Config, FlowConfig, LaunchConfig, validated
from nemo_minitron.config.commands import COMMANDS
from nemo_minitron.config.merge import Merge, plain
from nemo_minitron.errors import ConfigError

#: The presets of a flow on any checkpoint and on this machine.
AUTO = "auto"


def compose(
    command: str,
    overrides: Sequence[str] = (),
    config_name: str | None = None,
    config_dir: str | Path | None = None,
    note: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
) -> Any:
    """The validated configuration of `command`.

    Args:
        command: one of COMMANDS.
        overrides: `key=value`, `+key=value`, `~key` (back to the default) or `group=preset`.
        config_name: another file of conf/, or the path of a YAML file that may build on them; none: conf/<command>.
        config_dir: folder that stands for conf/.
        note: is told, in one message, which settings of NeMo 24.07 have no effect.

    Raises:
        ConfigError: with all unknown names and wrong types, or else with everything that is wrong with the values.
    """
    return validated(read(command, overrides, config_name, config_dir, note), f"minitron {command}")


def read(
    command: str,
    overrides: Sequence[str] = (),
    config_name: str | None = None,
    config_dir: str | Path | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Any:
    """As compose, but without a look at the values."""
    source = f"minitron {command}"
    merge, _ = _merged(command, overrides, config_name, config_dir, source)
    if merge.unused:
        note(f"note: settings of NeMo 24.07 without effect here: {', '.join(merge.unused)}")
    return merge.result(source)


def read_launch(
    command: str,
    overrides: Sequence[str] = (),
    config_name: str | None = None,
    config_dir: str | Path | None = None,
) -> LaunchConfig:
    """Where `command` shall run: what `read` leaves out of the same files and overrides; values are not looked at."""
    source = f"minitron {command}"
    return _merged(command, overrides, config_name, config_dir, source)[1].result(source)


def _merged(
    command: str, overrides: Sequence[str], config_name: str | None, config_dir: str | Path | None, source: str
) -> tuple[Merge, Merge]:
    """The command's own settings, and what stands beside them; raises ConfigError with what is wrong with both."""
    schema, outside = COMMANDS[command].schema, _outside(command)
    choices, settings = _split(overrides, schema, outside, source)
    compose_files = functools.partial(
        _compose_files, config_name or command, conf=Path(config_dir or conf_dir()).resolve(), source=source
    )
    files = compose_files(choices)
    if schema is FlowConfig:
        files = _without_preset(files, choices, settings, compose_files)
    if "slurm" not in outside:
        files.pop("slurm", None)  # of a preset of hardware, for commands that start no ranks
    beside = Merge(LaunchConfig, nemo_names=False)
    beside.set_all({name: files[name] for name in outside if files.get(name) is not None})
    own = {name: value for name, value in files.items() if name not in outside}
    merge = Merge(schema, nemo_names=COMMANDS[command].nemo_names)
    for key, text in settings:
        if key.partition(".")[0] in outside:
            beside.override(key, text)
    _set_files(merge, own, beside.given, COMMANDS[command].hardware, source)
    for key, text in settings:
        if key.partition(".")[0] not in outside:
            merge.override(key, text)
    if merge.problems or beside.problems:
        raise ConfigError([*merge.problems, *beside.problems], source)
    return merge, beside


def _set_files(
    merge: Merge, files: dict[str, Any], hardware: dict[str, Any], takes: Mapping[str, str], source: str
) -> None:
    """Sets what the hardware gives, and then what files say, which wins."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = _with_hardware(files, hardware)
        merge.set_all(_taken(tree, takes))
        merge.set_all(_asked(tree, files))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).strip(), source) from None


def _without_preset(
    files: dict[str, Any],
    choices: list[str],
    settings: list[tuple[str, str | None]],
    compose_files: Callable[[list[str]], dict[str, Any]],
) -> dict[str, Any]:
    """A flow's files, with model=auto where a checkpoint is named and no preset of it is chosen; with hardware=auto
    where neither a command nor a file asks for other hardware than the flow's own; called like its checkpoint.

    Args:
        files: what they say as they stand.
        compose_files: gives what they say with other choices.
    """
    given = dict(settings)
    model = files.get("model") or {}
    checkpoint = given.get("model.restore_from_path", model.get("restore_from_path"))
    chosen = {choice.partition("=")[0] for choice in choices}
    named = checkpoint not in (None, "null") and "model" not in chosen and model.get("init") == "random"
    if not named and model.get("name") != AUTO:
        return files
    own = (files.get("hardware") or {}).get("name") == "cpu" and "hardware" not in chosen
    files = compose_files([*choices, *([f"model={AUTO}"] if named else []), *([f"hardware={AUTO}"] if own else [])])
    if checkpoint not in (None, "null") and files["model"]["name"] == AUTO:
        place = Path(str(checkpoint).strip("'\"")).expanduser().absolute()
        files["model"]["name"] = place.name.removesuffix(".nemo").removesuffix(".gguf") or AUTO
    return files


def _outside(command: str) -> list[str]:
    """The groups of LaunchConfig that `command` takes and its own configuration does not have."""
    own = typing.get_type_hints(COMMANDS[command].schema)
    return [name for name in typing.get_type_hints(LaunchConfig) if COMMANDS[command].launched and name not in own]


def _with_hardware(files: dict[str, Any], hardware: dict[str, Any]) -> Any:
    """The tree of what files say, with the settings of the hardware that are given in it: interpolations may ask for
    them, `${oc.select:hardware.NAME,OTHERWISE}`. What the hardware leaves open (null) is not there."""
    from omegaconf import OmegaConf

    tree = OmegaConf.create({**files, "hardware": {}})
    for key, value in hardware.items():
        if value is not None:
            OmegaConf.update(tree, key, value)
    return tree


def _taken(tree: Any, takes: Mapping[str, str]) -> dict[str, Any]:
    """Setting -> value of what a stage takes of the hardware in `tree`, as far as that gives it.

    Args:
        takes: setting of the stage -> setting of the hardware.
    """
    from omegaconf import OmegaConf

    values = {setting: OmegaConf.select(tree, f"hardware.{name}") for setting, name in takes.items()}
    return {setting: value for setting, value in values.items() if value is not None}


def _asked(tree: Any, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`values` of a file, and where they ask for the hardware's, these."""
    from omegaconf import OmegaConf

    answered: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            value = _asked(tree, value, f"{key}.")
        elif isinstance(value, str) and "${oc.select:hardware." in value:
            value = OmegaConf.select(tree, key)
        answered[name] = value
    return answered


def conf_dir() -> Path:
    """The folder of files and presets, which the source tree shows as conf/."""
    return Path(__file__).resolve().parent / "presets"


def presets(command: str) -> dict[str, list[str]]:
    """Group -> names of its presets, for the groups that `command` chooses from."""
    from omegaconf import OmegaConf

    file = plain(OmegaConf.load(conf_dir() / f"{command}.yaml"))
    groups = [group for entry in file.get("defaults", []) if isinstance(entry, dict) for group in entry]
    return {group: sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")) for group in groups}


def _split(
    overrides: Sequence[str], schema: type[Config], outside: list[str], source: str
) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Chosen presets, and (key, text) of every other override; text None: back to the default."""
    groups = [
        name for name, annotation in typing.get_type_hints(schema).items() if dataclasses.is_dataclass(annotation)
    ]
    groups += outside
    choices: list[str] = []
    settings: list[tuple[str, str | None]] = []
    problems: list[str] = []
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        key = key.lstrip("+")
        if key.startswith("~"):
            settings.append((key[1:], None))
        elif not equals or not key:
            problems.append(f"{override!r} is not of the form key=value")
        elif key in groups and not text.startswith("{"):
            choices.append(f"{key}={text}")
        else:
            settings.append((key, text))
    if problems:
        raise ConfigError(problems, source)
    return choices, settings


def _compose_files(config_name: str, choices: list[str], conf: Path, source: str) -> dict[str, Any]:
    """What the file and the chosen presets say, interpolations unresolved."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    folder, name = _locate(config_name, conf, source)
    searchpath = [] if folder == conf else [f"hydra.searchpath=['file://{conf}']"]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            composed = hydra.compose(name, overrides=[*choices, *searchpath])
        return plain(composed)
    except MissingConfigException as error:
        raise ConfigError(_missing_preset(error), source) from None
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_unusable_file(error, folder / f"{name}.yaml"), source) from None
    except ValueError as error:  # of Hydra's, for a group that is given something else than a name
        raise ConfigError(f"{', '.join(choices)}: a group takes the name of a preset ({error})", source) from None


def _locate(config_name: str, conf: Path, source: str) -> tuple[Path, str]:
    """Folder and stem of the file that `config_name` stands for."""
    path = Path(config_name).expanduser()
    if path.suffix == ".yaml" and path.is_file():
        return path.resolve().parent, path.stem
    name = config_name.removesuffix(".yaml")
    if (conf / f"{name}.yaml").is_file():
        return conf, name
    known = ", ".join(sorted(file.stem for file in conf.glob("*.yaml")))
    raise ConfigError(f"--config-name {config_name} is neither a .yaml file nor one of conf/: {known}", source)


def _missing_preset(error: Any) -> str:
    group, _, name = str(error.missing_cfg_file or "").rpartition("/")
    if not group or not error.options:
        return str(error).strip()
    return f"{group}={name} is not a preset; there are {', '.join(sorted(error.options))}"


def _unusable_file(error: Exception, file: Path) -> str:
    without_presets = re.match(r"Could not override '(\w+)'", str(error))
    if without_presets:
        group = without_presets[1]
        return f"{group} is a group of settings without presets here: set one of them, {group}.NAME=VALUE"
    return f"{file}: {str(error).strip()}"


def check() -> int:
    """Composes every command's file, and with each of its presets; returns how many configurations that were."""
    choices = [
        (command, choice)
        for command in COMMANDS
        for choice in [[], *([f"{group}={name}"] for group, names in presets(command).items() for name in names)]
    ]
    for command, choice in choices:
        read(command, choice)
    return len(choices)


if __name__ == "__main__":
    print(f"{conf_dir()}: {check()} configurations read")
