"""Which iteration a folder of Megatron's checkpoints stands for, and where it lies."""

import re
from pathlib import Path

from nemo_minitron.checkpoints import untrusted
from nemo_minitron.checkpoints.files import Files, folder_files
from nemo_minitron.checkpoints.formats.bridge.classes import LATEST_STATE, LEGACY, RELEASE, RUN_CONFIG, TRACKER
from nemo_minitron.checkpoints.storage import torch_dist
from nemo_minitron.checkpoints.storage.torch_zip import StoredTensor, read_torch_file
from nemo_minitron.errors import CheckpointError

FOLDER = re.compile(rf"iter_\d{{7,}}|{RELEASE}")
#: Folder of a first iteration, which is what a model that is not trained on has.
FIRST = "iter_0000000"
SHOWN = 6


def is_iteration(path: Path) -> bool:
    """Whether `path` is the folder of one iteration: its weights, and what describes them."""
    if (path / RUN_CONFIG).is_file() or (path / torch_dist.METADATA).is_file():
        return True
    return bool(FOLDER.fullmatch(path.name)) and any(path.glob(f"*/{LEGACY}"))


def iterations_in(path: Path) -> list[str]:
    """Names of the folders of iterations in `path`, ascending."""
    if not path.is_dir():
        return []
    entries = [entry for entry in path.iterdir() if FOLDER.fullmatch(entry.name) and is_iteration(entry)]
    return sorted((entry.name for entry in entries), key=lambda name: (len(name), name))


def folder_of(path: Path) -> Path:
    """The folder of the iteration that `path` stands for: itself, or the latest one in it.

    Raises:
        CheckpointError: the latest one is not there, is not said or is said in two ways.
    """
    if is_iteration(path):
        return path
    there, latest = iterations_in(path), _latest(path)
    if not latest:
        if len(there) == 1:
            return path / there[0]
        raise CheckpointError(
            f"{path} holds {_some(there)} and no {TRACKER}, which names the latest: name the folder that is meant"
        )
    (source, name), *others = latest.items()
    for other, another in others:
        if another != name:
            raise CheckpointError(
                f"{path}: {source} names {name}, {other} names {another}: name the folder that is meant"
            )
    if name not in there:
        raise CheckpointError(
            f"{path}/{source} names {name}, which is not there: {_some(there)}; the checkpoint was not copied whole, "
            "or name the folder that is meant"
        )
    return path / name


def _some(names: list[str]) -> str:
    if not names:
        return "there is no iteration"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _latest(path: Path) -> dict[str, str]:
    """File -> name of the folder that it calls the latest."""
    files, found = folder_files(path, deep=False), {}
    if TRACKER in files:
        found[TRACKER] = _named_in_text(files)
    if LATEST_STATE in files:
        found[LATEST_STATE] = _folder_name(_step(files))
    return found


def _named_in_text(files: Files) -> str:
    text = files.text(TRACKER).strip()
    if text == RELEASE:
        return RELEASE
    if not text.isascii() or not text.isdecimal() or len(text) > len(str(untrusted.LARGEST)):
        raise CheckpointError(f"{files.where}/{TRACKER} names no iteration: {untrusted.shown(text)}")
    return _folder_name(int(text))


def _step(files: Files) -> int:
    """The iteration in a file of Bridge's training state."""
    source = f"{files.where}/{LATEST_STATE}"
    stored = read_torch_file(files[LATEST_STATE], source)
    step = stored.get("step") if isinstance(stored, dict) else None
    if not isinstance(step, StoredTensor) or step.shape or step.dtype not in ("int32", "int64"):
        raise CheckpointError(f"{source} names no iteration")
    number = int.from_bytes(step.data.read(), "little", signed=True)
    if not 0 <= number < untrusted.LARGEST:
        raise CheckpointError(f"{source} names no iteration: {number}")
    return number


def _folder_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"
