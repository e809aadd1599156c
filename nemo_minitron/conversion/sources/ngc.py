"""Checkpoints from NVIDIA's NGC, by its own client."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

from nemo_minitron.checkpoints.formats import table
from nemo_minitron.conversion.sources.arrived import SHOWN, arrived
from nemo_minitron.errors import CheckpointError, EngineError
from nemo_minitron.jobs.job import Job

CATALOG = "https://catalog.ngc.nvidia.com"
KEY_REMEDY = (
    "set the key, export NGC_CLI_API_KEY=KEY (or run `ngc config set`); https://org.ngc.nvidia.com/setup/api-keys "
    "makes one"
)
#: What the NGC client says -> what to do; the first that is found counts.
REMEDIES = (
    (r"missing org", "name your organisation too, export NGC_CLI_ORG=ORG, or run `ngc config set`"),
    (r"error:? 412|accept (the )?terms", f"accept the model's terms at its page in {CATALOG}, then run this again"),
    (r"error:? 404|could not be found|does not exist", f"check org, team, model and version at {CATALOG}"),
    (r"error:? 40[13]|(missing|invalid) api ?key|guest acc|session key", KEY_REMEDY),
    (r"not enough space|no space left", "make room on that disk, or name a folder on another one, output=DIR"),
    (r"connect|timed out|resolve", "check the network and HTTPS_PROXY, then run this again"),
)
STATUS = re.compile(r"(?:download status:|\"status\":)[ \"]*([a-z ]+)", re.IGNORECASE)
KEPT_BYTES = 1 << 16
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
STOP_SECONDS = 10


def download(job: Job, source: re.Match[str]) -> None:
    """Downloads a model version with the NGC client into the partial folder of `job`."""
    client = shutil.which("ngc")
    if client is None:
        raise EngineError(
            f"{source[0]} needs NVIDIA's NGC client, and there is no `ngc` on PATH: install it, "
            f"https://org.ngc.nvidia.com/setup/installers/cli, and {KEY_REMEDY}"
        )
    job.discard()
    folder = job.begin().resolve()
    try:
        target = source[0].removeprefix("ngc://")
        said = _run_client([client, "registry", "model", "download-version", target, "--dest", str(folder)], source[0])
        _lift(folder, folder / f"{source['model']}_v{source['version']}", said)
        if not holds_checkpoint(folder):
            raise CheckpointError(
                f"{source[0]} holds no checkpoint that is known here (a .nemo, context/ and weights/, config.json or "
                f"model_config.yaml), only {_listed(folder)}; nothing was kept"
            )
    except BaseException:
        job.discard()
        raise


def _lift(folder: Path, made: Path, said: str) -> None:
    """Moves what the client put into `made`, a folder of its own in `folder`, up to `folder`."""
    if not made.is_dir() or not any(made.iterdir()):
        raise CheckpointError(
            f"the NGC client ended well but left nothing in {made.name}; nothing was kept. It said:\n{_shown(said)}"
        )
    aside = made.rename(folder / ".made")
    for path in list(aside.iterdir()):
        path.rename(folder / path.name)
    aside.rmdir()


def holds_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint of a known format is in the folder or below it."""
    return any(
        table.is_named_like_a_file(path) or (path.is_dir() and table.detected(path) is not None)
        for path in (folder, *folder.rglob("*"))
    )


def _listed(folder: Path) -> str:
    names = [path.relative_to(folder).as_posix() for path in arrived(folder)]
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _run_client(command: list[str], source: str) -> str:
    """Runs the NGC client; returns the end of what it said.

    Raises:
        CheckpointError: it failed, by its exit code or by the status it reports (older clients exit with 0).
    """
    code, said = _watched(command)
    status = STATUS.findall(said)
    if code == 0 and (not status or status[-1].strip().lower() == "completed"):
        return said
    remedy = next((remedy for pattern, remedy in REMEDIES if re.search(pattern, said, re.IGNORECASE)), None)
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    what_to_do = f"{remedy[0].upper()}{remedy[1:]}" if remedy else "Run this again"
    said = f". It said:\n{_shown(said)}" if said.strip() else " without a word"
    raise CheckpointError(f"{source}: the NGC client {ended}{said}\n{what_to_do}. Nothing was kept")


def _watched(command: list[str]) -> tuple[int, str]:
    """Exit code of `command` and the end of its output, which a terminal sees as it comes, progress bars and all."""
    terminal = sys.stderr.isatty()
    reading, writing = pty.openpty() if terminal else os.pipe()
    said = b""
    with os.fdopen(reading, "rb", buffering=0):
        process = _started(command, writing)
        try:
            while block := _read(reading):
                said = (said + block)[-KEPT_BYTES:]
                if terminal:
                    sys.stderr.buffer.write(block)
                    sys.stderr.flush()
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    return code, CONTROL.sub("", said.decode("utf-8", errors="replace"))


def _started(command: list[str], writing: int) -> subprocess.Popen[bytes]:
    """Starts `command` with its output going to `writing`, which is closed here; nobody answers its questions."""
    environment = {**os.environ, "COLUMNS": str(shutil.get_terminal_size().columns)}
    with os.fdopen(writing, "wb") as output:
        try:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        except OSError as error:
            raise EngineError(f"the NGC client {command[0]} does not run ({error}): install it again") from None


def _read(end: int) -> bytes:
    try:
        return os.read(end, KEPT_BYTES)
    except OSError:  # how Linux says that nobody writes to a pseudo-terminal any more
        return b""


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _shown(said: str) -> str:
    """The last lines, without rules and progress bars."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", said)]
    return "\n".join(f"  {line}" for line in [line for line in lines if line.strip("-─") and "━" not in line][-SHOWN:])
