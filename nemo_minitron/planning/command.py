"""`minitron plan`: resolves models and layout, works out every stage, and prints tables or JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture, PruningGrid
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config import AnswersConfig, PlanConfig, all_problems
from nemo_minitron.errors import ConfigError, EngineError
from nemo_minitron.megatron.layout import Layout
from nemo_minitron.planning import table
from nemo_minitron.planning.answers import matrix_bytes, token_bytes
from nemo_minitron.planning.fitting import fits, halves, lengths, peak, with_batch
from nemo_minitron.planning.flops import forward_flops, stage_flops
from nemo_minitron.planning.layouts import (
    Candidate,
    Models,
    candidates,
    layout_problems,
    scoring_candidates,
    scoring_run,
)
from nemo_minitron.planning.machine import this_machine
from nemo_minitron.planning.memory import RankMemory, stage_memory
from nemo_minitron.planning.run import Run
from nemo_minitron.published import known_model, stated_fields

SOURCE = "minitron plan"
#: Any smaller size; what ModelOpt can cut to is the prune command's business.
SMALLER = PruningGrid(hidden_size=1, ffn_hidden_size=1, num_layers=1)


def plan(config: PlanConfig) -> None:
    """Prints what the stages need, and which layouts fit.

    Raises:
        ConfigError: an unknown model, sizes that are missing or make no student.
        CheckpointError: a checkpoint that is named is damaged.
        EngineError: the models cannot be divided as the layout asks.
    """
    worked_out = work_out(config)
    print(json.dumps(worked_out, indent=2) if config.json else table.render(worked_out))


def work_out(config: PlanConfig) -> dict[str, Any]:
    """The plan as a plain dict."""
    models = resolve_models(config)
    config = on_this_machine(config)
    run = resolve_run(config, models)
    training = tuple(stage for stage in config.stages if stage != "prune")
    if training:
        problems = layout_problems(models, run, training)
        if problems:
            raise EngineError(f"{SOURCE}: " + "; ".join(problems))
    limit = config.hardware.rank_bytes
    asked, run = run, what_fits(config, models, run, limit)
    stages = {stage: _stage(config, models, run, stage, limit) for stage in config.stages}
    listed = []
    if config.layouts:
        chosen = (
            candidates(models, run, training, limit, config.kd_form == "auto")
            if training
            else scoring_candidates(models, run, config.score_batch_size, limit)
        )
        listed = [_listed(one) for one in chosen]
    return {
        "teacher": _model(models.teacher),
        "student": _model(models.student) if models.student else None,
        "hardware": {
            "devices": config.hardware.devices,
            "num_nodes": config.hardware.num_nodes,
            "memory_gb": config.hardware.memory_gb,
            "accelerator": "gpu" if run.layout.cuda else "cpu",
            "precision": "bf16" if run.layout.bf16 else "32",
            "transformer_engine": not run.local_spec,
        },
        "batch": {
            "seq_length": run.seq_length,
            "micro_batch_size": run.layout.micro_batch_size,
            "global_batch_size": run.layout.global_batch_size,
        },
        "instead_of": None if run == asked else _asked(config, models, asked),
        "layout": _layout(run),
        "stages": stages,
        "teach": _answers(config, models, run),
        "layouts_of": list(training or config.stages),
        "layouts": listed,
    }


def on_this_machine(config: PlanConfig) -> PlanConfig:
    """`config` with what its hardware leaves open taken from this machine: ranks, GPU or CPU, and a CPU's memory."""
    hardware = config.hardware
    if hardware.memory_gb is not None and hardware.devices is not None:
        return config
    if hardware.devices is not None and hardware.accelerator == "gpu":
        return config  # GPUs elsewhere, of a size that is not said
    machine = this_machine(hardware.accelerator if hardware.devices is None else "cpu")
    devices = hardware.devices or machine.gpus or 1
    memory = machine.rank_bytes
    if memory is not None:
        memory /= 1e9 * (1 if machine.gpus else devices)
    hardware = dataclasses.replace(
        hardware,
        devices=devices,
        accelerator="gpu" if machine.gpus else hardware.accelerator,
        memory_gb=hardware.memory_gb or (round(memory, 1) if memory else None),
    )
    return dataclasses.replace(config, hardware=hardware)


def what_fits(config: PlanConfig, models: Models, run: Run, limit: float | None) -> Run:
    """`run`, or where it does not fit, with the largest micro batch and the longest sequence that do.

    The micro batch shrinks before the sequence; what is given (micro_batch_size, seq_length) stays. Where nothing
    fits, `run` stays as it is.
    """
    scoring = (config.hardware.scoring_ranks, config.score_batch_size)
    tried = [run.seq_length] if config.seq_length else lengths(run.seq_length)
    sizes = [config.micro_batch] if config.micro_batch_size else list(halves(run.layout.micro_batch_size))
    shrunk = (with_batch(run, seq_length=length, micro_batch=size) for length in tried for size in sizes)
    return next((one for one in shrunk if fits(models, one, config.stages, limit, scoring)), run)


def _asked(config: PlanConfig, models: Models, run: Run) -> dict[str, Any]:
    """What a plan would have been about, had it fitted."""
    scoring = (config.hardware.scoring_ranks, config.score_batch_size)
    stage, total = peak(models, run, config.stages, scoring)
    return {
        "seq_length": run.seq_length,
        "micro_batch_size": run.layout.micro_batch_size,
        "stage": stage,
        "total": total,
    }


