"""docs/commands.rst from the table of commands: `python -m nemo_minitron.cli.reference [--check] FILE`.

It writes FILE; with --check it compares, and ends with exit code 1 where FILE is not what the table gives.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_minitron.cli.help import options, usage
from nemo_minitron.config import LaunchConfig
from nemo_minitron.config.commands import COMMANDS
from nemo_minitron.config.compose import presets, read
from nemo_minitron.config.reflect import describe_type, leaf_types, leaf_values, setting_docs, shown
from nemo_minitron.packages.extras import NAME

HEAD = """\
Commands
========

.. Written by `python -m nemo_minitron.cli.reference docs/commands.rst`, from the table in config/commands.py.

``minitron COMMAND [key=value ...]``. A setting is given by its name, ``trainer.max_steps=30``; ``~name`` takes it back
to its default, ``group=NAME`` chooses a preset of conf/group/. ``minitron COMMAND --help`` shows the same as below, as
it stands with the arguments given. Behind each setting: what it takes, and its value where nothing is given; ``???``
has to be given.
"""
TEXT = re.compile(r"`([^`]+)`|([*|\\]|(?<=\w)_(?!\w))")


def reference() -> str:
    """The whole document."""
    summaries = [f"* `{name}`_: {_text(command.summary)}" for name, command in COMMANDS.items()]
    parts = ["\n".join([HEAD, *summaries]), *("\n".join(_command(name)) for name in COMMANDS), "\n".join(_launching())]
    return "\n\n".join(parts) + "\n"


def _command(name: str) -> Iterator[str]:
    """The section of a command."""
    command = COMMANDS[name]
    yield from (name, "-" * len(name), "")
    yield f"{_text(command.summary[0].upper() + command.summary[1:])}."
    yield from ("", f"::\n\n    {usage(name)}", "")
    yield f"Beyond what comes with the package it may need: ``pip install '{NAME}[{','.join(command.extras)}]'``."
    if command.positionals:
        stands = (f"``{word.strip('[].')}`` is ``{setting}``" for setting, word in command.positionals)
        yield f"Without ``key=``: {', '.join(stands)}."
    if command.nemo_names:
        yield f"It and ``scripts/megatron_{name}.py`` take the overrides of NeMo 24.07's script unchanged."
    yield ""
    for option, meaning in options(name):
        yield f"``{option}``\n    {_text(meaning)}"
    groups = presets(name)
    if groups:
        yield "\nPresets:\n"
        yield from (
            f"* ``{group}=``: {', '.join(f'``{preset}``' for preset in names)}" for group, names in groups.items()
        )
    yield "\nSettings:\n"
    yield from _settings(command.schema, leaf_values(read(name)))


def _launching() -> Iterator[str]:
    """The section on what stands beside the settings of commands that can be launched."""
    launched = [name for name, command in COMMANDS.items() if command.launched]
    title = "Where a command runs"
    yield from (title, "-" * len(title), "")
    yield f"Of {', '.join(f'`{name}`_' for name in launched)}: the hardware (a single stage takes what it gives where "
    yield "neither a file nor an override says otherwise), and with ``--launch slurm`` the job.\n"
    yield from _settings(LaunchConfig, leaf_values(LaunchConfig()))


def _settings(schema: type, values: dict[str, object]) -> Iterator[str]:
    types, docs = leaf_types(schema), setting_docs(schema)
    for name, annotation in types.items():
        yield f"``{name}``: {describe_type(annotation)}; ``{shown(values[name]) or repr('')}``\n    {_text(docs[name])}"


def _text(text: str) -> str:
    """Words with `code` in them, as reStructuredText."""
    return TEXT.sub(lambda match: f"``{match[1]}``" if match[1] else f"\\{match[2]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nemo_minitron.cli.reference")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    text = reference()
    if not options.check:
        options.file.write_text(text, encoding="utf-8")
        return 0
    if options.file.is_file() and options.file.read_text(encoding="utf-8") == text:
        return 0
    remedy = f"python -m nemo_minitron.cli.reference {options.file}"
    print(f"{options.file} is not what the table of commands gives: {remedy}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
