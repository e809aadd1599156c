"""`minitron search`: shapes within a budget, their cuts measured, the best distilled in rounds, the winner kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest, write_json
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.data.module import check_fits as check_data
from nemo_minitron.data.module import resolve_prefixes
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs.job import Job
from nemo_minitron.launch.ranks import rank, run_stage, wait_for_others
from nemo_minitron.packages.versions import check_training
from nemo_minitron.report.command import draw
from nemo_minitron.search.distilling import distilled, keep, places_of
from nemo_minitron.search.finals import measured_finals
from nemo_minitron.search.measuring import check_given_scores, measured_cuts
from nemo_minitron.search.result import RESULT, render, told
from nemo_minitron.search.space import name_of
from nemo_minitron.search.task import resolved
from nemo_minitron.training.inputs import data_files, stated_path
from nemo_minitron.training.stage import NOT_THE_RESULT

SPEEDS = "speeds.json"


def search(config: c.SearchConfig) -> Manifest | None:
    """Makes `config.output`: the best student of the budget, search.json, the finalists; prints the table.

    Raises:
        ConfigError: no shape meets the budgets, or they are none for this teacher.
        CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: the output was made from something else.
    """
    if config.dry_run:
        print(resolved(config).describe())
        return None
    check_training("minitron search")
    teacher = stated_path(config.model.restore_from_path, "model.restore_from_path")
    opened = open_checkpoint(teacher, "teacher")
    sizes = opened.architecture
    if not config.search.speeds:
        resolved(config)  # what cannot be is said before any work
    prefixes = resolve_prefixes(config.model.data.data_prefix)
    if "validation" not in prefixes:
        raise ConfigError("model.data.data_prefix has no validation split, by which candidates are ranked")
    length = config.model.data.seq_length or config.model.encoder_seq_length or sizes.seq_length
    check_data(prefixes, seq_length=length, vocab_size=sizes.vocab_size)
    check_given_scores(config, opened)
    job = Job(
        stage="search",
        output=Path(config.output),
        config=dataclasses.asdict(config),
        inputs={"teacher": teacher, **data_files(prefixes)},
        seed=config.seed,
        overwrite=config.overwrite,
        ignore=("output", "dry_run", "prune.scores_path", *NOT_THE_RESULT),
        sampled=("teacher",),
    )
    manifest = run_stage(
        job,
        lambda partial: find(partial, config, prefixes, length),
        stage=f"{search.__module__}:{search.__qualname__}",
        config=config,
        trainer=config.trainer,
        resumable=True,
    )
    if rank() == 0:
        print(render(json.loads((Path(config.output) / RESULT).read_text(encoding="utf-8"))))
        draw(Path(config.output))
    return manifest


def find(partial: Path, config: c.SearchConfig, prefixes: dict[str, list], length: int) -> dict[str, Any]:
    """The job's work: measures cuts, distils candidates in rounds, keeps the best; goes on where it was stopped.

    Every rank calls it.
    """
    if (partial / RESULT).is_file():
        result = json.loads((partial / RESULT).read_text(encoding="utf-8"))
    else:
        task = resolved(config, partial / SPEEDS)
        if rank() == 0:
            print(task.describe())
        cuts, measured = measured_cuts(partial, task, prefixes, length)
        best = sorted(measured.shapes, key=lambda shape: (measured.losses[name_of(shape)], name_of(shape)))
        history = distilled(partial, task, cuts, best[: task.rounds[0].candidates])
        finals = measured_finals(partial, task, places_of(partial, history), prefixes, length)
        result = told(task, measured, history, finals)
        if rank() == 0:
            write_json(partial / RESULT, result)
    wait_for_others(partial)
    if rank() == 0:
        keep(partial, result["rounds"][-1])
    return {
        "metrics": {
            "winner": result["winner"]["name"],
            "winner_loss": result["winner"]["loss"],
            "shapes": result["space"]["within"],
            "measured": sum(entry["loss"] is not None for entry in result["shapes"]),
        },
        "timings": result["seconds"],
        "details": {"architecture": result["winner"]["architecture"]},
    }
