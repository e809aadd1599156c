"""Settings of `minitron COMMAND --launch`: where a command runs. No stage sees them; they change no result."""

import dataclasses
from dataclasses import field
from typing import Any

from nemo_minitron.config.schemas.base import Config, at_least
from nemo_minitron.config.schemas.hardware import HardwareConfig


@dataclasses.dataclass(kw_only=True)
class SlurmConfig(Config):
    """A Slurm job. Nodes and ranks a node are trainer.num_nodes and trainer.devices (flow: hardware.*)."""

    partition: str | None = None
    """Partition; needed."""
    account: str | None = None
    """Account that pays; none: your default one."""
    time: str = "04:00:00"
    """Time limit, as sbatch takes it."""
    job_name: str | None = None
    """Name of the job; none: minitron-COMMAND."""
    job_dir: str | None = None
    """Folder of the script and the logs, seen by all nodes; none: beside the output, OUTPUT.slurm."""
    gpus_per_node: int | None = None
    """GPUs to ask for on each node; none: one a rank, and none with accelerator=cpu; 0: do not ask."""
    container: str | None = None
    """Image for Pyxis: a .sqsh file or a registry's name; none: the environment that submits."""
    mounts: list[str] = field(default_factory=list)
    """Folders that the container sees, PATH or SRC:DST. The working folder is mounted in any case."""
    save_seconds: int = 300
    """SIGTERM so many seconds before the time limit, on which training saves and ends."""
    retries: int = 3
    """How often Slurm starts the job again when it ended with an exit code other than 0, as it does after a save."""
    setup: str | None = None
    """Shell lines before the job step, for instance `module load cuda`."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job. They stand in the script: no secrets here; sbatch hands on your own."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further sbatch options, {qos:high,exclusive:true}; false or null leaves one out."""
    srun: dict[str, Any] = field(default_factory=dict)
    """Further srun options, in the same form."""

    def problems(self) -> list[str]:
        problems = (
            [] if self.partition else ["partition is missing: name the partition to run in, slurm.partition=NAME"]
        )
        problems += at_least(0, gpus_per_node=self.gpus_per_node, save_seconds=self.save_seconds, retries=self.retries)
        for place in self.mounts if self.container else []:
            source, _, target = place.partition(":")
            if not source.startswith("/") or (target and not target.startswith("/")):
                problems.append(f"mounts: {place!r} is neither /PATH nor /SRC:/DST")
        if self.mounts and not self.container:
            problems.append("mounts are for a container: name its image, slurm.container=IMAGE")
        return problems


@dataclasses.dataclass(kw_only=True)
class LaunchConfig(Config):
    """What stands beside a command's own settings: the hardware preset of a single stage, and Slurm's."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
