"""From a flow's configuration to those of its steps."""

import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron import config as c
from nemo_minitron.artifacts.stages import MODELS
from nemo_minitron.flow.answers import answered_tokens, keeps_answers
from nemo_minitron.flow.models import (
    candidates_cut,
    checkpoint_place,
    chosen,
    place,
    pretrains_on_broad,
    searches,
    student_models,
    student_targets,
)
from nemo_minitron.search.distilling import STUDENT


def broad_data_config(config: c.FlowConfig) -> c.DataConfig:
    """The corpus that a teacher which is made here is pretrained on."""
    return _corpus(config, place(config, "broad"), config.data.pretrain_words, config.data.tokenizer, "broad")


def data_config(config: c.FlowConfig) -> c.DataConfig:
    """The flow's own text; its tokenizer is the broad corpus' where there is one."""
    tokenizer = config.data.tokenizer
    if pretrains_on_broad(config):
        tokenizer = tokenizer or str(place(config, "broad") / "tokenizer")
    corpus = _corpus(config, place(config, "data"), config.data.words, tokenizer)
    if config.data.sources is not None:
        corpus.source, corpus.sources = c.DataConfig.source, dict(config.data.sources)
    return corpus


def read_data(config: c.FlowConfig, data: Path) -> c.ModelDataConfig:
    """What a stage reads of a folder that the flow made."""
    blend = config.data.blend if data == place(config, "data") else None
    return c.ModelDataConfig(
        data_prefix=str(data), blend=None if blend is None else dict(blend), seq_length=config.model.seq_length
    )


def _corpus(
    config: c.FlowConfig, output: Path, words: int, tokenizer: str | None, domain: str = c.DataConfig.domain
) -> c.DataConfig:
    return c.DataConfig(
        output=str(output),
        source=config.data.source,
        text_key=config.data.text_key,
        domain=domain,
        words=words,
        limit_documents=config.data.limit_documents,
        tokenizer=tokenizer,
        vocab_size=config.data.vocab_size,
        workers=config.data.workers,
        seed=config.seed,
        overwrite=config.overwrite,
    )


def training_fields(config: c.FlowConfig, recipe: c.RecipeConfig, data: Path, output: Path) -> dict[str, Any]:
    """What a stage's configuration takes from the flow's model, hardware and recipe."""
    hardware = config.hardware
    trainer = c.TrainerConfig(
        **hardware.trainer(),
        max_steps=chosen(recipe.max_steps),
        val_check_interval=chosen(recipe.val_check_interval),
        limit_val_batches=chosen(recipe.limit_val_batches),
        log_every_n_steps=recipe.log_every_n_steps,
    )
    model = c.ModelConfig(
        nemo_path=str(output),
        **hardware.model(),
        global_batch_size=chosen(recipe.global_batch_size),
        data=dataclasses.replace(read_data(config, data), **hardware.loader()),
        optim=c.OptimConfig(
            lr=recipe.lr, sched=c.SchedConfig(warmup_steps=chosen(recipe.warmup_steps), min_lr=recipe.min_lr)
        ),
    )
    return {
        "seed": config.seed,
        "overwrite": config.overwrite,
        "trainer": trainer,
        "model": model,
        "exp_manager": c.ExpManagerConfig(exp_dir=str(output.parent), name=output.name),
    }


def cut_config(config: c.FlowConfig, name: str) -> c.PruneConfig:
    """The scan, the refit and the cut of the student `name`."""
    return c.PruneConfig(
        seed=config.seed,
        overwrite=config.overwrite,
        trainer=c.TrainerConfig(**config.hardware.trainer(c.SCORING)),
        model=c.PruneModelConfig(
            restore_from_path=str(place(config, "correct")),
            **config.hardware.model(c.SCORING),
            data=read_data(config, place(config, "data")),
        ),
        inference=c.InferenceConfig(batch_size=chosen(config.prune.batch_size)),
        prune=student_targets(config, name),
        export=c.ExportConfig(save_path=str(place(config, "prune", name))),
    )


def pretrain_config(config: c.FlowConfig) -> c.FinetuneConfig:
    """The pretraining of a teacher from random weights."""
    data = place(config, "broad" if pretrains_on_broad(config) else "data")
    fields = training_fields(config, config.pretrain, data, place(config, "pretrain"))
    fields["model"].init, fields["model"].architecture = "random", dict(config.model.architecture)
    return c.FinetuneConfig(**fields)


def correct_config(config: c.FlowConfig) -> c.FinetuneConfig:
    """Teacher correction, on the flow's own text."""
    fields = training_fields(config, config.finetune, place(config, "data"), place(config, "correct"))
    fields["model"].restore_from_path = str(checkpoint_place(config, "teacher"))
    return c.FinetuneConfig(**fields)


