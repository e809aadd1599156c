"""`minitron COMMAND --launch slurm`: the command as a Slurm job, by NeMo-Run.

NeMo-Run's executor makes the sbatch script, and its Slurm scheduler submits. Each rank runs the command again, with the
same overrides, as a worker. A flow starts the ranks of its stages itself, so that it is a single task of its job.
"""

import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import FlowConfig, SlurmConfig, validated
from nemo_minitron.errors import ConfigError, EngineError
from nemo_minitron.launch.application import MODULE, Launched, program, quiet, ranks, role_of, torchrun_launcher
from nemo_minitron.packages.versions import known_keywords

if TYPE_CHECKING:
    from nemo_run import SlurmExecutor
    from torchx.specs import AppDryRunInfo

#: What NeMo-Run replaces everywhere in a script without a container, by the job's folder.
REPLACED = "/nemo_run"
#: What NeMo-Run before 0.9 gives srun without a container too; Slurm knows neither without Pyxis.
CONTAINER_FLAGS = re.compile(r" --container-(?:mounts|workdir) \S+")


def check(name: str, config: Launched, slurm: SlurmConfig, source: str) -> None:
    """Raises ConfigError where a Slurm job cannot run this command as it is configured."""
    nodes = ranks(config).nodes
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


def run(name: str, config: Launched, slurm: SlurmConfig, arguments: Sequence[str], dry_run: bool) -> int:
    """Submits the command as a job, or prints its script; returns the exit code.

    Raises:
        EngineError: it cannot be submitted from here.
    """
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
            _prepared(name, config, slurm, arguments, Path(folder))
            print(_script(Path(folder), name).read_text(encoding="utf-8"))
        return 0
    return _submit(name, config, slurm, arguments)


def job_folder(config: Launched, slurm: SlurmConfig) -> Path:
    """Folder of a Slurm job's script and logs."""
    output = config.output_dir if isinstance(config, FlowConfig) else config.output
    return Path(slurm.job_dir or f"{str(output).rstrip('/')}.slurm").absolute()


def slurm_executor(name: str, config: Launched, slurm: SlurmConfig, arguments: Sequence[str]) -> "SlurmExecutor":
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
        launcher=torchrun_launcher(name, arguments) if by_torchrun else None,
        packager=Packager(),
        tunnel=LocalTunnel(job_dir=""),
        **known_keywords(SlurmExecutor, poll_estimated_start_time=False),
    )
    for key, value in further.items():
        if not _wanted(value) and key in SlurmExecutor.SBATCH_FLAGS and hasattr(executor, key):
            setattr(executor, key, None)
    return executor


def _prepared(
    name: str, config: Launched, slurm: SlurmConfig, arguments: Sequence[str], place: Path
) -> "AppDryRunInfo[Any]":
    """What NeMo-Run's scheduler would submit; its files are written to `place`, and name the job's own folder."""
    with quiet():
        from nemo_run.run.torchx_backend.schedulers.slurm import create_scheduler
        from torchx.specs import AppDef

        executor = slurm_executor(name, config, slurm, arguments)
        executor.assign(f"minitron_{name}", str(place), task_id=name, task_dir=name)
        executor.tunnel.job_dir = str(job_folder(config, slurm))
        role = role_of(name, [argument.replace("$", "$$") for argument in arguments], executor)
        python = "python" if slurm.container else sys.executable
        words = role.args if name != "flow" else [shlex.quote(word) for word in role.args]
        torchrun = "torchrun" if slurm.container else program("torchrun")
        started = torchrun if name != "flow" else python
        agent = ["-m", "nemo_minitron.launch.agent", os.getcwd().replace("$", "$$"), started]
        words = [shlex.quote(python), *map(shlex.quote, agent), *words]
        if not slurm.container:
            words = [word.replace(REPLACED, f"{REPLACED[:3]}''{REPLACED[3:]}") for word in words]
        role.entrypoint, *role.args = words
        prepared = create_scheduler("minitron").submit_dryrun(AppDef(name=name, roles=[role], metadata={}), executor)
    if not slurm.container:
        script = _script(place, name)
        lines = script.read_text(encoding="utf-8").splitlines(keepends=True)
        lines = [CONTAINER_FLAGS.sub("", line) if MODULE in line else line for line in lines]
        script.write_text("".join(lines), encoding="utf-8")
    return prepared


def _script(place: Path, name: str) -> Path:
    """Where NeMo-Run writes the job's script."""
    return place / f"{name}_sbatch.sh"


def _submit(name: str, config: Launched, slurm: SlurmConfig, arguments: Sequence[str]) -> int:
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
        with quiet():
            job = create_scheduler("minitron").schedule(prepared)
    except UnexpectedExit as error:
        said = (error.result.stderr or error.result.stdout).strip()
        raise EngineError(f"sbatch refused the job: {said}; its script is {_script(folder, name)}") from None
    print(f"submitted job {job}\n  script: {_script(folder, name)}\n  logs: {folder / name}")
    return 0


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


def _wanted(value: object) -> bool:
    return value is not None and value is not False


def _flag(name: str, value: object) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag}={value}"
