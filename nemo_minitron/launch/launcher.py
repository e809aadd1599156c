"""`minitron COMMAND --launch torchrun|slurm`: a command as torchrun's ranks here, or as a Slurm job, by NeMo-Run.

NeMo-Run's executors make the torchrun command and the sbatch script, and its Slurm scheduler submits. Each rank runs
the command again, with the same overrides, as a worker. A flow starts the ranks of its stages itself, so that it is a
single task of its job.

The torchrun command runs under `runtime.agent` and not under NeMo-Run's local scheduler, which hands shell quotes on to
the program, keeps its output in files, and tells success from failure but no exit code.
"""

import contextlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.config import Config, Ranks, SlurmConfig, validated
from nemo_minitron.errors import ConfigError, EngineError
from nemo_minitron.packages.versions import check_installed, known_keywords

LAUNCHERS = ("torchrun", "slurm")
#: What NeMo-Run replaces everywhere in a script without a container, by the job's folder.
REPLACED = "/nemo_run"
#: What NeMo-Run before 0.9 gives srun without a container too; Slurm knows neither without Pyxis.
CONTAINER_FLAGS = re.compile(r" --container-(?:mounts|workdir) \S+")


def launch(
    name: str, config: Config, slurm: SlurmConfig, arguments: Sequence[str], launcher: str, dry_run: bool = False
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
        command, environment = torchrun_command(name, config, arguments)
        if dry_run:
            print(shlex.join(command))
            return 0
        if shutil.which(command[0]) is None:
            raise EngineError("there is no torchrun here: it comes with PyTorch, beside its Python or on PATH")
        from nemo_minitron.launch.agent import supervise

        return supervise(command, environment)
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
            _prepared(name, config, slurm, arguments, Path(folder))
            print(_script(Path(folder), name).read_text(encoding="utf-8"))
        return 0
    return _submit(name, config, slurm, arguments)


def check(name: str, config: Config, slurm: SlurmConfig, launcher: str) -> None:
    """Checks that `launcher` can run this command as it is configured.

    Raises:
        ConfigError: it cannot.
        ModuleNotFoundError: NeMo-Run is not installed.
    """
    source = f"minitron {name} --launch {launcher}"
    nodes, devices, _ = ranks(config)
    check_installed("nemo_run")
    if devices is None:
        raise ConfigError(
            "hardware.devices is open, and the machine that the job gets is not known here: give hardware=slurm, or "
            "another preset of what it runs on",
            source,
        )
    if launcher == "torchrun" and name == "flow":
        raise ConfigError(
            "a flow starts torchrun for each of its stages by itself, with hardware.devices ranks: leave --launch away",
            source,
        )
    if launcher == "torchrun" and nodes > 1 and not _names_master():
        raise ConfigError(
            f"trainer.num_nodes = {nodes}: give the same command on every node, with MASTER_ADDR, MASTER_PORT and "
            "NODE_RANK in the environment, or use --launch slurm",
            source,
        )
    if launcher == "slurm":
        if name == "flow" and nodes > 1:
            raise ConfigError(
                f"hardware.num_nodes = {nodes}: a flow runs on one node; on several launch its stages one by one, "
                "finetune, prune, distill, each with --launch slurm",
                source,
            )
        folder = str(job_folder(config, slurm))
        if shlex.quote(folder) != folder or (REPLACED in folder and not slurm.container):
            raise ConfigError(
                f"the job's folder {folder!r}: NeMo-Run takes none with spaces or quotes, nor without a container "
                f"one with {REPLACED}, which it replaces; give another slurm.job_dir",
                source,
            )
        validated(slurm, f"{source}: slurm")


def ranks(config: Config) -> Ranks:
    """The processes that a command is configured to run as."""
    hardware = getattr(config, "trainer", None) or config.hardware
    return hardware.launch()


def job_folder(config: Config, slurm: SlurmConfig) -> Path:
    """Folder of a Slurm job's script and logs."""
    output = getattr(config, "output", None) or config.output_dir
    return Path(slurm.job_dir or f"{str(output).rstrip('/')}.slurm").absolute()


def torchrun_command(name: str, config: Config, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command that starts this node's ranks, and what it adds to the environment."""
    with _quiet():
        from nemo_run import LocalExecutor

        nodes, devices, _ = ranks(config)
        executor = LocalExecutor(nodes=nodes, ntasks_per_node=devices, launcher=_torchrun(name, arguments))
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // devices))
        executor.env_vars = {"LOGLEVEL": os.environ.get("LOGLEVEL", "WARNING"), "OMP_NUM_THREADS": threads}
        role = _role(name, arguments, executor)
    # NeMo-Run quotes for a shell, and there is none.
    return [_program("torchrun"), *(word for text in role.args for word in shlex.split(text))], dict(role.env)


def slurm_executor(name: str, config: Config, slurm: SlurmConfig, arguments: Sequence[str]) -> Any:
    """NeMo-Run's executor for the job."""
    from nemo_run import LocalTunnel, Packager, SlurmExecutor
    from nemo_run.core.execution.slurm import SlurmJobDetails

    nodes, devices, accelerator = ranks(config)
    by_torchrun = name != "flow"
    gpus = (0 if accelerator == "cpu" else devices) if slurm.gpus_per_node is None else slurm.gpus_per_node
    further = {key.replace("-", "_"): value for key, value in slurm.sbatch.items()}
    further = {"requeue": True, **further}
    executor = SlurmExecutor(
        account=slurm.account,
        partition=slurm.partition,
        time=slurm.time,
        nodes=nodes,
        ntasks_per_node=devices if by_torchrun else 1,
        gpus_per_node=gpus or None,
        signal=f"TERM@{slurm.save_seconds}" if slurm.save_seconds else None,
        job_name_prefix="minitron-",
        job_details=SlurmJobDetails(job_name=slurm.job_name or f"minitron-{name}"),
        container_image=slurm.container,
        container_mounts=_mounts(slurm) if slurm.container else [],
        additional_parameters={key: value for key, value in further.items() if _wanted(value)},
        srun_args=[_flag(key, value) for key, value in slurm.srun.items() if _wanted(value)],
        setup_lines="\n".join(_setup(slurm)),
        env_vars={"LOGLEVEL": os.environ.get("LOGLEVEL", "WARNING")},
        retries=slurm.retries,
        launcher=_torchrun(name, arguments) if by_torchrun else None,
        packager=Packager(),
        tunnel=LocalTunnel(job_dir=""),
        **known_keywords(SlurmExecutor, poll_estimated_start_time=False),
    )
    for key, value in further.items():
        if not _wanted(value) and key in SlurmExecutor.SBATCH_FLAGS and hasattr(executor, key):
            setattr(executor, key, None)
    return executor


def _prepared(name: str, config: Config, slurm: SlurmConfig, arguments: Sequence[str], place: Path) -> Any:
    """What NeMo-Run's scheduler would submit; its files are written to `place`, and name the job's own folder."""
    with _quiet():
        from nemo_run.run.torchx_backend.schedulers.slurm import create_scheduler
        from torchx.specs import AppDef

        executor = slurm_executor(name, config, slurm, arguments)
        executor.assign(f"minitron_{name}", str(place), task_id=name, task_dir=name)
        executor.tunnel.job_dir = str(job_folder(config, slurm))
        role = _role(name, [argument.replace("$", "$$") for argument in arguments], executor)
        python = "python" if slurm.container else sys.executable
        words = role.args if name != "flow" else [shlex.quote(word) for word in role.args]
        program = ("torchrun" if slurm.container else _program("torchrun")) if name != "flow" else python
        agent = ["-m", "nemo_minitron.launch.agent", os.getcwd().replace("$", "$$"), program]
        words = [shlex.quote(python), *map(shlex.quote, agent), *words]
        if not slurm.container:
            words = [word.replace(REPLACED, f"{REPLACED[:3]}''{REPLACED[3:]}") for word in words]
        role.entrypoint, *role.args = words
        prepared = create_scheduler("minitron").submit_dryrun(AppDef(name=name, roles=[role], metadata={}), executor)
    if not slurm.container:
        script = _script(place, name)
        lines = script.read_text(encoding="utf-8").splitlines(keepends=True)
        lines = [CONTAINER_FLAGS.sub("", line) if "nemo_minitron.cli.main" in line else line for line in lines]
        script.write_text("".join(lines), encoding="utf-8")
    return prepared


def _script(place: Path, name: str) -> Path:
    """Where NeMo-Run writes the job's script."""
    return place / f"{name}_sbatch.sh"


def _submit(name: str, config: Config, slurm: SlurmConfig, arguments: Sequence[str]) -> int:
    if shutil.which("sbatch") is None:
        raise EngineError(
            "there is no sbatch here: submit from a login node of the cluster; --dry-run shows the script"
        )
    folder = job_folder(config, slurm)
    folder.mkdir(parents=True, exist_ok=True)
    prepared = _prepared(name, config, slurm, arguments, folder)
    from invoke.exceptions import UnexpectedExit
    from nemo_run.run.torchx_backend.schedulers.slurm import create_scheduler

    try:
        with _quiet():
            job = create_scheduler("minitron").schedule(prepared)
    except UnexpectedExit as error:
        said = (error.result.stderr or error.result.stdout).strip()
        raise EngineError(f"sbatch refused the job: {said}; its script is {_script(folder, name)}") from None
    print(f"submitted job {job}\n  script: {_script(folder, name)}\n  logs: {folder / name}")
    return 0


def _role(name: str, arguments: Sequence[str], executor: Any) -> Any:
    """The one role of NeMo-Run's application for the command."""
    from nemo_run import Script
    from nemo_run.run.torchx_backend.packaging import package

    script = Script(path="nemo_minitron.cli.main", m=True, entrypoint="python", args=[name, *arguments])
    return package(name, script, executor, serialize_metadata_for_scripts=False).roles[0]


def _torchrun(name: str, arguments: Sequence[str]) -> Any:
    """NeMo-Run's torchrun launcher, with a rendezvous id that is the same wherever the same command is given."""
    from nemo_run.core.execution.launcher import Torchrun

    return Torchrun(rdzv_id=1 + zlib.crc32("\0".join([name, *arguments]).encode()) % 10_000)


def _program(name: str) -> str:
    """The program `name` that belongs to this Python."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def _names_master() -> bool:
    rank = os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID")
    return all((os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"), rank))


def _mounts(slurm: SlurmConfig) -> list[str]:
    """SRC:DST of each mount; the working folder among them."""
    mounts = [place if ":" in place else f"{place}:{place}" for place in slurm.mounts]
    here = Path.cwd()
    same = [Path(mount.split(":")[0]) for mount in mounts if mount.split(":")[0] == mount.split(":")[1]]
    return mounts if any(here.is_relative_to(path) for path in same) else [*mounts, f"{here}:{here}"]


def _setup(slurm: SlurmConfig) -> Iterator[str]:
    yield "\n# SIGTERM is for the job step, which saves and ends; this shell waits for it\ntrap : TERM"
    for name, value in slurm.env.items():
        yield f"export {name}={shlex.quote(str(value))}"
    if slurm.setup:
        yield slurm.setup


def _wanted(value: Any) -> bool:
    return value is not None and value is not False


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag}={value}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """In the body, NeMo-Run prints nothing, and the shells that it starts read nothing."""
    from nemo_run.core.frontend.console.api import CONSOLE

    before, CONSOLE.quiet = (CONSOLE.quiet, sys.stdin), True
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            CONSOLE.quiet, sys.stdin = before
