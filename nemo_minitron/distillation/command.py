"""Distillation of a pruned student, or its control: the same training without a teacher."""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.config import LIVE, AnswersConfig, DistillConfig
from nemo_minitron.distillation.attach import Distillation
from nemo_minitron.distillation.kept import KeptDistillation, KeptTargets
from nemo_minitron.distillation.layer_pairs import Pair, layer_pairs
from nemo_minitron.distillation.teach.command import answer
from nemo_minitron.distillation.teach.folder import Kept, Together
from nemo_minitron.distillation.teach.listing import Listing
from nemo_minitron.distillation.teachers import check_pair, missing_answers, open_answers
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.megatron.layout import check_fits
from nemo_minitron.packages.versions import check_training
from nemo_minitron.training.inputs import (
    CHECKPOINTS,
    LOG,
    Inputs,
    build_data,
    nemo_tokenizer,
    stated_path,
    training_inputs,
)
from nemo_minitron.training.stage import run_training_stage

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from nemo.collections.llm import GPTModel


#: In the partial folder: answers that a teacher gives before the training.
FILLED = "filled"


def distill(config: DistillConfig) -> Manifest:
    """Trains the student on the teacher's logits and writes it to `config.output`, in the format of its name or `to`.

    With kd.kd_weight=0 no teacher is loaded: the language-model loss alone, the control. Nor is one where its
    answers are kept (kd.teacher): they are read.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: the output was made from something else.
        NonFiniteLossError: a loss is not a number.
    """
    check_training("minitron distill")
    folders = {"student": stated_path(config.model.restore_from_path, "model.restore_from_path")}
    student, teacher = open_checkpoint(folders["student"], "student"), None
    path = config.model.kd_teacher_restore_from_path
    if LIVE in config.kd.shares or (config.kd.folders and path):
        folders["teacher"] = stated_path(path, "model.kd_teacher_restore_from_path")
        teacher = open_checkpoint(folders["teacher"], "teacher")
        check_pair(teacher.architecture, student.architecture)
    inputs = training_inputs(config, student.architecture, student.tokenizer)
    answers = open_answers(config, student, inputs, teacher)
    if LIVE not in config.kd.shares and not config.kd.fill:
        teacher = None
        folders.pop("teacher", None)
    pairs = pairs_of(config, teacher, student)
    if teacher is not None:
        check_fits(teacher.architecture, inputs.layout, "teacher")
    missing = missing_answers(config, inputs, answers) if answers else None
    kept = {f"answers{number}": folder for number, folder in enumerate(answers)}
    check_reference(config, teacher, answers)
    return run_training_stage(
        "distill",
        distill,
        config,
        folders | kept | inputs.files(),
        lambda partial: train_student(partial, config, student, teacher, inputs, pairs, answers, missing),
        sampled=[*kept],
    )


def check_reference(config: DistillConfig, teacher: Checkpoint | None, answers: Mapping[str, Kept]) -> None:
    """Raises ConfigError where shares are to follow losses, and none to reach are given or can be measured."""
    data = config.model.data
    if data.dynamic and data.reference is None and teacher is None and not answers:
        raise ConfigError(
            "model.data.dynamic: no teacher runs whose loss on each source could be measured; give "
            "model.data.reference={wiki:2.1,code:1.2}",
            "distill",
        )


def pairs_of(config: DistillConfig, teacher: Checkpoint | None, student: Checkpoint) -> list[Pair]:
    """Layers of student and teacher whose hidden states are compared; the student's manifest says what was dropped."""
    if teacher is None:
        return []
    dropped = None
    with contextlib.suppress(MinitronError):
        manifest = Manifest.read(student.path)
        dropped = manifest.metrics.get("dropped_layers") if manifest.stage == "prune" else None
    return layer_pairs(config.kd.hidden, teacher.architecture, student.architecture, dropped)


