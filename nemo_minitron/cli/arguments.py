"""What stands on the command line, as options and as settings `key=value`."""

import argparse
import json
import re
from collections.abc import Sequence

from nemo_minitron.cli.help import usage
from nemo_minitron.config.commands import COMMANDS
from nemo_minitron.errors import ConfigError

#: What is a setting and no path: name=value, +name=value, ~name.
SETTING = re.compile(r"(\+{0,2}[A-Za-z_]\w*(\.\w+)*=.*)|(~[A-Za-z_]\w*(\.\w+)*(=.*)?)", re.DOTALL)


def parser(name: str) -> argparse.ArgumentParser:
    """The parser of the command `name`; an option's value lies under its flag."""
    parser = argparse.ArgumentParser(prog=f"minitron {name}", usage=usage(name), add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config-name")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    for option in COMMANDS[name].flags:
        if option.value:
            parser.add_argument(option.flag, dest=option.flag, choices=option.choices)
        else:
            parser.add_argument(option.flag, dest=option.flag, action="store_true")
    # torch.distributed.launch hands it to every script; the environment says the same.
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)
    return parser


def settings(name: str, arguments: Sequence[str]) -> list[str]:
    """The arguments as `key=value`; raises ConfigError where more are given without `key=` than the command takes."""
    positionals = COMMANDS[name].positionals
    if not positionals:
        return list(arguments)
    bare = [argument for argument in arguments if not SETTING.fullmatch(argument)]
    rest = []
    if positionals[-1][1].strip("[]").endswith("..."):
        rest = bare[len(positionals) - 1 :]
        bare = bare[: len(positionals) - 1]
    elif len(bare) > len(positionals):
        raise ConfigError(
            f"{bare[len(positionals)]!r} is one argument too many; usage: {usage(name)}", f"minitron {name}"
        )
    given = [f"{setting}={argument}" for (setting, _), argument in zip(positionals, bare)]
    if rest:
        given.append(f"{positionals[-1][0]}={json.dumps(rest)}")
    return given + [argument for argument in arguments if SETTING.fullmatch(argument)]


def chosen(name: str, options: argparse.Namespace) -> list[str]:
    """The options that stand for settings, as `key=value`."""
    values = [(option, getattr(options, option.flag)) for option in COMMANDS[name].options]
    return [
        f"{option.setting}={value if option.value else 'true'}"
        for option, value in values
        if value not in (None, False)
    ]
