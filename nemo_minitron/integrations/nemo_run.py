"""`nemo minitron <command> key=value ...`: the commands of `minitron` inside NeMo-Run's command line.

The overrides go through as they are: they are settings of the command's configuration, not arguments of a function
that NeMo-Run would build.
"""

import sys

import typer
from nemo_run.cli import entrypoint
from nemo_run.cli.api import Entrypoint

from nemo_minitron.cli.main import run
from nemo_minitron.config.commands import COMMANDS


class MinitronEntrypoint(Entrypoint):
    """A NeMo-Run entry point that hands its arguments to a command of `minitron`."""

    def cli(self, parent: typer.Typer) -> None:
        settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

        @parent.command(self.name, help=self.help_str, context_settings=settings)
        def command(context: typer.Context) -> None:
            sys.exit(run(self.name, context.args))


def _register(name: str, summary: str) -> None:
    def command(*overrides: str) -> int:
        return run(name, overrides)

    command.__name__ = name
    entrypoint(command, name=name, namespace="minitron", help=summary, entrypoint_cls=MinitronEntrypoint)


for _name, _command in COMMANDS.items():
    _register(_name, _command.summary)
