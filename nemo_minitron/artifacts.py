"""What passes between stages: results with a manifest, importance scores, pruning plans."""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_minitron.archive import last_member
from nemo_minitron.errors import MinitronError

MANIFEST = "manifest.json"
PARTIAL_KEY = "partial.json"
MANIFEST_LIMIT = 16 << 20
SAMPLES, SAMPLE_BYTES = 16, 1 << 16
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
        """Reads the manifest in a folder, or in a `.nemo` archive; raises MinitronError where there is none."""
        path = Path(folder) / MANIFEST
        try:
            if Path(folder).is_file():
                found = last_member(Path(folder), MANIFEST, MANIFEST_LIMIT)
                if found is None:
                    raise FileNotFoundError
                return cls.parse(found[0])
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
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json_text(value), encoding="utf-8")
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


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 over the content of a file, or over names and contents of a folder's files.

    What differs between equal runs is left out: logs in a folder, the manifest at the end of an archive.
    """
    path = Path(path)
    if path.is_file():
        end = _manifest_start(path)
        return _hash_file(path) if end is None else _hash_start(path, end)
    digest = hashlib.sha256()
    for file in sorted(_content_files(path)):
        digest.update(f"{file.relative_to(path).as_posix()}\0{_hash_file(file)}\n".encode())
    return digest.hexdigest()


def sampled_fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 over names, sizes and some blocks of every file that `fingerprint` reads, the first and the last block
    included: tells checkpoints apart at no cost, and is no proof of content. The manifest at the end of an archive is
    left out, as there."""
    path, digest = Path(path), hashlib.sha256()
    end = _manifest_start(path) if path.is_file() else None
    for file in [path] if path.is_file() else sorted(_content_files(path)):
        size = file.stat().st_size if end is None else end
        digest.update(f"{file.relative_to(path) if file != path else ''}\0{size}\0".encode())
        with file.open("rb") as opened:
            for number in range(SAMPLES):
                opened.seek(max(size - SAMPLE_BYTES, 0) * number // (SAMPLES - 1))
                digest.update(opened.read(min(SAMPLE_BYTES, size)))
    return f"sampled-{digest.hexdigest()}"


def _manifest_start(path: Path) -> int | None:
    """Where the content of an archive of ours ends and its manifest starts; None for any other file."""
    found = last_member(path, MANIFEST, MANIFEST_LIMIT) if path.suffix == ".nemo" else None
    if found is None:
        return None
    try:
        Manifest.parse(found[0])
    except (ValueError, TypeError):
        return None
    return found[1]


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


def _sha256(file: Any, length: int | None = None) -> str:
    digest, left = hashlib.sha256(), length
    while block := file.read(1 << 20 if left is None else min(1 << 20, left)):
        digest.update(block)
        left = None if left is None else left - len(block)
    return digest.hexdigest()


def _hash_start(path: Path, length: int) -> str:
    with path.open("rb") as file:
        return _sha256(file, length)


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
