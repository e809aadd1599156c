"""A stage that trains or runs a model, as a job on as many ranks as its configuration asks for."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from nemo_minitron.artifacts import Manifest
from nemo_minitron.config import StageConfig
from nemo_minitron.jobs.job import Job
from nemo_minitron.launch.ranks import Work, run_stage

#: Settings that say where things are and how fast, not what comes out; what lies there is in the inputs' fingerprints.
NOT_THE_RESULT = (
    "overwrite",
    "exp_manager",
    "trainer.log_every_n_steps",
    "model.restore_from_path",
    "model.kd_teacher_restore_from_path",
    "kd.teacher",
    "model.nemo_path",
    "model.tokenizer",
    "model.data.data_prefix",
    "model.data.instructions",
    "model.data.index_mapping_dir",
    "model.data.num_workers",
)
C = TypeVar("C", bound=StageConfig)


def run_training_stage(
    name: str,
    function: Callable[[C], Manifest],
    config: C,
    inputs: Mapping[str, str | os.PathLike[str]],
    work: Work,
    *,
    resumable: bool = True,
    sampled: Sequence[str] = (),
) -> Manifest:
    """Runs `work` into the partial folder of `config.output` on every rank, unless the result is there already.

    Args:
        name: of the stage, in the manifest.
        function: the stage itself, which each further rank calls with `config`.
        inputs: name -> path of each folder or file that is read.
        resumable: whether what is left of a run that died is kept for the next try.
        sampled: inputs that are told apart by a sample of their bytes.
    """
    job = Job(
        stage=name,
        output=Path(config.output),
        config=dataclasses.asdict(config),
        inputs=dict(inputs),
        seed=config.seed,
        overwrite=config.overwrite,
        ignore=NOT_THE_RESULT,
        sampled=tuple(sampled),
    )
    entry = f"{function.__module__}:{function.__qualname__}"
    return run_stage(job, work, stage=entry, config=config, trainer=config.trainer, resumable=resumable)
