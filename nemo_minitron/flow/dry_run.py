"""What would be done, in words: what `--dry-run` prints of a flow or of a single stage."""

import dataclasses
import os
from typing import Any

import yaml

from nemo_minitron.architecture import human
from nemo_minitron.flow.models import student_architecture
from nemo_minitron.flow.settle import Settled
from nemo_minitron.flow.steps import steps
from nemo_minitron.planning.pace import in_words


def describe(settled: Settled) -> str:
    """The resolved plan, in words; reads no weights and touches nothing."""
    config, teacher = settled.config, settled.teacher
    lines = [f"teacher   {teacher.describe()}"]
    for name in config.prune.students:
        student = student_architecture(config, teacher, name)
        share = student.parameters() / teacher.parameters()
        lines.append(f"{name:<9} {student.describe()}, {share:.1%} of the teacher")
    if settled.choices:
        lines += ["", "chosen, where the settings leave it open:"]
        lines += [f"  {choice.setting} = {choice.value}: {choice.why}" for choice in settled.choices]
    lines += ["", f"stages, under {config.output_dir}:"]
    lines += [f"  {step.describe(config, teacher)}" for step in steps(config)]
    lines.append("then the table, report.json and report.html")
    lines += ["", *times(settled)]
    lines += ["", "configuration:", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).rstrip()]
    return "\n".join(lines)


def times(settled: Settled) -> list[str]:
    """What each stage will take, and all together, at the rate that is assumed."""
    pace = settled.pace
    seconds = {name: pace.seconds(work) for name, work in settled.work.items()}
    total = in_words(sum(seconds.values()))
    return [
        f"time: {total} in all, at {pace.flops / 1e12:.3g} TFLOP/s ({pace.source}); hardware.tflops=N says better",
        *(f"  {name}: {in_words(value)}" for name, value in seconds.items()),
    ]


def describe_stage(name: str, config: Any) -> str:
    """What a single stage would read, run and write, in words; opens nothing and touches nothing."""
    lines = ["reads"]
    for role, path in _inputs(config):
        there = "" if not isinstance(path, str) or os.path.exists(path) else "  (not there)"
        lines.append(f"  {role}: {path}{there}")
    state = "there already" if os.path.lexists(config.output) else "new"
    lines += ["writes", f"  {config.output}: {config.target_format}, {state}"]
    trainer, model = config.trainer, config.model
    sizes = {
        kind: getattr(model, f"{kind}_model_parallel_size", getattr(model, f"{kind}_parallel_size", 1))
        for kind in ("tensor", "pipeline", "context")
    }
    world = trainer.num_nodes * trainer.devices
    layout = " x ".join(f"{kind} {size}" for kind, size in sizes.items())
    lines += [
        "runs",
        f"  {world} rank(s) = {trainer.num_nodes} node(s) x {trainer.devices}, {layout}, precision {trainer.precision}",
    ]
    if name in ("finetune", "distill"):
        length = model.data.seq_length or model.encoder_seq_length
        tokens = (
            f"{length} = {human(trainer.max_steps * model.global_batch_size * length)}" if length else "the model's"
        )
        lines.append(f"  {trainer.max_steps} steps x {model.global_batch_size} samples x {tokens} tokens")
    return "\n".join(
        [*lines, "", "configuration:", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).rstrip()]
    )


def _inputs(config: Any) -> list[tuple[str, Any]]:
    """Role and path of what a stage's configuration names."""
    model = config.model
    named = [
        ("checkpoint", model.restore_from_path),
        ("teacher", getattr(model, "kd_teacher_restore_from_path", None)),
        ("tokenizer", getattr(model, "tokenizer", None)),
        ("data", model.data.data_prefix),
        ("scores", getattr(getattr(config, "prune", None), "scores_path", None)),
    ]
    return [(role, path) for role, path in named if path]
