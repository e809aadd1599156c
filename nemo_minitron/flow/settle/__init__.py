"""What a flow's configuration leaves open (null, or a share) becomes a number, each with its reason.

Shares become the nearest shape on the pruning grid. Ranks, layout, sequence length and micro batch are what fits the
machine's memory by the plan's arithmetic. Steps and samples are what there is time for: `minutes`, of which TRAINING go
to the trainings, TESTING to the evaluations and SCORING to calibration, at the rate of planning.machine.

What was chosen for a run is kept in its folder, so that the same command goes on with it when the machine has more or
less to spare than before; what is given wins.
"""

import copy
import dataclasses
from pathlib import Path

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import write_json
from nemo_minitron.errors import ConfigError, DataError, MinitronError
from nemo_minitron.flow.models import check_students, check_teacher, searches, teacher_architecture, without_sizes
from nemo_minitron.flow.searching import known_sizes
from nemo_minitron.flow.settle.fit import settle_devices, settle_layout
from nemo_minitron.flow.settle.state import CHOSEN, OPEN, Choice, State
from nemo_minitron.flow.settle.students import settle_students
from nemo_minitron.flow.settle.time import settle_calibration, settle_recipes, settle_tests
from nemo_minitron.flow.steps import steps
from nemo_minitron.flow.work import text_bytes
from nemo_minitron.planning.machine import Machine
from nemo_minitron.planning.pace import Pace, Work

__all__ = ["CHOSEN", "OPEN", "Choice", "Settled", "settle", "with_found"]


@dataclasses.dataclass(frozen=True)
class Settled:
    """A flow's configuration with nothing left open.

    Attributes:
        teacher: its sizes.
        choices: what was chosen, in order.
        pace: how fast it is assumed to go.
        work: step -> its work.
    """

    config: c.FlowConfig
    teacher: Architecture
    choices: list[Choice]
    pace: Pace
    work: dict[str, Work]

    def keep(self) -> None:
        """Writes what was chosen to the run's folder.

        Raises:
            MinitronError: it cannot be written.
        """
        kept = {choice.setting: choice.value for choice in self.choices if choice.setting in OPEN}
        if not kept:
            return
        place = Path(self.config.output_dir) / CHOSEN
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, kept)
        except OSError as error:
            raise MinitronError(f"{place} cannot be written: {error.strerror}; give another output_dir") from None


def settle(config: c.FlowConfig, machine: Machine | None = None) -> Settled:
    """The configuration with what it leaves open chosen; one that leaves nothing open stays as it is.

    Args:
        machine: none: this one.

    Raises:
        ConfigError: shares, targets or batches that are wrong for this teacher and layout.
        CheckpointError, DataError: the teacher or the text that the choice depends on is not there.
        EngineError: nothing fits.
    """
    state = State(config, machine)
    if state.is_open():
        _check_inputs(config)
    state.teacher = teacher_architecture(config)
    settle_students(state)
    check_students(state.config, state.teacher)
    if state.is_open():
        settle_devices(state)
        settle_layout(state)
        settle_recipes(state)
        settle_tests(state)
        settle_calibration(state)
    _check_batches(state)
    work = work_of(state.config, state.teacher)
    return Settled(state.config, state.teacher, state.choices, Pace(*state.rate(), config.data.workers), work)


def with_found(settled: Settled) -> Settled:
    """The same with the sizes that searches which have ended found."""
    config = copy.deepcopy(settled.config)
    for name, targets in config.prune.students.items():
        if searches(config, name):
            config.prune.students[name] = without_sizes(targets) | known_sizes(config, settled.teacher, name)[0]
    return dataclasses.replace(settled, config=config, work=work_of(config, settled.teacher))


def work_of(config: c.FlowConfig, teacher: Architecture) -> dict[str, Work]:
    """Name of a step -> its work."""
    return {step.name: step.work(config, teacher) for step in steps(config)}


def _check_inputs(config: c.FlowConfig) -> None:
    check_teacher(config)
    if text_bytes(config.data) is None:
        named = f"source = {config.data.source}" if config.data.sources is None else f"sources = {config.data.sources}"
        raise DataError(f"data.{named} does not exist: name a file or a folder of text")


def _check_batches(state: State) -> None:
    """Raises one ConfigError with every recipe whose samples cannot be shared out."""
    run = state.run()
    micro, ranks = run.layout.micro_batch_size, run.data_parallel
    problems = [
        f"{name}.global_batch_size {getattr(state.config, name).global_batch_size} must be a multiple of "
        f"hardware.micro_batch_size {micro} x data parallel {ranks} = {micro * ranks}"
        for name in state.used()
        if ranks and getattr(state.config, name).global_batch_size % (micro * ranks)
    ]
    if problems:
        raise ConfigError(problems, "flow")
