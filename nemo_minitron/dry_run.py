"""The plan of a flow in words: what `minitron flow --dry-run` prints."""

import dataclasses
from pathlib import Path

import yaml

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture, human
from nemo_minitron.recipes import prune_config, student_architecture, student_targets


def describe(config: c.FlowConfig, teacher: Architecture) -> str:
    """The resolved plan, in words; reads no weights and touches nothing."""
    lines = [f"teacher   {teacher.describe()}"]
    for name in config.prune.students:
        student = student_architecture(config, teacher, name)
        share = student.parameters() / teacher.parameters()
        lines.append(f"{name:<9} {student.describe()}, {share:.1%} of the teacher")
    lines += ["", f"stages, under {config.output_dir}:"]
    for step in stage_names(config, teacher):
        lines.append(f"  {step}")
    lines += ["", "configuration:", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).rstrip()]
    return "\n".join(lines)


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
    run = Path(config.output_dir)
    scanned = [name for name in config.prune.students if prune_config(config, run, name).needs_scan]
    samples = config.prune.num_block_samples
    names += [f"scan blocks for {name}: {samples} samples of {tokens} tokens" for name in scanned]
    for name, targets in config.prune.students.items():
        cut = ", ".join(f"{key}={value}" for key, value in targets.items())
        names += [f"prune {name}: {cut}", training(f"distil {name}", config.distill)]
        if config.distill.control:
            names.append(f"retrain {name} with the LM loss alone, to compare: the same steps")
    if config.instruct.data:
        scheme = "" if config.instruct.peft.scheme == "none" else f" ({config.instruct.peft.scheme})"
        names += [training(f"instruct {name}{scheme}", config.instruct) for name in config.prune.students]
    names.append("evaluate every model; table and report.json")
    return names