def score_config(config: c.FlowConfig) -> c.PruneConfig:
    """One calibration pass for all students."""
    return cut_config(config, next(iter(config.prune.students)))


def teach_config(config: c.FlowConfig) -> c.TeachConfig:
    """The corrected teacher's answers to what a student reads."""
    fields = training_fields(config, config.distill, place(config, "data"), place(config, "teach"))
    fields["model"].restore_from_path = str(place(config, "correct"))
    return c.TeachConfig(**fields, teach=c.AnswersConfig(tokens=answered_tokens(config)))


def search_config(config: c.FlowConfig, name: str) -> c.SearchConfig:
    """The search for the student `name`: its rounds are short distillations by the flow's own recipe, from the
    corrected teacher's own answers."""
    output = place(config, "search", name)
    fields = training_fields(config, config.distill, place(config, "data"), output)
    del fields["exp_manager"]
    fields["model"].nemo_path, fields["model"].restore_from_path = None, str(place(config, "correct"))
    return c.SearchConfig(
        **fields,
        output=str(output),
        search=c.SearchSettings(**config.prune.students[name]["search"]),
        prune=candidates_cut(config, name),
        kd=dataclasses.replace(config.distill.kd, teacher=None, teachers=None, fill=False),
    )


def distill_config(config: c.FlowConfig, name: str) -> c.DistillConfig:
    """The distillation of the pruned student `name`; of a searched one, of what the search's rounds left of it."""
    distill = _student_training(config, name, "distill", config.distill.kd)
    if searches(config, name):
        distill.model.restore_from_path = str(place(config, "search", name) / STUDENT)
    distill.model.data.dynamic = config.data.dynamic
    return distill


def retrain_config(config: c.FlowConfig, name: str) -> c.DistillConfig:
    """The control: the pruned student `name` retrained with the LM loss alone."""
    return _student_training(config, name, "retrain", c.KDConfig(kd_weight=0.0, lm_weight=1.0))


def _student_training(config: c.FlowConfig, name: str, kind: str, kd: c.KDConfig) -> c.DistillConfig:
    fields = training_fields(config, config.distill, place(config, "data"), place(config, kind, name))
    fields["model"].restore_from_path = str(place(config, "prune", name))
    kept = keeps_answers(config)
    if kept:
        fields["model"].data.windows = "fixed"
    if kd.kd_weight and kept:
        kd = dataclasses.replace(kd, teacher=str(place(config, "teach")))
    elif kd.kd_weight:
        fields["model"].kd_teacher_restore_from_path = str(place(config, "correct"))
    return c.DistillConfig(**fields, kd=kd)


def instruct_config(config: c.FlowConfig, name: str) -> c.FinetuneConfig:
    """The instruction tuning of the distilled student `name`."""
    fields = training_fields(config, config.instruct, place(config, "data"), place(config, "instruct", name))
    fields["model"].restore_from_path = str(place(config, "distill", name))
    data = fields["model"].data
    data.data_prefix, data.blend, data.instructions = None, None, config.instruct.data
    return c.FinetuneConfig(**fields, instruct=config.instruct.rows, peft=config.instruct.peft)


def loss_config(config: c.FlowConfig, student: str | None = None, *, model: str) -> c.LossConfig:
    """The validation and test loss, on the flow's own text, of a model of the table by its kind."""
    output = place(config, f"evaluate {model}", student)
    fields = training_fields(config, config.distill, place(config, "data"), output)
    fields["model"].restore_from_path = str(checkpoint_place(config, model, student))
    fields["trainer"].max_steps = fields["trainer"].val_check_interval = 1
    if config.data.blend is not None:
        fields["model"].data.blend = {name: config.data.blend[name] for name in config.data.sources}
    return c.LossConfig(**fields, limit_batches=chosen(config.limit_test_batches))


def facts_config(config: c.FlowConfig) -> c.EvaluateConfig:
    """Which facts of the embedded corpus each model knows, the corrected teacher first."""
    students = [(kind, name) for name in config.prune.students for kind in student_models(config)]
    models: list[tuple[str, str | None]] = [("corrected", None), ("teacher", None), *students]
    data = place(config, "data")
    return c.EvaluateConfig(
        models=[str(checkpoint_place(config, kind, student)) for kind, student in models],
        names=[MODELS[kind].format(student=student) for kind, student in models],
        tasks=["facts"],
        corpus=str(data),
        device=config.hardware.device,
        tokenizer=str(data / "tokenizer"),
        limit=config.facts,
        seed=config.seed,
        output=str(place(config, "facts")),
        overwrite=config.overwrite,
    )
