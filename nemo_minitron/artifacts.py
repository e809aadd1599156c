"""What passes between stages: a folder with a manifest.

A stage reads folders and writes one. While it works it writes to a folder beside the target
(``.<name>.partial``); when it is done it writes ``manifest.json`` there and renames the folder. A folder that has a
``manifest.json`` is therefore finished, and a stage that died leaves nothing that looks so. The partial folder is kept
for a resume of the very same job (same key) and thrown away otherwise.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_minitron.errors import MinitronError, OutputExistsError

MANIFEST = "manifest.json"
PARTIAL_KEY = "partial.json"
#: Files of a stage folder that differ between equal runs (times, logs) and so stay out of its fingerprint.
VOLATILE = (MANIFEST, PARTIAL_KEY, "logs", "tensorboard", "checkpoints")
VERSIONED_PACKAGES = ("torch", "nemo-toolkit", "megatron-core", "nvidia-modelopt", "transformers", "numpy")


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
        """Reads ``folder/manifest.json``; raises MinitronError where it is missing or not a manifest."""
        path = Path(folder) / MANIFEST
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
            return cls(**loaded)
        except FileNotFoundError:
            raise MinitronError(f"{path} is missing: {folder} is not the finished folder of a stage") from None
        except (OSError, ValueError, TypeError) as error:
            raise MinitronError(f"{path} is not a manifest that this version reads: {error}") from None

    def write(self, folder: str | os.PathLike) -> None:
        write_json(Path(folder) / MANIFEST, dataclasses.asdict(self))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON beside `path` and renames it there, so that a reader never sees half a file."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=2, sort_keys=False, default=_plain) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON: {value!r}")


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 over the content of a file, or over names and contents of a folder's files, logs left out."""
    path = Path(path)
    if path.is_file():
        return _hash_file(path)
    digest = hashlib.sha256()
    for file in sorted(_content_files(path)):
        digest.update(f"{file.relative_to(path).as_posix()}\0{_hash_file(file)}\n".encode())
    return digest.hexdigest()


def _content_files(folder: Path) -> Iterable[Path]:
    """Files that make up a folder's content.

    Hidden ones are left out: the .metadata of a distributed checkpoint carries an id drawn anew for each save, and what
    it describes is in the files beside it.
    """
    for root, folders, files in os.walk(folder):
        volatile = VOLATILE if Path(root) == folder else ()
        folders[:] = [name for name in folders if name not in volatile and not name.startswith(".")]
        yield from (Path(root) / name for name in files if name not in volatile and not name.startswith("."))


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that do the work; nothing is imported."""
    found = {"python": sys.version.split()[0]}
    return found | {name: _version(name) for name in ("nemo-minitron", *VERSIONED_PACKAGES)}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def reset_peak_memory() -> None:
    """Starts a new peak, where the kernel can (Linux) and on CUDA; elsewhere the peak is the whole process's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Peak resident memory since the last reset; on a machine with CUDA in use, peak memory allocated there."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclasses.dataclass(kw_only=True)
