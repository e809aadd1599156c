"""The command `minitron`: one line per command, one function behind each.

Nothing heavier than argparse is imported until a command has its arguments.
"""

import argparse
import difflib
import os
import pkgutil
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from nemo_minitron import __version__
from nemo_minitron.cli.arguments import chosen, parser, settings
from nemo_minitron.cli.help import command_help, overview
from nemo_minitron.config import Config
from nemo_minitron.config.commands import COMMANDS
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.streams import lasting_streams
from nemo_minitron.packages.extras import missing_package

if TYPE_CHECKING:
    from nemo_minitron.artifacts import Manifest
    from nemo_minitron.launch.application import Launched

USAGE_ERROR = 2
INTERNAL_ERROR = 70
INTERRUPTED = 130
GRACE_SECONDS = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `minitron <command> ...`; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = arguments[0] if arguments else "--help"
    if first in COMMANDS:
        return run(first, arguments[1:])
    with lasting_streams():
        return _without_a_command(first)


def _without_a_command(first: str) -> int:
    """`minitron --help`, `--version`, or what is no command."""
    if first in ("-h", "--help"):
        say(overview())
        return 0
    if first == "--version":
        say(f"minitron {__version__}")
        return 0
    nearest = difflib.get_close_matches(first, COMMANDS, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(COMMANDS)}"
    say(f"minitron: {first!r} is not a command; {hint}", sys.stderr)
    return USAGE_ERROR


def run(name: str, arguments: Sequence[str]) -> int:
    """Runs the command `name`; whatever goes wrong becomes one message and an exit code."""
    with lasting_streams():
        return _run(name, parser(name).parse_intermixed_args(arguments))


def _run(name: str, options: argparse.Namespace) -> int:
    try:
        options.given = settings(name, options.overrides)
        options.overrides = [*options.given, *chosen(name, options)]
        if options.help:
            say(command_help(name, options.overrides, options.config_name))
            return 0
        return _execute(name, options)
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        return _failed(missing_package(error, f"minitron {name}", COMMANDS[name].extras) or error, options.debug)
    except Exception as error:
        return _failed(error, options.debug)


def _failed(error: Exception, debug: bool) -> int:
    """Tells of an error that ends the command; returns the exit code."""
    _tell_parent(error)
    if isinstance(error, MinitronError):
        _report(str(error), debug)
        return error.exit_code
    what = f"internal error: {type(error).__name__}: {error}".rstrip(": ").splitlines()[0]
    _report(what if debug else f"{what} (run again with --debug)", debug)
    return INTERNAL_ERROR


def say(message: str, stream: TextIO | None = None) -> None:
    """Prints on rank 0 only. Half of a character, as damaged JSON can hold, is shown by its number."""
    if _rank() == 0:
        print(message.encode("utf-8", "backslashreplace").decode(), file=stream or sys.stdout, flush=True)


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)


def _execute(name: str, options: argparse.Namespace) -> int:
    import logging

    from nemo_minitron.config.compose import compose

    # What the engines say while they are imported; a stage sends the rest to its own log.
    logging.getLogger("megatron").addHandler(logging.NullHandler())
    config = compose(name, options.overrides, options.config_name, note=lambda message: say(message, sys.stderr))
    if COMMANDS[name].launched:
        dry_run = getattr(options, "--dry-run") or getattr(config, "dry_run", False)
        if getattr(options, "--launch"):
            return _launch(name, config, options, dry_run)
        if dry_run and not hasattr(config, "dry_run"):
            from nemo_minitron.cli.dry_run import describe_stage

            say(describe_stage(config))
            return 0
    manifest = pkgutil.resolve_name(COMMANDS[name].function)(config)
    if manifest is not None:
        say(_summary(name, config, manifest))
    return 0


def _launch(name: str, config: "Launched", options: argparse.Namespace, dry_run: bool) -> int:
    """Hands the command, as it was given, to torchrun or Slurm."""
    from nemo_minitron.config.compose import read_launch
    from nemo_minitron.launch.launcher import launch

    slurm = read_launch(name, options.overrides, options.config_name).slurm
    names = [text.lstrip("+~").partition("=")[0] for text in options.given]
    arguments = [
        text for setting, text in zip(names, options.given) if setting != "dry_run" and not setting.startswith("slurm.")
    ]
    if options.config_name:
        file = os.path.expanduser(options.config_name)
        arguments += ["--config-name", os.path.abspath(file) if os.path.isfile(file) else options.config_name]
    arguments += ["--debug"] if options.debug else []
    return launch(name, config, slurm, arguments, getattr(options, "--launch"), dry_run)


def _tell_parent(error: Exception) -> None:
    """Tells the process that started this rank with which exit code it ends; torchrun would not."""
    from nemo_minitron.launch.ranks import tell_parent

    tell_parent(error)


def _summary(name: str, config: Config, manifest: "Manifest") -> str:
    """Where the result lies, the numbers that were measured, and what to run next."""
    places = (getattr(config, place, None) for place in ("folder", "output", "output_dir"))
    output = next(place for place in places if place)
    numbers = [
        f"  {metric}: {value:.6g}" if isinstance(value, float) else f"  {metric}: {value}"
        for metric, value in manifest.metrics.items()
        if isinstance(value, int | float | str)
    ]
    afterwards = COMMANDS[name].afterwards
    following = [f"next: {afterwards.format(output=shlex.quote(output))}"] if afterwards else []
    return "\n".join([f"{name}: {output}", *numbers, *following])


def _report(message: str, debug: bool) -> None:
    """Prints an error.

    Other ranks leave rank 0 the time to say the same, upon which torchrun ends them; who is still there then met an
    error of its own.
    """
    if _rank():
        time.sleep(GRACE_SECONDS)
        message = f"rank {_rank()}: {message}"
    if debug:
        traceback.print_exc()
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
