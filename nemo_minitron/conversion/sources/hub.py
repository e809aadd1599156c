"""Checkpoints from the Hugging Face hub: only safetensors, JSON and the files of tokenizers, no pickles, no Python.

A download that was stopped goes on where it was.
"""

import glob
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.conversion.sources.arrived import SHOWN, measured
from nemo_minitron.errors import CheckpointError, MinitronError
from nemo_minitron.jobs.job import Job

FILES = ("*.safetensors", "*.json", "*.model", "tokenizer.model*", "*.txt", "*.tiktoken", "*.jinja")
#: Copies of the weights in other forms: folders (original/, onnx/) and Mistral's single file.
COPIES = ("*/*", "consolidated*.safetensors")
CACHE = ".cache"
TIMEOUT = 10.0
HTTP_LIBRARIES = ("requests", "httpx", "urllib3")


class Listing(NamedTuple):
    """What the hub has: the commit, and name -> size of the files to fetch."""

    commit: str
    sizes: dict[str, int | None]


def cached(repository: str) -> Path:
    """A repository of the Hugging Face hub in the hub library's cache, downloaded if it is not there.

    Raises:
        CheckpointError: the hub is out of reach, or the repository is not there or closed to the user.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(FILES), ignore_patterns=list(COPIES)))
    except Exception as error:
        raise _explained(error, repository, "main") from error


def download(job: Job, repo: str, revision: str) -> dict[str, Any]:
    """Downloads a model of the Hugging Face hub into the partial folder of `job`.

    What arrived of an earlier try of the same commit is kept, and what arrives is kept for the next try.
    """
    from huggingface_hub import snapshot_download

    listing = _listing(repo, revision)
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
        raise _explained(error, repo, revision, f"; what arrived is kept in {folder}, run this again") from error
    for name, size in listing.sizes.items():
        if not (folder / name).is_file() or size not in (None, (folder / name).stat().st_size):
            (folder / name).unlink(missing_ok=True)
            raise CheckpointError(f"hf://{repo}: {name} did not arrive whole; run this again, the rest is kept")
    shutil.rmtree(folder / CACHE)
    return {"commit": listing.commit}


def _listing(repo: str, revision: str) -> Listing:
    """Asks the hub what there is; raises CheckpointError where it cannot be had or is no model in safetensors."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except Exception as error:
        raise _explained(error, repo, revision) from error
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    wanted = list(filter_repo_objects(sizes, allow_patterns=list(FILES), ignore_patterns=list(COPIES)))
    wanted += [name for name in sizes if "/" in name and tokenizers.is_file(name)]
    if "config.json" not in wanted or not any(name.endswith(".safetensors") for name in wanted):
        raise CheckpointError(
            f"hf://{repo}: revision {revision} is no model in safetensors: it needs config.json and *.safetensors, "
            f"and has {', '.join(sorted(sizes)[:SHOWN]) or 'no files'}. Pickled weights (*.bin) are not fetched; "
            "take a revision or a model that has safetensors"
        )
    return Listing(info.sha or revision, {name: sizes[name] for name in wanted})


def _resumed(job: Job, listing: Listing) -> Path:
    """The partial folder, emptied where it holds another commit; raises MinitronError where the disk is too small."""
    folder = job.begin()
    stamp = folder / CACHE / "commit"
    if stamp.is_file() and stamp.read_text() != listing.commit:
        job.discard()
        job.begin()
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(listing.commit)
    needed = sum(size or 0 for size in listing.sizes.values()) - measured(folder)["bytes"]
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


def _explained(error: Exception, repo: str, revision: str, afterwards: str = "") -> MinitronError:
    """What went wrong with the hub, and what to do."""
    from huggingface_hub.constants import ENDPOINT

    causes = list(_causes(error))
    responses = [getattr(cause, "response", None) for cause in causes]
    statuses = [response.status_code for response in responses if response is not None]
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
