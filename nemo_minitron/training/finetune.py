"""Training with the language-model loss: teacher correction, a teacher from random weights, instruction tuning."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture, padded_vocab_size
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.config import FinetuneConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.packages.versions import check_training
from nemo_minitron.published import stated_fields
from nemo_minitron.training.adapter import ADAPTER, keep_adapter
from nemo_minitron.training.inputs import (
    CHECKPOINTS,
    LOG,
    Inputs,
    build_data,
    data_tokenizer,
    nemo_tokenizer,
    stated_path,
    training_inputs,
)
from nemo_minitron.training.stage import run_training_stage

if TYPE_CHECKING:
    from nemo.collections.llm import GPTModel


def finetune(config: FinetuneConfig) -> Manifest:
    """Trains a model and writes it to `config.output`, in the format of its name or `to`.

    Raises:
        ConfigError, CheckpointError, DataError, EngineError: before any work.
        OutputExistsError: the output was made from something else.
        NonFiniteLossError: a loss is not a number.
    """
    check_training("minitron finetune")
    folders: dict[str, str] = {}
    weights: Checkpoint | None = None
    if config.model.init == "checkpoint":
        folders["checkpoint"] = stated_path(config.model.restore_from_path, "model.restore_from_path")
        weights = open_checkpoint(folders["checkpoint"], "checkpoint to start from")
        architecture, own_tokenizer = weights.architecture, weights.tokenizer
    else:
        architecture, own_tokenizer = random_architecture(config), None
    inputs = training_inputs(config, architecture, own_tokenizer)
    architecture = dataclasses.replace(architecture, seq_length=max(inputs.seq_length, architecture.seq_length))
    return run_training_stage(
        "finetune",
        finetune,
        config,
        folders | inputs.files(),
        lambda partial: train_model(partial, config, architecture, weights, inputs),
    )


def random_architecture(config: FinetuneConfig) -> Architecture:
    """The sizes given in model.architecture, the vocabulary from the tokenizer where it is null."""
    fields = stated_fields(config.model.architecture or {}, "configuration")
    if fields.get("vocab_size") is None:
        name = config.model.tokenizer or data_tokenizer(config)
        if name is None:
            raise ConfigError(
                "model.architecture.vocab_size is null and there is no tokenizer; give model.tokenizer=DIR"
            )
        from nemo_minitron.data.tokenizer import load_tokenizer

        fields["vocab_size"] = padded_vocab_size(len(load_tokenizer(name)))
    return Architecture.from_settings(fields, "configuration")


def train_model(
    partial: Path, config: FinetuneConfig, architecture: Architecture, weights: Checkpoint | None, inputs: Inputs
) -> dict[str, Any]:
    """The job's work: trains the model and saves it; every rank calls it."""
    from nemo_minitron.megatron.lora import reseeding
    from nemo_minitron.megatron.session import engine
    from nemo_minitron.training.loop import optimizer, train_and_validate
    from nemo_minitron.training.model import gpt_module, training_config

    with engine(config.seed, partial / LOG, cuda=inputs.layout.cuda):
        tokenizer = nemo_tokenizer(inputs.tokenizer)
        module = gpt_module(
            training_config(architecture, inputs),
            architecture,
            weights=weights,
            optim=optimizer(
                config.model.optim, config.trainer.max_steps, config.trainer.gradient_clip_val, inputs.layout
            ),
            tokenizer=tokenizer,
            peft=config.peft,
        )
        data = build_data(config, inputs, tokenizer, partial)
        callbacks = [reseeding(config.seed)] if config.peft.scheme == "lora" and config.peft.dropout else []
        trained = train_and_validate(module, data, config, inputs.layout, partial, callbacks)
        _save(module, architecture, config, inputs, partial, weights.generation if weights else None)
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
    return trained.result(config, architecture, inputs)


def _save(
    module: "GPTModel",
    architecture: Architecture,
    config: FinetuneConfig,
    inputs: Inputs,
    partial: Path,
    generation: Mapping[str, Any] | None,
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
