"""The teacher's answers to all that the rounds of a search read, kept once: a candidate then costs no teacher."""

import itertools
from pathlib import Path

from nemo_minitron import config as c
from nemo_minitron.artifacts import write_json
from nemo_minitron.data.sample_sets import Passes
from nemo_minitron.distillation.teach.command import answer
from nemo_minitron.distillation.teach.listing import list_pieces
from nemo_minitron.search.rounds import Round, round_seed
from nemo_minitron.search.task import Task
from nemo_minitron.training.inputs import training_inputs

ANSWERS, DONE = "answers", "answered.json"


def keeps(config: c.SearchConfig) -> bool:
    """Whether the rounds' losses can be had of kept answers."""
    kd = config.kd
    return bool(kd.kd_weight) and not kd.hidden.weight and kd.top_k is None


def answered(partial: Path, task: Task) -> Path:
    """The folder with the teacher's answers, made as far as it is not there."""
    folder = partial / ANSWERS
    if (folder / DONE).is_file():
        return folder
    folder.mkdir(exist_ok=True)
    config = teach_config(task)
    inputs = training_inputs(config, task.teacher.architecture, task.teacher.tokenizer)
    sets = inputs.sets()
    assert sets is not None, "a search reads fixed windows"
    batch, limit = config.model.global_batch_size, config.trainer.limit_val_batches
    read = itertools.chain.from_iterable(
        read_by(one, len(sets["train"]), batch, task.config.seed) for one in task.rounds
    )
    validation = range(min(len(sets["validation"]), limit * batch))
    listing = list_pieces(sets, {"train": read, "validation": validation})
    _, speed = answer(folder, config, config.teach, task.teacher, inputs, listing, "the teacher answers")
    write_json(folder / DONE, {"samples": len(listing), "tokens_per_second": speed})
    return folder


def read_by(one: Round, count: int, batch: int, seed: int) -> list[int]:
    """The samples of so many that the distillations of a round read, each once."""
    order = Passes(count, round_seed(one, seed))
    return [order[number] for number in range(min(count, one.steps * batch))]


def teach_config(task: Task) -> c.TeachConfig:
    """How the teacher answers: its last hidden states, in the precision that it runs in."""
    config = task.config
    precision = "fp32" if str(config.trainer.precision).startswith("32") else "bf16"
    return c.TeachConfig(
        seed=config.seed,
        trainer=config.trainer,
        model=config.model,
        teach=c.AnswersConfig(precision=precision),
        exp_manager=c.ExpManagerConfig(name=ANSWERS),
    )
