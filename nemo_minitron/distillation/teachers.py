"""The teachers that a run names: those that run, and those whose answers are kept; checked before any long work."""

from typing import TYPE_CHECKING

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.config import LIVE, DistillConfig
from nemo_minitron.distillation.losses.targets import SPARSE_KINDS
from nemo_minitron.distillation.teach.folder import Kept, Together
from nemo_minitron.distillation.teach.header import tokenizer_fingerprint
from nemo_minitron.distillation.teach.listing import Listing
from nemo_minitron.distillation.teach.reading import what_is_read
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.training.inputs import Inputs

if TYPE_CHECKING:
    import numpy as np


def check_pair(teacher: Architecture, student: Architecture) -> None:
    """Raises ConfigError where the logits of teacher and student cannot be compared."""
    if teacher.vocab_size != student.vocab_size:
        raise ConfigError(
            f"teacher and student have different vocabularies: {teacher.vocab_size} and {student.vocab_size} rows; "
            "the distillation loss compares their logits, so the student must come from this teacher",
            "distill",
        )


def open_answers(
    config: DistillConfig, student: Checkpoint, inputs: Inputs, teacher: Checkpoint | None
) -> dict[str, Kept]:
    """Folder -> the answers in it, of every folder that the configuration names.

    Args:
        teacher: model.kd_teacher_restore_from_path, where it is given.

    Raises:
        ConfigError, DataError: a folder is not whole, or of another teacher, tokenizer, vocabulary or length.
    """
    answers = {folder: Kept(folder) for folder in config.kd.folders}
    tokenizer = tokenizer_fingerprint(inputs.tokenizer) if answers else ""
    for folder, kept in answers.items():
        header = kept.header
        if header.vocab_size != student.architecture.vocab_size:
            raise ConfigError(
                f"{folder} has the answers of a teacher with {header.vocab_size} rows of vocabulary, and the student "
                f"has {student.architecture.vocab_size}: the student must come from this teacher",
                "distill",
            )
        if header.tokenizer != tokenizer:
            raise DataError(
                f"{folder} has answers to the tokens of another tokenizer than {inputs.tokenizer}; teach again with it"
            )
        if not inputs.has_rows and header.text and header.seq_length != inputs.seq_length:
            raise DataError(
                f"{folder} has answers to windows of {header.seq_length} tokens, and this run reads "
                f"{inputs.seq_length}: give model.data.seq_length={header.seq_length}, or teach again"
            )
        if header.keep != "hidden" and (config.kd.loss not in SPARSE_KINDS or config.kd.temperature != 1):
            raise ConfigError(
                f"{folder} keeps entries of distributions (teach.keep={header.keep}), which give "
                f"{' and '.join(SPARSE_KINDS)} at temperature 1 alone, not kd.loss={config.kd.loss} at "
                f"kd.temperature={config.kd.temperature}",
                "distill",
            )
    theirs = {kept.header.teacher for kept in answers.values()}
    if answers and teacher is not None and LIVE not in config.kd.shares and teacher.content not in theirs:
        raise ConfigError(
            f"{', '.join(answers)}: the answers are not those of {teacher.path}, "
            "model.kd_teacher_restore_from_path; name their teacher, or none",
            "distill",
        )
    return answers


def missing_answers(config: DistillConfig, inputs: Inputs, answers: dict[str, Kept]) -> Listing | None:
    """What the run reads and no answer is kept of, to be filled (kd.fill); None: nothing.

    Raises:
        DataError: some are missing, and are not to be filled.
    """
    import numpy

    listing = what_is_read(config, inputs, config.trainer.max_steps * config.model.global_batch_size)
    for folder, kept in answers.items():
        missing: np.ndarray = numpy.flatnonzero(~Together([kept]).found(listing.keys))
        if len(missing) and config.kd.fill:
            return listing.only(missing)
        if len(missing):
            raise DataError(
                f"{folder} lacks the answers to {len(missing)} of the {len(listing)} samples that this run reads; the "
                f"first is {listing.shown(int(missing[0]))}. Teach more of the same data (teach.tokens, "
                "trainer.limit_val_batches, the same seed), or have the teacher fill it: kd.fill=true "
                "model.kd_teacher_restore_from_path=PATH"
            )
    return None
