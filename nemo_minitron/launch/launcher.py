"""`minitron COMMAND --launch torchrun|slurm`: the command as torchrun's ranks here, or as a Slurm job, by NeMo-Run."""

from collections.abc import Sequence

from nemo_minitron.config import SlurmConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.launch import slurm as slurm_job
from nemo_minitron.launch import torchrun
from nemo_minitron.launch.application import Launched, ranks
from nemo_minitron.packages.versions import check_installed

LAUNCHERS = ("torchrun", "slurm")


def launch(
    name: str, config: Launched, slurm: SlurmConfig, arguments: Sequence[str], launcher: str, dry_run: bool = False
) -> int:
    """Runs `minitron NAME ARGUMENTS` by `launcher`, or prints how; returns the exit code.

    Args:
        config: the command's validated configuration.
        slurm: where to run with slurm.
        arguments: the command's overrides, which every rank gets.

    Raises:
        ConfigError: before anything is written.
        EngineError: the job cannot be submitted from here.
    """
    check(name, config, slurm, launcher)
    if launcher == "torchrun":
        return torchrun.run(name, config, arguments, dry_run)
    return slurm_job.run(name, config, slurm, arguments, dry_run)


def check(name: str, config: Launched, slurm: SlurmConfig, launcher: str) -> None:
    """Checks that `launcher` can run this command as it is configured.

    Raises:
        ConfigError: it cannot.
        ModuleNotFoundError: NeMo-Run is not installed.
    """
    source = f"minitron {name} --launch {launcher}"
    check_installed("nemo_run")
    if ranks(config).per_node is None:
        raise ConfigError(
            "hardware.devices is open, and the machine that the job gets is not known here: give hardware=slurm, or "
            "another preset of what it runs on",
            source,
        )
    if launcher == "torchrun":
        torchrun.check(name, config, source)
    else:
        slurm_job.check(name, config, slurm, source)
