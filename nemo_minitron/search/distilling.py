"""The rounds themselves: candidates written, distilled one after the other, the better half of them again."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import place_in, write_checkpoint
from nemo_minitron.conversion.writing import check_room
from nemo_minitron.distillation.command import distill
from nemo_minitron.launch.ranks import first_makes
from nemo_minitron.search.measuring import Cuts
from nemo_minitron.search.rounds import Round, reached, round_config
from nemo_minitron.search.space import name_of
from nemo_minitron.search.task import Task
from nemo_minitron.search.teaching import ANSWERS, answered, keeps

CANDIDATES, ROUNDS, STUDENT, FINALISTS = "candidates", "rounds", "student", "finalists"
#: The format of checkpoints between rounds.
BETWEEN = "nemo2"


@dataclasses.dataclass(frozen=True)
class Standing:
    """How a round ended.

    Attributes:
        validation: name of a candidate -> its validation losses at the end, by their names, in nats a token.
        ranked_by: which one ranks.
        stay: names of those that go on, the best first.
        seconds: of all of it.
    """

    round: Round
    validation: dict[str, dict[str, float]]
    ranked_by: str
    stay: list[str]
    seconds: float

    @property
    def losses(self) -> dict[str, float]:
        """Name of a candidate -> the loss that ranks."""
        return {name: losses[self.ranked_by] for name, losses in self.validation.items()}


def distilled(partial: Path, task: Task, cuts: Cuts, candidates: list[Architecture]) -> list[Standing]:
    """Distils the candidates in the task's rounds; finished distillations are found, and not run again."""
    shapes = {name_of(shape): shape for shape in candidates}
    answers = answered(partial, task) if keeps(task.config) else None
    weights = {name: written(partial / CANDIDATES / name, shape, cuts) for name, shape in shapes.items()}
    history: list[Standing] = []
    for number, one in enumerate(task.rounds):
        folder = partial / ROUNDS / str(one.number)
        validation, seconds = {}, 0.0
        for name in weights:
            config = c.validated(round_config(task.config, one, weights[name], folder / name, answers))
            distill(config)
            manifest = Manifest.read(folder / name)
            validation[name] = reached(manifest)
            seconds += manifest.timings["total_seconds"]
        left = task.rounds[number + 1].candidates if number + 1 < len(task.rounds) else task.finalists
        metric = task.config.ranked_by
        stay = sorted(validation, key=lambda name: (validation[name][metric], name))[:left]
        history.append(Standing(one, validation, metric, stay, seconds))
        weights = {name: folder / name for name in stay}
    return history


def written(place: Path, shape: Architecture, cuts: Cuts) -> Path:
    """The cut of a shape as a checkpoint at `place`, made beside and renamed unless it is there."""
    first_makes(place, lambda: write_cut(place, shape, cuts))
    return place


def write_cut(place: Path, shape: Architecture, cuts: Cuts) -> None:
    """Makes the cut and writes it."""
    tensors = cuts.tensors(shape)
    check_room(place, sum(tensor.nbytes for tensor in tensors.values()))
    unfinished = place.with_name(f".{place.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    teacher, student = cuts.teacher, cuts.architecture(shape)
    write_checkpoint(
        place_in(unfinished, place, BETWEEN), BETWEEN, student, tensors, teacher.tokenizer_files, teacher.generation
    )
    unfinished.replace(place)


def places_of(partial: Path, history: list[Standing]) -> dict[str, Path]:
    """Name -> checkpoint of the finalists, the best first."""
    last = history[-1]
    return {name: partial / ROUNDS / str(last.round.number) / name for name in last.stay}


def keep(partial: Path, last: Mapping[str, Any]) -> None:
    """Puts the winner and the finalists of the last round (search.json) in their places; removes the other weights."""
    folder = partial / ROUNDS / str(last["number"])
    for number, name in enumerate(last["stay"]):
        place = partial / (STUDENT if number == 0 else f"{FINALISTS}/{name}")
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(place)
    for name in (CANDIDATES, ROUNDS, ANSWERS):
        shutil.rmtree(partial / name, ignore_errors=True)
