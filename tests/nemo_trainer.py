"""Plain NeMo's own trainer and model, on the shared data."""

from pathlib import Path
from typing import Any

from nemo_minitron import config as c
from nemo_minitron.megatron.layout import Layout
from nemo_minitron.training.inputs import build_data, nemo_tokenizer, training_inputs

CPU = Layout(cuda=False, bf16=False)


def trainer_and_model(fields: dict[str, Any], architecture: Any, folder: Path, steps: int) -> tuple[Any, Any, Any]:
    """NeMo's trainer, its plain LlamaModel, and its data module.

    Args:
        fields: of a training stage's configuration.
    """
    from nemo.collections import llm

    from nemo_minitron.megatron.session import build_trainer, model_config
    from nemo_minitron.training.loop import optimizer

    config = c.FinetuneConfig(**fields)
    inputs = training_inputs(config, architecture, None)
    tokenizer = nemo_tokenizer(inputs.tokenizer)
    model = llm.LlamaModel(
        model_config(architecture, CPU), optim=optimizer(config.model.optim, 2, 1.0, CPU), tokenizer=tokenizer
    )
    trainer = build_trainer(CPU, max_steps=steps, val_check_interval=steps, limit_val_batches=1)
    return trainer, model, build_data(config, inputs, tokenizer, folder)


def train_and_save(fields: dict[str, Any], architecture: Any, folder: Path, saved: Path) -> Any:
    """Trains two steps and saves weights, optimizer and context as a training run of NeMo leaves them; the model."""
    from nemo.lightning.io.pl import TrainerContext

    trainer, model, data = trainer_and_model(fields, architecture, folder, 2)
    trainer.fit(model, data)
    trainer.save_checkpoint(str(saved))
    TrainerContext.from_trainer(trainer).io_dump(saved / "context", yaml_attrs=["model"])
    return model


def restore(fields: dict[str, Any], architecture: Any, folder: Path, saved: Path, strictness: Any) -> Any:
    """NeMo's trainer restores a checkpoint and validates; the model."""
    from nemo.lightning.pytorch.strategies.utils import RestoreConfig

    trainer, model, data = trainer_and_model(fields, architecture, folder, 1)
    trainer.strategy.restore_config = RestoreConfig(path=str(saved), load_artifacts=False)
    trainer.strategy.ckpt_load_strictness = strictness
    trainer.validate(model, data, verbose=False)
    return model


def weights_of(model: Any) -> dict[str, Any]:
    """A model's own parameters by canonical names, of any layer spec."""
    import torch

    from nemo_minitron.megatron.weights import bare

    renamed = {}
    for name, value in bare(model).state_dict().items():
        if torch.is_tensor(value) and not name.endswith("_extra_state"):
            name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
            renamed[name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")] = value.clone()
    return renamed
