"""The stages of a run on disk: their folders, manifests and logs; those that work and those that have ended.

Files are data: nothing in them is trusted to have the right kind or to be finite.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import MANIFEST, PARTIAL_KEY, Manifest
from nemo_minitron.artifacts.stages import EVALUATIONS, stage_name
from nemo_minitron.errors import MinitronError

REPORT, PAGE = "report.json", "report.html"
LOG, TENSORBOARD = Path("logs") / "engine.log", "tensorboard"
#: Bytes of a JSON file that are read; larger ones are none of ours.
JSON_LIMIT = 256 << 20


def read_manifests(place: Path, missing: list[str]) -> Iterator[tuple[str, Manifest]]:
    """Folder relative to the run ('' for itself) and manifest of every finished stage."""
    if place.is_file() or (place / MANIFEST).is_file():
        candidates = [place]
    else:
        candidates = [path.parent for pattern in ("*", "*/*") for path in place.glob(f"{pattern}/{MANIFEST}")]
        candidates += [*place.glob("*.nemo"), *place.glob("*.gguf")]
        candidates = [path for path in candidates if not any(p.startswith(".") for p in path.relative_to(place).parts)]
    for path in sorted(candidates):
        try:
            manifest = Manifest.read(path)
            _check(manifest)
        except (MinitronError, TypeError) as error:
            missing.append(str(error) if isinstance(error, MinitronError) else f"{path / MANIFEST}: {error}")
            continue
        yield ("" if path == place else path.relative_to(place).as_posix()), manifest


def _check(manifest: Manifest) -> None:
    for name in ("stage", "key", "created"):
        if not isinstance(getattr(manifest, name), str):
            raise TypeError(f"{name} is not text")
    if number(manifest.peak_memory_bytes) is None:
        raise TypeError("peak_memory_bytes is not a number")


def number(value: object) -> float | None:
    """`value` where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def unfinished_stages(place: Path) -> list[dict[str, Any]]:
    """Stages that are running or were stopped: what their hidden folders say."""
    return list(_unfinished(place))


def finished_stages(place: Path) -> list[tuple[str, Manifest]]:
    """Folder ('' for `place` itself) and manifest of each finished stage; damaged ones are left out."""
    return list(read_manifests(place, []))


def _unfinished(place: Path) -> Iterator[dict[str, Any]]:
    beside = [place.with_name(f".{place.name}.partial") / PARTIAL_KEY]
    for marker in [*place.glob(f".*.partial/{PARTIAL_KEY}"), *place.glob(f"{EVALUATIONS}/.*.partial/{PARTIAL_KEY}"),
                   *(path for path in beside if path.is_file())]:  # fmt: skip
        told = read_json(marker)
        told = told if isinstance(told, dict) else {}
        inside = place in marker.parents
        folder = _without_dots(marker.parent.relative_to(place).as_posix()) if inside else place.name
        stage = str(told.get("stage", "?"))
        yield {
            "stage": stage_name(folder, stage),
            "kind": stage,
            "folder": folder,
            "partial": str(marker.parent),
            "config": told.get("config") if isinstance(told.get("config"), dict) else {},
        }


def _without_dots(name: str) -> str:
    """`evaluations/.NAME.partial` -> `evaluations/NAME`."""
    head, _, last = name.rpartition("/")
    if last.startswith(".") and last.endswith(".partial"):
        last = last[1 : -len(".partial")]
    return f"{head}/{last}" if head else last


def log_files(run: str | os.PathLike) -> dict[str, Path]:
    """Where NeMo's, Megatron's and ModelOpt's messages went: stage -> log file, of finished and of running stages."""
    place = Path(run)
    folders = {"": place} | {
        str(path.relative_to(place)): path for path in [*place.glob("*"), *place.glob(f"{EVALUATIONS}/*")]
    }
    logs = {}
    for name, folder in folders.items():
        for log in (folder / LOG, folder.with_name(f"{folder.name}.logs") / LOG):
            if log.is_file():
                logs[_without_dots(name) or place.name] = log
    return dict(sorted(logs.items(), key=lambda entry: entry[1].stat().st_mtime_ns))


def log_file(stage: str | os.PathLike) -> Path | None:
    """The log file of one stage's output, while it runs too; None where it has none."""
    place = Path(stage)
    folders = (place, place.with_name(f".{place.name}.partial"), place.with_name(f"{place.name}.logs"))
    return next((folder / LOG for folder in folders if (folder / LOG).is_file()), None)


def read_report(path: Path) -> dict[str, Any]:
    """The JSON report at `path`, or nothing where there is none that is a report."""
    value = read_json(path)
    return value if isinstance(value, dict) and isinstance(value.get("stages"), list) else {}


def read_json(path: Path) -> Any:
    """The JSON value in a file; None where there is none."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
