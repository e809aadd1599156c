"""`minitron COMMAND --launch torchrun`: the command as torchrun's ranks on this node, by NeMo-Run.

NeMo-Run's local executor makes the torchrun command. It runs under `launch.agent` and not under NeMo-Run's local
scheduler, which hands shell quotes on to the program, keeps its output in files, and tells success from failure but no
exit code.
"""

import os
import shlex
import shutil
from collections.abc import Sequence

from nemo_minitron.errors import ConfigError, EngineError
from nemo_minitron.launch.application import Launched, program, quiet, ranks, role_of, torchrun_launcher


def check(name: str, config: Launched, source: str) -> None:
    """Raises ConfigError where torchrun, here, cannot run this command as it is configured."""
    nodes = ranks(config).nodes
    if name == "flow":
        raise ConfigError(
            "a flow starts torchrun for each of its stages by itself, with hardware.devices ranks: leave --launch away",
            source,
        )
    if nodes > 1 and not _names_master():
        raise ConfigError(
            f"trainer.num_nodes = {nodes}: give the same command on every node, with MASTER_ADDR, MASTER_PORT and "
            "NODE_RANK in the environment, or use --launch slurm",
            source,
        )


def run(name: str, config: Launched, arguments: Sequence[str], dry_run: bool) -> int:
    """Runs the command as ranks, or prints how; returns the exit code.

    Raises:
        EngineError: there is no torchrun.
    """
    command, environment = torchrun_command(name, config, arguments)
    if dry_run:
        print(shlex.join(command))
        return 0
    if shutil.which(command[0]) is None:
        raise EngineError("there is no torchrun here: it comes with PyTorch, beside its Python or on PATH")
    from nemo_minitron.launch.agent import supervise

    return supervise(command, environment)


def torchrun_command(name: str, config: Launched, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command that starts this node's ranks, and what it adds to the environment."""
    with quiet():
        from nemo_run import LocalExecutor

        nodes, devices, _ = ranks(config)
        executor = LocalExecutor(nodes=nodes, ntasks_per_node=devices, launcher=torchrun_launcher(name, arguments))
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // (devices or 1)))
        executor.env_vars = {"LOGLEVEL": os.environ.get("LOGLEVEL", "WARNING"), "OMP_NUM_THREADS": threads}
        role = role_of(name, arguments, executor)
    # NeMo-Run quotes for a shell, and there is none.
    return [program("torchrun"), *(word for text in role.args for word in shlex.split(text))], dict(role.env)


def _names_master() -> bool:
    rank = os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID")
    return all((os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"), rank))
