"""Runs a stage in this process, or spreads it over ranks with torchrun.

One rank: the stage's work runs here. More: this process starts torchrun, which starts one worker a rank; rank 0 writes
the result, and an error of a worker comes back as the same error here. Started under torchrun or srun already (RANK is
set), a process is a worker itself.
"""

import contextlib
import dataclasses
import json
import os
import pkgutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_minitron import errors
from nemo_minitron.artifacts import PARTIAL_KEY, Manifest, write_json
from nemo_minitron.config import Config, TrainerConfig
from nemo_minitron.errors import EngineError, MinitronError
from nemo_minitron.jobs.job import Job, disk_has_room
from nemo_minitron.jobs.progress import ERROR_FILE
from nemo_minitron.launch.preemption import STOP_FILE, passed_on
from nemo_minitron.packages.extras import ENGINE, missing_package, require

Work = Callable[[Path], dict[str, Any]]
WAIT_SECONDS = 600
#: Exit code for errors that are no MinitronError (EX_SOFTWARE of sysexits.h).
INTERNAL_ERROR = 70


def under_launcher() -> bool:
    """Whether this process is one rank of several, started by torchrun or the like."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def first_makes(place: Path, make: Callable[[], object]) -> None:
    """Rank 0 makes `place`, unless it is there; the others go on once it is. What `make` makes appears in one piece.

    Where rank 0 fails, torchrun ends the others, too.
    """
    if rank() == 0 and not place.exists():
        make()
    while not place.exists():
        time.sleep(0.1)


def wait_for_others(folder: Path) -> None:
    """Rank 0 goes on once all others have come here, too; they say so by files in `folder`, and do not wait."""
    run = os.environ.get("MASTER_PORT", "")
    if rank() != 0:
        (folder / f".here-{run}-{rank()}").touch()
        return
    others = [folder / f".here-{run}-{number}" for number in range(1, int(os.environ.get("WORLD_SIZE", "1")))]
    while not all(other.exists() for other in others):
        time.sleep(0.1)
    for other in others:
        other.unlink()


def run_stage(job: Job, work: Work, *, stage: str, config: Config, trainer: TrainerConfig, resumable: bool) -> Manifest:
    """Runs `work` on as many ranks as `trainer` asks for, unless the job's result is there already.

    Args:
        stage: ``module:function`` of the stage, which a worker calls with `config`.
    """
    done = job.finished()
    if done is not None:
        return done
    world = trainer.devices * trainer.num_nodes
    if under_launcher():
        return _as_worker(job, work, resumable)
    if world == 1:
        return job.run(work, resumable=resumable)
    if trainer.num_nodes > 1:
        raise EngineError(
            f"trainer.num_nodes = {trainer.num_nodes}: start the same command on every node with torchrun "
            f"--nnodes={trainer.num_nodes} --nproc-per-node={trainer.devices} (or srun)"
        )
    _torchrun(stage, config, trainer.devices)
    return Manifest.read(job.output)


def _as_worker(job: Job, work: Work, resumable: bool) -> Manifest:
    if rank() == 0:
        partial = job.begin(resumable=resumable)
        try:
            with disk_has_room(job.output):
                return job.finish(**work(partial))
        except BaseException:
            if not resumable:
                job.discard()
            raise
        finally:
            job.release()
    partial = _wait_for_partial(job)
    with disk_has_room(job.output):
        result = work(partial)
    _wait_for_result(job)
    return Manifest(
        stage=job.stage, key=job.key(), inputs={}, config=job.config, seed=job.seed, metrics=result["metrics"]
    )


def _wait_for_partial(job: Job) -> Path:
    """The partial folder, once rank 0 has made it for this very job."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            if json.loads((job.partial / PARTIAL_KEY).read_text(encoding="utf-8"))["key"] == job.key():
                return job.partial
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.1)
    raise EngineError(f"rank 0 did not start {job.partial} within {WAIT_SECONDS} s; is it on a shared file system?")


def _wait_for_result(job: Job) -> None:
    """Until rank 0 has put the partial folder in the output's place, so that what follows can read it.

    Where rank 0 fails, torchrun ends this rank, too.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while job.partial.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def _torchrun(stage: str, config: Config, ranks: int) -> None:
    require("torch", f"{stage} on {ranks} ranks")
    with tempfile.TemporaryDirectory(prefix="minitron-") as folder:
        config_file, error_file = Path(folder) / "config.json", Path(folder) / "error.json"
        write_json(config_file, dataclasses.asdict(config))
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={ranks}"]
        command += [f"--master-port={free_port()}", "-m", "nemo_minitron.launch.ranks"]
        command += [stage, f"{type(config).__module__}:{type(config).__name__}", str(config_file)]
        stop_file = Path(os.environ.get(STOP_FILE) or Path(folder) / "stop")
        environment = {**os.environ, ERROR_FILE: str(error_file), STOP_FILE: str(stop_file)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        with passed_on(stop_file):
            finished = subprocess.run(command, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if finished.returncode == 0:
            return
        if error_file.exists():
            error = json.loads(error_file.read_text(encoding="utf-8"))
            raise _rebuild(error["kind"], error["message"])
        tail = "\n".join(finished.stderr.strip().splitlines()[-20:])
        raise EngineError(f"a rank of {stage} ended with exit code {finished.returncode}:\n{tail}")


def _rebuild(kind: str, message: str) -> MinitronError:
    """The error that a worker told of: its class and its message."""
    error = MinitronError(message)
    cause = getattr(errors, kind, None)
    if isinstance(cause, type) and issubclass(cause, MinitronError):
        error = cause.__new__(cause)
        Exception.__init__(error, message)
    return error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def from_dict(kind: type, values: Any) -> Any:
    """The configuration dataclass `kind` from its nested dict form."""
    fields = {}
    for field in dataclasses.fields(kind):
        value = values[field.name]
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type) and isinstance(value, dict):
            value = from_dict(field.type, value)
        fields[field.name] = value
    return kind(**fields)


def worker(stage: str, config_class: str, config_file: str) -> int:
    """One rank: calls the stage with the configuration that the parent wrote."""
    config = from_dict(pkgutil.resolve_name(config_class), json.loads(Path(config_file).read_text(encoding="utf-8")))
    try:
        pkgutil.resolve_name(stage)(config)
    except MinitronError as error:
        tell_parent(error)
        return error.exit_code
    except Exception as error:
        where, who = traceback.format_exc(limit=-3), f"rank {rank()} of {stage}"
        missing = isinstance(error, ModuleNotFoundError) and missing_package(error, who, (ENGINE,))
        tell_parent(missing or EngineError(f"{who} failed: {type(error).__name__}: {error}\n{where}"))
        raise
    return 0


def tell_parent(error: Exception) -> None:
    """Leaves the error of the first rank that fails where the process that started the ranks looks for it."""
    target = os.environ.get(ERROR_FILE)
    if target and not os.path.exists(target):
        code = getattr(error, "exit_code", INTERNAL_ERROR)
        with contextlib.suppress(OSError):  # a full disk is what the error may be about
            write_json(target, {"kind": type(error).__name__, "message": str(error), "exit_code": code})


if __name__ == "__main__":
    sys.exit(worker(*sys.argv[1:]))