class Job:
    """One run of one stage: what goes in, and where the result shall lie.

    Args:
        stage: name of the stage.
        output: folder to make.
        config: resolved configuration; must be JSON-like.
        inputs: name -> path of each folder or file that is read.
        seed: seed of everything random.
        overwrite: replace an output that was made from something else.
        ignore: dotted config keys that do not change the result (paths, progress, launch settings), with all below.
    """

    stage: str
    output: Path
    config: dict[str, Any]
    inputs: dict[str, str | os.PathLike] = dataclasses.field(default_factory=dict)
    seed: int = 0
    overwrite: bool = False
    ignore: tuple[str, ...] = ("overwrite",)

    def __post_init__(self):
        self.output = Path(self.output)
        self._inputs: dict[str, dict[str, str]] | None = None
        self._started = time.perf_counter()

    @property
    def partial(self) -> Path:
        """Folder beside the output that the stage writes to; the same for every rank and every try."""
        return self.output.with_name(f".{self.output.name}.partial")

    def fingerprints(self) -> dict[str, dict[str, str]]:
        if self._inputs is None:
            self._inputs = {
                name: {"path": str(path), "fingerprint": fingerprint(path)} for name, path in self.inputs.items()
            }
        return self._inputs

    def key(self) -> str:
        relevant = self._settings(self.config)
        inputs = {name: entry["fingerprint"] for name, entry in self.fingerprints().items()}
        text = json.dumps([self.stage, inputs, relevant, self.seed], sort_keys=True, default=_plain)
        return hashlib.sha256(text.encode()).hexdigest()

    def finished(self) -> Manifest | None:
        """The manifest of an earlier run of this very job, or None when there is work to do.

        Raises:
            OutputExistsError: the output exists, was made from something else, and overwrite is not set.
        """
        if not os.path.lexists(self.output):
            return None
        if self.output.is_dir() and (self.output / MANIFEST).is_file():
            manifest = Manifest.read(self.output)
            if manifest.key == self.key():
                return manifest
            reason = self._difference(manifest)
        else:
            reason = "it is not the output of an earlier run of this job"
        if self.overwrite or (self.output.is_dir() and not any(self.output.iterdir())):
            return None
        raise OutputExistsError(
            f"{self.output} exists and would be overwritten: {reason}. "
            "Give another output path, or overwrite=true to replace it"
        )

    def _difference(self, manifest: Manifest) -> str:
        if manifest.stage != self.stage:
            return f"it was made by `{manifest.stage}`, not by `{self.stage}`"
        for name, entry in self.fingerprints().items():
            if manifest.inputs.get(name, {}).get("fingerprint") != entry["fingerprint"]:
                return f"it was made from another {name} than {entry['path']}"
        now, then = self._settings(self.config), self._settings(manifest.config)
        changed = sorted(name for name in {*now, *then} if _differs(now.get(name), then.get(name)))
        return f"it was made with other settings ({', '.join(changed) or 'seed'})"

    def _settings(self, config: dict[str, Any]) -> dict[str, Any]:
        """Dotted name -> value of every setting that changes the result."""
        return {
            name: value
            for name, value in _flat(config).items()
            if not any(name == ignored or name.startswith(f"{ignored}.") for ignored in self.ignore)
        }

    def begin(self) -> Path:
        """Makes the partial folder, or finds the one that an interrupted run of this very job left."""
        marker = self.partial / PARTIAL_KEY
        if self.partial.exists():
            try:
                left_by = json.loads(marker.read_text(encoding="utf-8"))["key"]
            except (OSError, ValueError, KeyError, TypeError):
                left_by = None
            if left_by != self.key():
                shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        reset_peak_memory()
        write_json(marker, {"stage": self.stage, "key": self.key()})
        return self.partial

    def discard(self) -> None:
        """Throws away the partial folder: for stages that cannot be resumed."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def finish(
        self,
        *,
        metrics: dict[str, Any] | None = None,
        timings: dict[str, float] | None = None,
        details: dict[str, Any] | None = None,
    ) -> Manifest:
        """Writes the manifest and puts the partial folder in the output's place."""
        manifest = Manifest(
            stage=self.stage,
            key=self.key(),
            inputs=self.fingerprints(),
            config=self.config,
            seed=self.seed,
            versions=versions(),
            metrics=metrics or {},
            timings={**(timings or {}), "total_seconds": time.perf_counter() - self._started},
            peak_memory_bytes=peak_memory_bytes(),
            details=details or {},
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        (self.partial / PARTIAL_KEY).unlink(missing_ok=True)
        manifest.write(self.partial)
        replaced = None
        if os.path.lexists(self.output):
            replaced = self.output.with_name(f".{self.output.name}.replaced-{os.getpid()}")
            os.replace(self.output, replaced)
        os.replace(self.partial, self.output)
        if replaced is not None:
            shutil.rmtree(replaced) if replaced.is_dir() and not replaced.is_symlink() else replaced.unlink()
        return manifest

    def run(self, work: Callable[[Path], dict[str, Any]], *, resumable: bool = False) -> Manifest:
        """Runs `work(partial folder) -> {"metrics", "timings", "details"}` unless its result is there already."""
        done = self.finished()
        if done is not None:
            return done
        if not resumable:
            self.discard()
        partial = self.begin()
        try:
            result = work(partial)
        except BaseException:
            if not resumable:
                self.discard()
            raise
        return self.finish(**result)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def _differs(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True, default=_plain) != json.dumps(other, sort_keys=True, default=_plain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportanceScores:
    """What one calibration pass over a teacher found; float32 unless said.

    All are sums over calibration samples of squared means over the sequence, so that L2 over samples is their square
    root (arXiv 2407.14679, section 2.2: L2 over the batch, mean over the sequence).

    Attributes:
        hidden: sums for each channel of each norm's output, two norms a layer in forward order [2l, h].
        ffn: sums for each FFN neuron [l, f].
        heads: sums for each channel of the attention output before its projection [l, n*d].
        block_influence: sum over batches of 1 - cos(layer's input, its output), float64 [l].
    """

    hidden: Any
    ffn: Any
    heads: Any
    block_influence: Any

    FILE = "scores.safetensors"

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name).contiguous() for name in self.names()}
        save_file(tensors, str(Path(folder) / self.FILE))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return ("hidden", "ffn", "heads", "block_influence")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ImportanceScores":
        """Reads the scores in `folder`; raises MinitronError where they are missing, damaged or not finite."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder) / cls.FILE
        try:
            tensors = load_file(str(path))
            scores = cls(**{name: tensors[name] for name in cls.names()})
        except (OSError, SafetensorError, KeyError) as error:
            raise MinitronError(
                f"{path} holds no importance scores ({error}); remove {folder} to score again"
            ) from None
        for name in cls.names():
            if not getattr(scores, name).isfinite().all():
                raise MinitronError(f"{path}: {name} holds values that are not finite; remove {folder} to score again")
        return scores

    def layers_by_importance(self) -> list[int]:
        """Layers, 1-based, the most important first."""
        order = sorted(range(len(self.block_influence)), key=lambda layer: -float(self.block_influence[layer]))
        return [layer + 1 for layer in order]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """What to cut, worked out before anything is cut.

    Attributes:
        teacher: the architecture before (a dict of Architecture).
        student: the architecture after.
        drop_layers: layers to drop, 1-based, ascending.
        width: width targets by ModelOpt's names; empty for depth alone.
    """

    teacher: dict[str, Any]
    student: dict[str, Any]
    drop_layers: list[int]
    width: dict[str, int]
