"""Distillation of a pruned student, or its control: the same training without a teacher."""

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.config import DistillConfig
from nemo_minitron.distillation.attach import Distillation
from nemo_minitron.distillation.layer_pairs import Pair, layer_pairs
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


def distill(config: DistillConfig) -> Manifest:
    """Trains the student on the teacher's logits and writes it to `config.output`, in the format of its name or `to`.

    With kd.kd_weight=0 no teacher is loaded: the language-model loss alone, the control.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: the output was made from something else.
        NonFiniteLossError: a loss is not a number.
    """
    check_training("minitron distill")
    folders = {"student": stated_path(config.model.restore_from_path, "model.restore_from_path")}
    student, teacher = open_checkpoint(folders["student"], "student"), None
    if config.kd.kd_weight:
        folders["teacher"] = stated_path(
            config.model.kd_teacher_restore_from_path, "model.kd_teacher_restore_from_path"
        )
        teacher = open_checkpoint(folders["teacher"], "teacher")
        check_pair(teacher.architecture, student.architecture)
    pairs = pairs_of(config, teacher, student)
    inputs = training_inputs(config, student.architecture, student.tokenizer)
    if teacher is not None:
        check_fits(teacher.architecture, inputs.layout, "teacher")
    check_reference(config, teacher)
    return run_training_stage(
        "distill",
        distill,
        config,
        folders | inputs.files(),
        lambda partial: train_student(partial, config, student, teacher, inputs, pairs),
    )


def check_pair(teacher: Architecture, student: Architecture) -> None:
    """Raises ConfigError where the logits of teacher and student cannot be compared."""
    if teacher.vocab_size != student.vocab_size:
        raise ConfigError(
            f"teacher and student have different vocabularies: {teacher.vocab_size} and {student.vocab_size} rows; "
            "the distillation loss compares their logits, so the student must come from this teacher",
            "distill",
        )


def check_reference(config: DistillConfig, teacher: Checkpoint | None) -> None:
    """Raises ConfigError where shares are to follow losses, and none to reach are given or can be measured."""
    data = config.model.data
    if data.dynamic and data.reference is None and teacher is None:
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
) -> dict[str, Any]:
    """The job's work: attaches the teacher, trains, detaches it, saves the student; every rank calls it."""
    from nemo_minitron.distillation.module import teacher_in_validation
    from nemo_minitron.megatron.session import engine
    from nemo_minitron.megatron.weights import bare, save_checkpoint
    from nemo_minitron.training.loop import train_and_validate

    with engine(config.seed, partial / LOG, cuda=inputs.layout.cuda):
        tokenizer = nemo_tokenizer(inputs.tokenizer)
        distillation = None if teacher is None else Distillation(teacher, config.kd, pairs)
        module = student_module(config, student, distillation, inputs, tokenizer)
        data = build_data(config, inputs, tokenizer, partial)
        callbacks = [] if distillation is None else [teacher_in_validation()]
        if config.model.data.dynamic and config.model.data.reference is None and teacher is not None:
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
    return trained.result(config, student.architecture)


def reference_of(config: DistillConfig, teacher: Checkpoint, inputs: Inputs, data: Any, partial: Path) -> "pl.Callback":
    """The callback that measures the losses which dynamic shares of a blend follow."""
    from nemo_minitron.training.reference import TeacherReference

    batch = config.model.micro_batch_size
    return TeacherReference(teacher, inputs.layout, data.validation, data.mixture, batch=batch, partial=partial)


def student_module(
    config: DistillConfig, student: Checkpoint, distillation: Distillation | None, inputs: Inputs, tokenizer: Any
) -> "GPTModel":
    """NeMo's module that trains the student: with a teacher, or on the language-model loss alone."""
    from nemo_minitron.distillation.module import distillation_module
    from nemo_minitron.megatron.session import model_config
    from nemo_minitron.training.loop import optimizer
    from nemo_minitron.training.model import gpt_module

    optim = optimizer(config.model.optim, config.trainer.max_steps, config.trainer.gradient_clip_val, inputs.layout)
    student_config = model_config(student.architecture, inputs.layout)
    student_config.calculate_per_token_loss = inputs.has_rows
    if distillation is None:
        return gpt_module(student_config, student.architecture, weights=student, optim=optim, tokenizer=tokenizer)
    return distillation_module(
        student,
        distillation,
        student_config=student_config,
        teacher_config=model_config(distillation.checkpoint.architecture, inputs.layout),
        optim=optim,
        tokenizer=tokenizer,
    )
