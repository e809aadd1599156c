"""Training with the language-model loss: teacher correction, a teacher from random weights, instruction tuning."""

import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture, padded_vocab_size
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.config import FinetuneConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs.job import Job
from nemo_minitron.launch.ranks import run_stage
from nemo_minitron.packages.versions import check_training
from nemo_minitron.published import stated_fields
from nemo_minitron.training.adapter import ADAPTER, keep_adapter
from nemo_minitron.training.inputs import (
    CHECKPOINTS,
    LOG,
    NOT_THE_RESULT,
    Inputs,
    build_data,
    data_tokenizer,
    nemo_tokenizer,
    training_inputs,
)


def finetune(config: FinetuneConfig) -> Manifest:
    """Trains a model and writes it to `config.output`, in the format of its name or `to`.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: the output was made from something else.
        NonFiniteLossError: a loss is not a number.
    """
    check_training("minitron finetune")
    inputs_of_job: dict[str, Any] = {}
    if config.model.init == "checkpoint":
        checkpoint = open_checkpoint(config.model.restore_from_path, "checkpoint to start from")
        architecture, own_tokenizer, weights = checkpoint.architecture, checkpoint.tokenizer, checkpoint
        inputs_of_job["checkpoint"] = config.model.restore_from_path
    else:
        architecture, own_tokenizer, weights = random_architecture(config), None, None
    inputs = training_inputs(config, architecture, own_tokenizer)
    architecture = dataclasses.replace(architecture, seq_length=max(inputs.seq_length, architecture.seq_length))
    job = Job(
        stage="finetune",
        output=Path(config.output),
        config=dataclasses.asdict(config),
        inputs=inputs_of_job | inputs.files(),
        seed=config.seed,
        overwrite=config.overwrite,
        ignore=NOT_THE_RESULT,
    )
    return run_stage(
        job,
        lambda partial: _work(partial, config, architecture, weights, inputs),
        stage="nemo_minitron.training.finetune:finetune",
        config=config,
        trainer=config.trainer,
        resumable=True,
    )


def random_architecture(config: FinetuneConfig) -> Architecture:
    """The sizes given in model.architecture, the vocabulary from the tokenizer where it is null."""
    fields = stated_fields(config.model.architecture, "configuration")
    if fields.get("vocab_size") is None:
        name = config.model.tokenizer or data_tokenizer(config)
        if name is None:
            raise ConfigError(
                "model.architecture.vocab_size is null and there is no tokenizer; give model.tokenizer=DIR"
            )
        from nemo_minitron.data.tokenizer import load_tokenizer

        fields["vocab_size"] = padded_vocab_size(len(load_tokenizer(name)))
    return Architecture.from_settings(fields, "configuration")


def _work(
    partial: Path, config: FinetuneConfig, architecture: Architecture, weights: Checkpoint | None, inputs: Inputs
) -> dict[str, Any]:
    import shutil
    import time

    from nemo_minitron.megatron.lora import reseeding
    from nemo_minitron.megatron.session import engine, model_config
    from nemo_minitron.training.loop import optimizer, train_and_validate
    from nemo_minitron.training.model import gpt_module

    with engine(config.seed, partial / LOG, cuda=inputs.layout.cuda):
        tokenizer = nemo_tokenizer(inputs.tokenizer)
        settings = model_config(architecture, inputs.layout)
        # Answers differ in length: each of their tokens weighs the same, whatever micro batch it is in.
        settings.calculate_per_token_loss = inputs.samples is not None
        module = gpt_module(
            settings,
            architecture,
            weights=weights,
            optim=optimizer(
                config.model.optim, config.trainer.max_steps, config.trainer.gradient_clip_val, inputs.layout
            ),
            tokenizer=tokenizer,
            peft=config.peft,
        )
        data = build_data(config, inputs, tokenizer, partial)
        started = time.perf_counter()
        callbacks = [reseeding(config.seed)] if config.peft.scheme == "lora" and config.peft.dropout else []
        history = train_and_validate(module, data, config, inputs.layout, partial, callbacks)
        seconds = time.perf_counter() - started
        _save(module, architecture, config, inputs, partial, weights.generation if weights else None)
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
    return {
        "metrics": {
            "steps": config.trainer.max_steps,
            "result_step": history["result_step"],
            "parameters": architecture.parameters(),
            "weights": history["weights"],
            "validation": history["validation"],
            "train": history["train"],
            **_rows(inputs),
        },
        "timings": {"training_seconds": seconds, "tokens_per_second": history["tokens_per_second"]},
        "details": {"architecture": architecture.to_dict()} | _notes(inputs),
    }


def _save(
    module: Any, architecture: Architecture, config: FinetuneConfig, inputs: Inputs, partial: Path, generation: Any
) -> None:
    """Writes the trained model as an ordinary checkpoint, adapters merged, and the adapter where it is to stay."""
    from nemo_minitron.megatron.lora import merge_adapters
    from nemo_minitron.megatron.weights import bare, save_checkpoint

    model = bare(module)
    if config.peft.keep_adapter:
        keep_adapter(model, architecture, config.peft, partial / ADAPTER, str(config.model.restore_from_path))
    if config.peft.scheme == "lora":
        merge_adapters(model)
    save_checkpoint(
        model,
        architecture,
        partial,
        output=config.output,
        to=config.to,
        tokenizer=inputs.tokenizer,
        generation=generation,
    )


def _notes(inputs: Inputs) -> dict[str, Any]:
    """Files of instructions that were not read, for the manifest's details."""
    return {"notes": inputs.samples.notes} if inputs.samples else {}


def _rows(inputs: Inputs) -> dict[str, Any]:
    """What became of the rows of instructions, for the manifest's metrics."""
    if inputs.samples is None:
        return {}
    counts = inputs.samples.counts
    total = {name: sum(split[name] for split in counts.values()) for name in counts["train"]}
    rows = {f"rows_{name}" if name != "rows" else name: count for name, count in total.items()}
    return {"template": inputs.samples.template, **rows, "validation_rows": counts["validation"]["rows"]}
