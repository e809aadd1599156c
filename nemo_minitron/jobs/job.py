"""A run of a stage: what goes in, where the result lies, and nothing half-made in its place.

A stage reads folders or archives and writes one. While it works it writes to a folder beside the target
(``.<name>.partial``); when it is done it writes ``manifest.json`` there and renames the folder. A result that has a
manifest is therefore finished, and a stage that died leaves nothing that looks so. The partial folder is kept for a
resume of the very same job (same key) and thrown away otherwise. A lock beside the output keeps two processes from
making the same one.

An output called ``*.nemo`` is an archive: the stage leaves it in the partial folder under the output's name, the
manifest becomes its last member, and the run's logs go to ``<name>.nemo.logs`` beside it. An output called as another
format of files is such a file in the same way; its manifest lies beside it, ``<name>.manifest.json``, with the file's
fingerprint, so that it stands for no other file.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import (
    MANIFEST,
    PARTIAL_KEY,
    Manifest,
    fingerprint,
    manifest_beside,
    plain,
    sampled_fingerprint,
    versions,
    write_json,
)
from nemo_minitron.artifacts.archive import append_member
from nemo_minitron.config import OUTPUT_FORMATS
from nemo_minitron.errors import MinitronError, OutputExistsError
from nemo_minitron.jobs import lock as locks
from nemo_minitron.jobs.memory import peak_memory_bytes, reset_peak_memory

ARCHIVE = ".nemo"
#: How the names of outputs end that are one file.
FILES = tuple(entry.suffix for entry in OUTPUT_FORMATS.values() if entry.suffix)
#: In the details of a manifest that lies beside its file.
CONTENT = "content"
RECORDS = ("logs", "tensorboard")
#: Libraries that meet a full disk raise errors of their own; less than this is full.
FULL_BYTES = 1 << 20


@contextlib.contextmanager
def disk_has_room(output: Path) -> Iterator[None]:
    """Turns what a full disk makes of the body into one MinitronError."""
    try:
        yield
    except MinitronError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in locks.FULL
        if not full and shutil.disk_usage(output.absolute().parent).free >= FULL_BYTES:
            raise
        raise MinitronError(
            f"no space left on the disk of {output} while writing it: free some, or give another output"
        ) from error


@dataclasses.dataclass(kw_only=True)
class Job:
    """One run of one stage: what goes in, and where the result shall lie.

    Args:
        stage: name of the stage.
        output: folder to make, or file (`.nemo`, `.gguf`).
        config: resolved configuration; must be JSON-like.
        inputs: name -> path of each folder or file that is read.
        seed: seed of everything random.
        overwrite: replace an output that was made from something else.
        ignore: dotted config keys that do not change the result (paths, progress, launch settings), with all below.
        sampled: inputs that are told apart by a sample of their bytes, where hashing all would cost more than the work.
    """

    stage: str
    output: Path
    config: dict[str, Any]
    inputs: dict[str, str | os.PathLike] = dataclasses.field(default_factory=dict)
    seed: int = 0
    overwrite: bool = False
    ignore: tuple[str, ...] = ("overwrite",)
    sampled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.output = Path(self.output)
        self._inputs: dict[str, dict[str, str]] | None = None
        self._lock: locks.Lock | None = None
        self._started = time.perf_counter()

    @property
    def partial(self) -> Path:
        """Folder beside the output that the stage writes to; the same for every rank and every try."""
        return self.output.with_name(f".{self.output.name}.partial")

    def fingerprints(self) -> dict[str, dict[str, str]]:
        if self._inputs is None:
            self._inputs = {
                name: {
                    "path": str(path),
                    "fingerprint": sampled_fingerprint(path) if name in self.sampled else fingerprint(path),
                }
                for name, path in self.inputs.items()
            }
        return self._inputs

    def key(self) -> str:
        relevant = self._settings(self.config)
        inputs = {name: entry["fingerprint"] for name, entry in self.fingerprints().items()}
        text = json.dumps([self.stage, inputs, relevant, self.seed], sort_keys=True, default=plain)
        return hashlib.sha256(text.encode()).hexdigest()

    def finished(self) -> Manifest | None:
        """The manifest of an earlier run of this very job, or None when there is work to do.

        Raises:
            OutputExistsError: the output exists, was made from something else, and overwrite is not set.
        """
        if not os.path.lexists(self.output):
            return None
        manifest = self._manifest()
        if manifest is None:
            reason = "it is not the output of an earlier run of this job"
        elif manifest.key == self.key():
            return manifest
        else:
            reason = self._difference(manifest)
        if self.overwrite or (self.output.is_dir() and not any(self.output.iterdir())):
            return None
        raise OutputExistsError(
            f"{self.output} exists and would be overwritten: {reason}. "
            "Give another output path, or overwrite=true to replace it"
        )

    def _manifest(self) -> Manifest | None:
        """The manifest of what is there now; None where there is none."""
        if self.output.is_file():
            with contextlib.suppress(MinitronError):
                manifest = Manifest.read(self.output)
                stated = manifest.details.get(CONTENT)
                return manifest if stated in (None, sampled_fingerprint(self.output)) else None
            return None
        return Manifest.read(self.output) if (self.output / MANIFEST).is_file() else None

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

    def begin(self, *, resumable: bool = True) -> Path:
        """Takes the lock and makes the partial folder, or finds the one that a stopped run of this very job left.

        Args:
            resumable: keep what such a run left.

        Raises:
            EngineError: another process is making the same output.
        """
        if self._lock is None:
            self._lock = locks.take(self.output)
        marker = self.partial / PARTIAL_KEY
        if self.partial.exists():
            try:
                left_by = json.loads(marker.read_text(encoding="utf-8"))["key"]
            except (OSError, ValueError, KeyError, TypeError):
                left_by = None
            if left_by != self.key() or not resumable:
                shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        reset_peak_memory()
        write_json(marker, {"stage": self.stage, "key": self.key(), "config": self.config})
        return self.partial

    def discard(self) -> None:
        """Throws away the partial folder: for stages that cannot be resumed."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def release(self) -> None:
        """Lets others make the output."""
        if self._lock is not None:
            locks.release(self._lock)
            self._lock = None

    def finish(
        self,
        *,
        metrics: dict[str, Any] | None = None,
        timings: dict[str, float] | None = None,
        details: dict[str, Any] | None = None,
    ) -> Manifest:
        """Writes the manifest, puts the partial folder (or the archive in it) in the output's place, frees the lock."""
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
        file = self.partial / self.output.name
        if self.output.suffix in FILES and file.is_file():
            self._replace_file(file, manifest)
            self._keep_records()
        else:
            manifest.write(self.partial)
            self._replace(self.partial)
        self.release()
        return manifest

    def _replace_file(self, made: Path, manifest: Manifest) -> None:
        """Puts a file in the output's place, its manifest in it or beside it."""
        if self.output.suffix == ARCHIVE:
            append_member(made, MANIFEST, manifest.text().encode())
            self._replace(made)
            return
        manifest.details = {**manifest.details, CONTENT: sampled_fingerprint(made)}
        self._replace(made)
        manifest_beside(self.output).write_text(manifest.text(), encoding="utf-8")

    def _replace(self, made: Path) -> None:
        """Puts `made` in the output's place; what was there is removed once it is."""
        replaced = None
        if os.path.lexists(self.output):
            replaced = self.output.with_name(f".{self.output.name}.replaced-{os.getpid()}")
            os.replace(self.output, replaced)
        os.replace(made, self.output)
        if replaced is not None:
            shutil.rmtree(replaced) if replaced.is_dir() and not replaced.is_symlink() else replaced.unlink()

    def _keep_records(self) -> None:
        """Logs of a run that made a file go to a folder beside it."""
        beside = self.output.with_name(f"{self.output.name}.logs")
        for name in RECORDS:
            if (self.partial / name).is_dir():
                shutil.rmtree(beside / name, ignore_errors=True)
                beside.mkdir(exist_ok=True)
                os.replace(self.partial / name, beside / name)
        shutil.rmtree(self.partial)

    def run(self, work: Callable[[Path], dict[str, Any]], *, resumable: bool = False) -> Manifest:
        """Runs `work(partial folder) -> {"metrics", "timings", "details"}` unless its result is there already.

        Raises:
            EngineError: another process is making the same output.
            MinitronError: the disk is full; nothing half-made is left.
        """
        done = self.finished()
        if done is not None:
            return done
        self._lock = locks.take(self.output)
        try:
            done = self.finished()  # another process may have ended between the two
            if done is not None:
                return done
            with disk_has_room(self.output):
                return self.finish(**work(self.begin(resumable=resumable)))
        except BaseException:
            if not resumable:
                self.discard()
            raise
        finally:
            self.release()


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def _differs(one: object, other: object) -> bool:
    return json.dumps(one, sort_keys=True, default=plain) != json.dumps(other, sort_keys=True, default=plain)
