"""From a flow's configuration to those of its stages, and the checks that come before any work."""

from pathlib import Path
from typing import Any

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture, padded_vocab_size
from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.pruning.plan import plan_cut, target_problems
from nemo_minitron.published import stated_fields


def pretrains_on_broad(config: c.FlowConfig) -> bool:
    return config.model.init == "random" and config.data.source == "embedded"


def teachers(config: c.FlowConfig, run: Path) -> list[tuple[str, Path]]:
    """Name and folder of the teacher before and after correction."""
    before = run / "teacher-pretrained" if config.model.init == "random" else Path(config.model.restore_from_path)
    return [("teacher", before), ("teacher corrected", run / "teacher")]


def training_fields(config: c.FlowConfig, recipe: c.RecipeConfig, data: Path, output: Path) -> dict[str, Any]:
    """What a stage's configuration takes from the flow's model, hardware and recipe."""
    hardware = config.hardware
    trainer = c.TrainerConfig(
        **hardware.trainer(),
        max_steps=recipe.max_steps,
        val_check_interval=recipe.val_check_interval,
        limit_val_batches=recipe.limit_val_batches,
        log_every_n_steps=recipe.log_every_n_steps,
    )
    model = c.ModelConfig(
        nemo_path=str(output),
        **hardware.model(),
        global_batch_size=recipe.global_batch_size,
        data=c.ModelDataConfig(data_prefix=str(data), seq_length=config.model.seq_length, **hardware.loader()),
        optim=c.OptimConfig(lr=recipe.lr, sched=c.SchedConfig(warmup_steps=recipe.warmup_steps, min_lr=recipe.min_lr)),
    )
    return {
        "seed": config.seed,
        "overwrite": config.overwrite,
        "trainer": trainer,
        "model": model,
        "exp_manager": c.ExpManagerConfig(exp_dir=str(output.parent), name=output.name),
    }


def student_targets(config: c.FlowConfig, name: str) -> c.PruneTargets:
    """The targets of the student `name`, on the flow's grid."""
    chosen = {"method": config.prune.method, "depth_by": config.prune.depth_by} | config.prune.students[name]
    return c.PruneTargets(
        **chosen,
        num_samples=config.prune.num_samples,
        num_block_samples=config.prune.num_block_samples,
        scores_path=str(Path(config.output_dir) / "scores"),
        hidden_size_divisor=config.prune.hidden_size_divisor,
        ffn_hidden_size_divisor=config.prune.ffn_hidden_size_divisor,
        num_layers_divisor=config.prune.num_layers_divisor,
    )


def prune_config(config: c.FlowConfig, run: Path, name: str) -> c.PruneConfig:
    """The pruning stage's configuration for the student `name`."""
    return c.PruneConfig(
        seed=config.seed,
        overwrite=config.overwrite,
        trainer=c.TrainerConfig(**config.hardware.trainer(c.SCORING)),
        model=c.PruneModelConfig(
            restore_from_path=str(run / "teacher"),
            **config.hardware.model(c.SCORING),
            data=c.ModelDataConfig(data_prefix=str(run / "data"), seq_length=config.model.seq_length),
        ),
        inference=c.InferenceConfig(batch_size=config.prune.batch_size),
        prune=student_targets(config, name),
        export=c.ExportConfig(save_path=str(run / f"{name}-pruned")),
    )


def instruct_config(config: c.FlowConfig, run: Path, name: str) -> c.FinetuneConfig:
    """The instruction tuning of the distilled student `name`."""
    fields = training_fields(config, config.instruct, run / "data", run / f"{name}-instruct")
    fields["model"].restore_from_path = str(run / f"{name}-distilled")
    fields["model"].data.data_prefix, fields["model"].data.instructions = None, config.instruct.data
    return c.FinetuneConfig(**fields, instruct=config.instruct.rows, peft=config.instruct.peft)


def check_instructions(config: c.FlowConfig) -> None:
    """Reads the instructions, before any work, where there are any."""
    if config.instruct.data:
        from nemo_minitron.data.instructions import read_instructions

        read_instructions(config.instruct.data, config.instruct.rows, config.seed)


def teacher_architecture(config: c.FlowConfig) -> Architecture:
    """The teacher's sizes: those of its checkpoint where that is here, those of the preset otherwise."""
    path = config.model.restore_from_path
    if config.model.init == "checkpoint" and Path(path).exists():
        from nemo_minitron.checkpoints.checkpoint import open_checkpoint

        return open_checkpoint(path, "teacher").architecture
    if not config.model.architecture:
        check_teacher(config)
    fields = stated_fields(config.model.architecture, "flow")
    if fields.get("vocab_size") is None:
        fields["vocab_size"] = padded_vocab_size(config.data.vocab_size)
    return Architecture.from_settings(fields, "flow")


def student_architecture(config: c.FlowConfig, teacher: Architecture, name: str) -> Architecture:
    """The sizes of the student `name`; which layers go is not needed for that."""
    targets = student_targets(config, name)
    layers, targets.num_layers = targets.num_layers, None
    method = targets.method or "compensated"
    student = Architecture.from_dict(plan_cut(teacher, targets, None, method=method).student)
    return student.with_sizes(num_layers=layers)


def check_students(config: c.FlowConfig, teacher: Architecture) -> None:
    """Raises one ConfigError with everything that is wrong with the students' targets."""
    problems = []
    for name in config.prune.students:
        problems += [f"prune.students.{name}: {problem}" for problem in student_problems(config, teacher, name)]
    if problems:
        raise ConfigError(problems, "flow")


def student_problems(config: c.FlowConfig, teacher: Architecture, name: str) -> list[str]:
    """Everything that is wrong with the targets of the student `name`."""
    targets = student_targets(config, name)
    return c.all_problems(targets) or target_problems(teacher, targets)


def check_teacher(config: c.FlowConfig) -> None:
    """Checks, before any work, that a teacher that is to come from a checkpoint is there."""
    if config.model.init == "checkpoint" and not Path(config.model.restore_from_path).exists():
        place = config.model.restore_from_path
        sources = (config.model.download or "").split(" or ")
        where = f" Get it, {' or '.join(f'`minitron download {source} {place}`' for source in sources)}, or"
        raise CheckpointError(
            f"the teacher model.restore_from_path={place} does not exist.{where if config.model.download else ''} name "
            "its place, model.restore_from_path=PATH"
        )
    if config.model.init == "checkpoint" and config.data.tokenizer is None:
        from nemo_minitron.checkpoints.checkpoint import open_checkpoint

        if open_checkpoint(config.model.restore_from_path, "teacher").tokenizer is None:
            raise ConfigError("the teacher's checkpoint has no tokenizer: give it, data.tokenizer=DIR", "flow")
