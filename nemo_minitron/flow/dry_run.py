"""What would be done, in words: what `--dry-run` prints of a flow."""

import dataclasses
from pathlib import Path

import yaml

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture, human
from nemo_minitron.flow.configs import prune_config, student_architecture, student_targets
from nemo_minitron.flow.settle import Settled
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
    for step in stage_names(config, teacher):
        lines.append(f"  {step}")
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


def stage_names(config: c.FlowConfig, teacher: Architecture) -> list[str]:
    """Name, length and layout of each stage, for the plan."""
    hardware = config.hardware
    ranks = (
        f"{hardware.num_nodes * hardware.devices} rank(s), tensor {hardware.tensor_model_parallel_size} x "
        f"pipeline {hardware.pipeline_model_parallel_size}, precision {hardware.precision}"
    )
    tokens = config.model.seq_length

    def training(name: str, recipe: c.RecipeConfig) -> str:
        total = recipe.max_steps * recipe.global_batch_size * tokens
        return (
            f"{name}: {recipe.max_steps} steps x {recipe.global_batch_size} x {tokens} = {human(total)} tokens, "
            f"lr {recipe.lr:g} to {recipe.min_lr:g}, {ranks}"
        )

    names = [f"data: {config.data.source}"]
    if config.model.init == "random":
        names.append(training("pretrain teacher", config.pretrain))
    names.append(training("teacher correction", config.finetune))
    if any(student_targets(config, name).needs_scores for name in config.prune.students):
        names.append(f"importance: {config.prune.num_samples} samples of {tokens} tokens")
    names += _scans(config, teacher)
    for name, targets in config.prune.students.items():
        cut = ", ".join(f"{key}={value}" for key, value in targets.items())
        names += [f"prune {name}: {cut}", training(f"distil {name}", config.distill)]
        if config.distill.control:
            names.append(f"retrain {name} with the LM loss alone, to compare: the same steps")
    if config.instruct.data:
        scheme = "" if config.instruct.peft.scheme == "none" else f" ({config.instruct.peft.scheme})"
        names += [training(f"instruct {name}{scheme}", config.instruct) for name in config.prune.students]
    if config.data.source == "embedded" and config.facts:
        names.append(f"facts: {config.facts} questions about the text, to every model")
    names.append("evaluate every model; table and report.json")
    return names


def _scans(config: c.FlowConfig, teacher: Architecture) -> list[str]:
    """The scans of blocks that students need, and what choosing their layers costs."""
    from nemo_minitron.pruning.importance.scan import by_maps, cost

    length, found = config.model.seq_length, []
    for name in config.prune.students:
        pruning = prune_config(config, Path(config.output_dir), name)
        choice = f"; {cost(teacher.num_layers, pruning, length)}" if by_maps(pruning) else ""
        if pruning.needs_scan:
            samples = config.prune.num_block_samples
            found.append(f"scan blocks for {name}: {samples} samples of {length} tokens{choice}")
    return found
