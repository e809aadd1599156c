"""How a result was made: its manifest."""

import dataclasses
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.archive import last_member
from nemo_minitron.errors import MinitronError

MANIFEST = "manifest.json"
PARTIAL_KEY = "partial.json"
MANIFEST_LIMIT = 16 << 20
VERSIONED_PACKAGES = ("torch", "nemo-toolkit", "megatron-core", "nvidia-modelopt", "transformers", "numpy")


def manifest_beside(file: str | os.PathLike) -> Path:
    """Where the manifest of a result lies that is a file and no archive."""
    return Path(f"{os.fspath(file)}.{MANIFEST}")


@dataclasses.dataclass(kw_only=True)
class Manifest:
    """How a stage's folder was made, and what was measured on the way.

    Attributes:
        stage: name of the stage (``data``, ``finetune``, ``prune``, ``distill``...).
        key: fingerprint of stage, inputs, config and seed; equal keys mean the same job.
        inputs: name -> {"path", "fingerprint"}.
        config: the resolved configuration.
        seed: seed of everything random.
        versions: package -> version.
        metrics: what was measured (losses in nats a token, counts).
        timings: name -> seconds.
        peak_memory_bytes: peak resident memory of the process (on CUDA: peak allocated on the device).
        details: anything else a later stage needs (paths relative to the folder).
        created: time of completion, UTC, ISO 8601.
    """

    stage: str
    key: str
    inputs: dict[str, dict[str, str]]
    config: dict[str, Any]
    seed: int
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    timings: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_memory_bytes: int = 0
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    created: str = ""

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Manifest":
        """Reads the manifest in a folder, in a `.nemo` archive or beside another file; raises MinitronError where none
        is."""
        path = Path(folder) / MANIFEST
        try:
            if Path(folder).is_file() and (beside := manifest_beside(folder)).is_file():
                return cls.parse(beside.read_bytes())
            if Path(folder).is_file():
                member = last_member(Path(folder), MANIFEST, MANIFEST_LIMIT)
                if member is None:
                    raise FileNotFoundError
                return cls.parse(member[0])
            return cls.parse(path.read_bytes())
        except FileNotFoundError:
            raise MinitronError(f"{path} is missing: {folder} is not the finished result of a stage") from None
        except (OSError, ValueError, TypeError) as error:
            raise MinitronError(f"{path} is not a manifest that this version reads: {error}") from None

    @classmethod
    def parse(cls, text: bytes) -> "Manifest":
        """The manifest that `text` holds; raises ValueError or TypeError where it is none."""
        try:
            manifest = cls(**json.loads(text.decode("utf-8")))
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        mappings = (manifest.inputs, manifest.config, manifest.versions, manifest.metrics, manifest.timings)
        for value in (*mappings, manifest.details):
            if not isinstance(value, dict):
                raise TypeError(f"{value!r:.80} where a mapping belongs")
        for value in manifest.inputs.values():
            if not isinstance(value, dict):
                raise TypeError(f"{value!r:.80} where an input's path and fingerprint belong")
        return manifest

    def write(self, folder: str | os.PathLike) -> None:
        write_json(Path(folder) / MANIFEST, dataclasses.asdict(self))

    def text(self) -> str:
        """The manifest as JSON."""
        return json_text(dataclasses.asdict(self))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON beside `path` and renames it there, so that a reader never sees half a file."""
    replace_file(Path(path), json_text(value))


def replace_file(path: Path, text: str) -> None:
    """Writes text beside `path` and renames it there; what UTF-8 cannot hold becomes `?`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(text.encode("utf-8", "replace"))
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def json_text(value: Any) -> str:
    """JSON as every file here has it."""
    return json.dumps(value, indent=2, sort_keys=False, default=plain) + "\n"


def plain(value: Any) -> Any:
    """A value that json does not know as one that it does."""
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON: {value!r}")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that do the work; nothing is imported."""
    python = sys.version.split()[0]
    return {"python": python} | {name: _version(name) for name in ("nemo-minitron", *VERSIONED_PACKAGES)}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