def train_student(
    partial: Path,
    config: DistillConfig,
    student: Checkpoint,
    teacher: Checkpoint | None,
    inputs: Inputs,
    pairs: list[Pair],
    answers: Mapping[str, Kept],
    missing: Listing | None,
) -> dict[str, Any]:
    """The job's work: attaches the teacher, trains, detaches it, saves the student; every rank calls it.

    Args:
        answers: that are kept, by folder.
        missing: samples that the teacher answers first.
    """
    from nemo_minitron.distillation.module import teacher_in_validation
    from nemo_minitron.megatron.session import engine
    from nemo_minitron.megatron.weights import bare, save_checkpoint
    from nemo_minitron.training.loop import train_and_validate

    together = {folder: [kept] for folder, kept in answers.items()}
    if missing is not None and teacher is not None:
        together[config.kd.folders[0]].append(fill(partial, config, teacher, inputs, answers, missing))
    with engine(config.seed, partial / LOG, cuda=inputs.layout.cuda):
        tokenizer = nemo_tokenizer(inputs.tokenizer)
        distillation = the_distillation(config, teacher, pairs, together)
        module = student_module(config, student, distillation, inputs, tokenizer)
        targets = None if distillation is None else distillation.kept
        data = build_data(config, inputs, tokenizer, partial, fields=targets.fields if targets else None)
        callbacks: list[pl.Callback] = [teacher_in_validation()] if isinstance(distillation, Distillation) else []
        if config.model.data.dynamic and config.model.data.reference is None:
            if isinstance(distillation, KeptDistillation):
                numbers = data.mixture.validation.numbers
                data.mixture.reference = distillation.kept.losses_by_source(data.validation, numbers)
            elif teacher is not None:
                callbacks.append(reference_of(config, teacher, inputs, data, partial))
        trained = train_and_validate(module, data, config, inputs.layout, partial, callbacks)
        save_checkpoint(
            bare(module) if distillation is None else distillation.detach(),
            student.architecture,
            partial,
            output=config.output,
            to=config.to,
            tokenizer=student.tokenizer_files or inputs.tokenizer,
            generation=student.generation,
        )
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
        shutil.rmtree(partial / FILLED, ignore_errors=True)
    return trained.result(config, student.architecture, inputs)


def the_distillation(
    config: DistillConfig, teacher: Checkpoint | None, pairs: list[Pair], answers: Mapping[str, list[Kept]]
) -> "Distillation | KeptDistillation | None":
    """The teachers and the losses: one that runs, kept answers, or both; None: the control.

    Args:
        answers: that are kept, by the name that kd.teachers gives them.
    """
    shares = config.kd.shares
    kept = KeptTargets([Together(each) for each in answers.values()], [shares[name] for name in answers])
    if LIVE in shares and teacher is not None:
        return Distillation(teacher, config.kd, pairs, kept if answers else None, shares[LIVE])
    return KeptDistillation(kept, config.kd) if answers else None


def fill(
    partial: Path,
    config: DistillConfig,
    teacher: Checkpoint,
    inputs: Inputs,
    answers: Mapping[str, Kept],
    missing: Listing,
) -> Kept:
    """Has the teacher answer what is missing, as the rest was answered, into a folder beside the run; every rank calls
    it."""
    header = answers[config.kd.folders[0]].header
    asked = AnswersConfig(keep=header.keep, precision=header.precision, draws=header.draws, top_k=header.top_k)
    folder = partial / FILLED
    folder.mkdir(exist_ok=True)
    what = f"{Path(config.output).name}, the teacher answers what {config.kd.folders[0]} lacks"
    answer(folder, config, asked, teacher, inputs, missing, what)
    return Kept(folder)


def reference_of(config: DistillConfig, teacher: Checkpoint, inputs: Inputs, data: Any, partial: Path) -> "pl.Callback":
    """The callback that measures the losses which dynamic shares of a blend follow."""
    from nemo_minitron.training.reference import TeacherReference

    batch = config.model.micro_batch_size
    return TeacherReference(teacher, inputs.layout, data.validation, data.mixture, batch=batch, partial=partial)


def student_module(
    config: DistillConfig,
    student: Checkpoint,
    distillation: Distillation | KeptDistillation | None,
    inputs: Inputs,
    tokenizer: Any,
) -> "GPTModel":
    """NeMo's module that trains the student: with a teacher, or on the language-model loss alone."""
    from nemo_minitron.distillation.module import distillation_module, kept_module
    from nemo_minitron.training.loop import optimizer
    from nemo_minitron.training.model import gpt_module, training_config

    optim = optimizer(config.model.optim, config.trainer.max_steps, config.trainer.gradient_clip_val, inputs.layout)
    student_config = training_config(student.architecture, inputs)
    if distillation is None:
        return gpt_module(student_config, student.architecture, weights=student, optim=optim, tokenizer=tokenizer)
    if isinstance(distillation, KeptDistillation):
        return kept_module(student, distillation, student_config=student_config, optim=optim, tokenizer=tokenizer)
    return distillation_module(
        student,
        distillation,
        student_config=student_config,
        teacher_config=training_config(distillation.checkpoint.architecture, inputs),
        optim=optim,
        tokenizer=tokenizer,
    )
