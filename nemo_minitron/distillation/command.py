"""Distillation of a pruned student, or its control: the same training without a teacher."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.config import DistillConfig
from nemo_minitron.distillation.hidden import layer_pairs
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.jobs.job import Job
from nemo_minitron.launch.ranks import run_stage
from nemo_minitron.megatron.layout import check_fits
from nemo_minitron.packages.versions import check_training
from nemo_minitron.training.inputs import (
    CHECKPOINTS,
    LOG,
    NOT_THE_RESULT,
    Inputs,
    build_data,
    nemo_tokenizer,
    training_inputs,
)


def distill(config: DistillConfig) -> Manifest:
    """Trains the student on the teacher's logits and writes it to `config.output`, in the format of its name or `to`.

    With kd.kd_weight=0 no teacher is loaded: the language-model loss alone, the control.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: the output was made from something else.
        NonFiniteLossError: a loss is not a number.
    """
    check_training("minitron distill")
    student = open_checkpoint(config.model.restore_from_path, "student")
    teacher = None
    folders: dict[str, Any] = {"student": config.model.restore_from_path}
    if config.kd.kd_weight:
        teacher = open_checkpoint(config.model.kd_teacher_restore_from_path, "teacher")
        check_pair(teacher.architecture, student.architecture)
        folders["teacher"] = config.model.kd_teacher_restore_from_path
    pairs = pairs_of(config, teacher, student)
    inputs = training_inputs(config, student.architecture, student.tokenizer)
    if teacher is not None:
        check_fits(teacher.architecture, inputs.layout, "teacher")
    job = Job(
        stage="distill",
        output=Path(config.output),
        config=dataclasses.asdict(config),
        inputs=folders | inputs.files(),
        seed=config.seed,
        overwrite=config.overwrite,
        ignore=NOT_THE_RESULT,
    )
    return run_stage(
        job,
        lambda partial: _work(partial, config, student, teacher, inputs, pairs),
        stage="nemo_minitron.distillation.command:distill",
        config=config,
        trainer=config.trainer,
        resumable=True,
    )


def check_pair(teacher: Architecture, student: Architecture) -> None:
    """Raises ConfigError where the logits of teacher and student cannot be compared."""
    if teacher.vocab_size != student.vocab_size:
        raise ConfigError(
            f"teacher and student have different vocabularies: {teacher.vocab_size} and {student.vocab_size} rows; "
            "the distillation loss compares their logits, so the student must come from this teacher",
            "distill",
        )


def pairs_of(config: DistillConfig, teacher: Checkpoint | None, student: Checkpoint) -> list[tuple[int, int]]:
    """Layers of student and teacher whose hidden states are compared; the student's manifest says what was dropped."""
    if teacher is None:
        return []
    dropped = None
    with contextlib.suppress(MinitronError):
        manifest = Manifest.read(student.path)
        dropped = manifest.metrics.get("dropped_layers") if manifest.stage == "prune" else None
    return layer_pairs(config.kd.hidden, teacher.architecture, student.architecture, dropped)


def _work(
    partial: Path,
    config: DistillConfig,
    student: Checkpoint,
    teacher: Checkpoint | None,
    inputs: Inputs,
    pairs: list[tuple[int, int]],
) -> dict[str, Any]:
    import shutil
    import time

    from nemo_minitron.distillation.module import teacher_in_validation
    from nemo_minitron.megatron.session import engine
    from nemo_minitron.megatron.weights import bare, save_checkpoint
    from nemo_minitron.training.loop import train_and_validate

    with engine(config.seed, partial / LOG, cuda=inputs.layout.cuda):
        tokenizer = nemo_tokenizer(inputs.tokenizer)
        module = _module(config, student, teacher, inputs, pairs, tokenizer)
        data = build_data(config, inputs, tokenizer, partial)
        started = time.perf_counter()
        callbacks = [] if teacher is None else [teacher_in_validation()]
        history = train_and_validate(module, data, config, inputs.layout, partial, callbacks)
        seconds = time.perf_counter() - started
        save_checkpoint(
            _student_of(bare(module)),
            student.architecture,
            partial,
            output=config.output,
            to=config.to,
            tokenizer=student.tokenizer_files or inputs.tokenizer,
            generation=student.generation,
        )
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
    return {
        "metrics": {
            "steps": config.trainer.max_steps,
            "result_step": history["result_step"],
            "parameters": student.architecture.parameters(),
            "weights": history["weights"],
            "validation": history["validation"],
            "train": history["train"],
        },
        "timings": {"training_seconds": seconds, "tokens_per_second": history["tokens_per_second"]},
        "details": {"architecture": student.architecture.to_dict()},
    }


def _module(
    config: DistillConfig,
    student: Checkpoint,
    teacher: Checkpoint | None,
    inputs: Inputs,
    pairs: list[tuple[int, int]],
    tokenizer: Any,
) -> Any:
    from nemo_minitron.distillation.module import distillation_module
    from nemo_minitron.megatron.session import model_config
    from nemo_minitron.training.loop import optimizer
    from nemo_minitron.training.model import gpt_module

    common = {
        "optim": optimizer(
            config.model.optim, config.trainer.max_steps, config.trainer.gradient_clip_val, inputs.layout
        ),
        "tokenizer": tokenizer,
    }
    student_config = model_config(student.architecture, inputs.layout)
    if teacher is None:
        return gpt_module(student_config, student.architecture, weights=student, **common)
    return distillation_module(
        (student_config, student),
        (model_config(teacher.architecture, inputs.layout), teacher),
        config.kd,
        pairs=pairs,
        **common,
    )


def _student_of(model: Any) -> Any:
    """The plain student: ModelOpt's distillation, and NeMo's methods for it, taken off again."""
    from nemo_minitron.distillation.output_layer import unfuse

    if not hasattr(model, "teacher_model"):
        return model
    unfuse(model)
    model._loss_modules = type(model._loss_modules)()
    for name in (
        "forward",
        "sharded_state_dict",
        "compute_language_model_loss",
        "set_input_tensor",
        "set_student_input_tensor_shape",
    ):
        model.__dict__.pop(name, None)
    return model.export()
