"""What the command line says of itself: the overview, a command's usage, and its settings."""

from collections.abc import Sequence

from nemo_minitron.config.commands import COMMANDS


def overview() -> str:
    """The text of `minitron --help`."""
    commands = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: minitron COMMAND [key=value ...] [--config-name NAME] [--debug] [--help]\n\n"
        "Prunes and distils models of the NeMo framework (Minitron).\n\n"
        f"commands:\n{commands}\n\n"
        "minitron COMMAND --help lists the settings of a command. minitron --version shows the version."
    )


def usage(name: str) -> str:
    """The usage line of the command `name`."""
    command = COMMANDS[name]
    own = [shown for _, shown in command.positionals] + [f"[{option.shown}]" for option in command.flags]
    return " ".join(["minitron", name, *own, "[key=value ...] [--config-name NAME] [--debug] [--help]"])


def options(name: str) -> list[tuple[str, str]]:
    """Each option of the command `name` as it is written, and what it does."""
    return [
        ("--config-name NAME", f"a file of conf/ or the path of a .yaml file, instead of conf/{name}.yaml"),
        ("--debug", "show the traceback of an error"),
        *((option.shown, option.meaning) for option in COMMANDS[name].flags),
    ]


def command_help(name: str, overrides: Sequence[str], config_name: str | None) -> str:
    """Usage, presets and every setting with its value so far and its description."""
    from nemo_minitron.config.compose import presets, read
    from nemo_minitron.config.reflect import leaf_values, setting_docs, shown

    config = read(name, overrides, config_name)
    docs = setting_docs(type(config))
    settings = [f"  {key}={shown(value)}\n      {docs[key]}" for key, value in leaf_values(config).items()]
    groups = [f"  {group}={'|'.join(names)}" for group, names in presets(name).items()]
    return "\n".join(
        [
            f"usage: {usage(name)}",
            f"\n{COMMANDS[name].summary}\n",
            "options:",
            *(f"  {option:<19} {meaning}" for option, meaning in options(name)),
            *(["\npresets:", *groups] if groups else []),
            "\nsettings, as they stand with the arguments given:",
            *settings,
            *_slurm_help(name, overrides, config_name),
        ]
    )


def _slurm_help(name: str, overrides: Sequence[str], config_name: str | None) -> list[str]:
    if not COMMANDS[name].launched:
        return []
    from nemo_minitron.config.compose import read_launch
    from nemo_minitron.config.reflect import leaf_values, setting_docs, shown

    slurm = read_launch(name, overrides, config_name).slurm
    docs = setting_docs(type(slurm))
    settings = [f"  slurm.{key}={shown(value)}\n      {docs[key]}" for key, value in leaf_values(slurm).items()]
    return ["\nwith --launch slurm:", *settings]