def resolve_models(config: PlanConfig) -> Models:
    """Teacher and student; raises ConfigError where they make no pair."""
    if config.architecture is not None:
        teacher = Architecture.from_settings(stated_fields(config.architecture, SOURCE), SOURCE)
    else:
        assert config.model is not None, "problems() asks for one of the two"
        teacher = find(config.model, "model")
    if not config.has_student:
        return Models(teacher=teacher)
    if config.student.model:
        student = find(config.student.model, "student.model")
    else:
        problems = SMALLER.problems(teacher, {**config.student.sizes()})
        if problems:
            raise ConfigError([f"student.{problem}" for problem in problems], SOURCE)
        student = teacher.with_sizes(**config.student.sizes())
    if student.vocab_size != teacher.vocab_size:
        raise ConfigError(
            f"teacher and student have different vocabularies, {teacher.vocab_size} and {student.vocab_size} rows: the "
            "distillation loss compares their logits",
            SOURCE,
        )
    return Models(teacher=teacher, student=student)


def find(name: str, setting: str) -> Architecture:
    """The sizes of the checkpoint at `name`, or of the known model of that name."""
    if Path(name).exists():
        return open_checkpoint(name, setting).architecture
    return known_model(name, f"{setting} = {name} is no checkpoint, and no known model", SOURCE)


def resolve_run(config: PlanConfig, models: Models) -> Run:
    """The layout, as the engine would make it on that hardware."""
    hardware = config.hardware
    cuda = hardware.accelerator == "gpu"
    layout = Layout(
        **hardware.layout(cuda), micro_batch_size=config.micro_batch, global_batch_size=config.global_batch_size
    )
    if layout.sequence_parallel and not (cuda and config.transformer_engine):
        raise EngineError(
            f"{SOURCE}: hardware.sequence_parallel needs Transformer Engine on a GPU; give "
            "hardware.sequence_parallel=false"
        )
    problems = all_problems(models.teacher, "model.") + all_problems(models.student, "student.")
    if problems:
        raise ConfigError(problems, SOURCE)
    return Run(
        layout=layout,
        seq_length=config.seq_length or models.teacher.seq_length,
        transformer_engine=config.transformer_engine,
        fused_loss=config.kd_form == "fused" or (config.kd_form == "auto" and not layout.sequence_parallel),
        statistics=config.statistics,
        device_bytes=hardware.rank_bytes,
    )


def _stage(config: PlanConfig, models: Models, run: Run, stage: str, limit: float | None) -> dict[str, Any]:
    if stage == "prune":
        run = scoring_run(run, config.hardware.scoring_ranks, config.score_batch_size)
        problems = layout_problems(models, run, ("prune",))
        if problems:
            raise EngineError(f"{SOURCE}: " + "; ".join(problems))
    flops = stage_flops(stage, models.teacher, models.student, run.seq_length, statistics=run.statistics)
    needs = _memory(stage_memory(stage, models.teacher, models.student, run), limit)
    needs |= {"layout": _layout(run), "flops_per_token": flops}
    needs["teacher_forward_flops_per_token"] = forward_flops(models.teacher, run.seq_length)
    if config.tflops_per_gpu is not None:
        rate = config.tflops_per_gpu * 1e12 * run.layout.world_size / flops
        needs["tokens_per_second"] = rate
        if stage != "prune":
            needs["seconds_per_step"] = run.layout.global_batch_size * run.seq_length / rate
    return needs


def _answers(config: PlanConfig, models: Models, run: Run) -> dict[str, Any]:
    """What the teacher's answers take, kept in each form; with tokens and a rate, in all, and how long a pass takes."""
    teacher, flops = models.teacher, forward_flops(models.teacher, run.seq_length)
    kinds = {"hidden": AnswersConfig(), "fp8": AnswersConfig(precision="fp8"), "sampled": AnswersConfig(keep="sampled")}
    answers: dict[str, Any] = {
        "flops_per_token": flops,
        "bytes_per_token": {name: token_bytes(teacher, asked) for name, asked in kinds.items()},
        "matrix_bytes": matrix_bytes(teacher, kinds["hidden"], bf16=run.layout.bf16),
    }
    if config.tokens is not None:
        sizes = answers["bytes_per_token"]
        answers["bytes"] = {
            name: sizes[name] * config.tokens + matrix_bytes(teacher, asked, bf16=run.layout.bf16)
            for name, asked in kinds.items()
        }
    if config.tflops_per_gpu is not None:
        rate = config.tflops_per_gpu * 1e12 * run.layout.world_size / flops
        answers["tokens_per_second"] = rate
        if config.tokens is not None:
            answers["hours"] = config.tokens / rate / 3600
    return answers


def _memory(rank: RankMemory, limit: float | None) -> dict[str, Any]:
    return {
        "bytes": rank.peak.by_kind(),
        "total": rank.peak.total,
        "moment": rank.peak.moment,
        "pipeline_stage": rank.pipeline_stage,
        "fits": None if limit is None else rank.peak.total <= limit,
    }


def _model(a: Architecture) -> dict[str, Any]:
    return {"description": a.describe(), "parameters": a.parameters(), "architecture": a.to_dict()}


def _layout(run: Run) -> dict[str, Any]:
    layout = run.layout
    return {
        "tensor_parallel": layout.tensor_parallel,
        "pipeline_parallel": layout.pipeline_parallel,
        "data_parallel": run.data_parallel,
        "sequence_parallel": layout.sequence_parallel,
        "micro_batches": run.micro_batches,
    }


def _listed(candidate: Candidate) -> dict[str, Any]:
    totals = {stage: rank.peak.total for stage, rank in candidate.stages.items()}
    return _layout(candidate.run) | {
        "total": totals,
        "problem": candidate.problem,
        "largest_micro_batch": candidate.micro_batch,
    }
