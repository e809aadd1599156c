"""NeMo's own trainer, its MegatronStrategy and its checkpoint files: read here bit for bit, and ours read there."""

from pathlib import Path

import torch

from nemo_minitron import config as c
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.checkpoints.convert import convert
from nemo_minitron.runtime.inputs import build_data, nemo_tokenizer, training_inputs
from nemo_minitron.runtime.layout import Layout

CPU = Layout(cuda=False, bf16=False)


def trainer_and_model(tiny, architecture, folder: Path, steps: int):
    """NeMo's trainer, its plain LlamaModel, and its data module."""
    from nemo.collections import llm

    from nemo_minitron.runtime.engine import build_trainer, model_config
    from nemo_minitron.runtime.training import optimizer

    config = c.FinetuneConfig(**tiny.training(folder, steps, restore_from_path=str(tiny.teacher)))
    inputs = training_inputs(config, architecture, None)
    tokenizer = nemo_tokenizer(inputs.tokenizer)
    model = llm.LlamaModel(
        model_config(architecture, CPU), optim=optimizer(config.model.optim, 2, 1.0, CPU), tokenizer=tokenizer
    )
    trainer = build_trainer(CPU, max_steps=steps, val_check_interval=steps, limit_val_batches=1)
    return trainer, model, build_data(config, inputs, tokenizer, folder)


def weights_of(model) -> dict[str, torch.Tensor]:
    """The model's own parameters by canonical names."""
    from nemo_minitron.runtime.weights import bare

    renamed = {}
    for name, value in bare(model).state_dict().items():
        if torch.is_tensor(value):
            name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
            renamed[name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")] = value.clone()
    return renamed


def test_what_nemos_trainer_saved_is_read_bit_for_bit(tiny, tmp_path):
    """Weights, optimizer state, random states and context, as a training run of NeMo leaves them."""
    from nemo.lightning.io.pl import TrainerContext

    from nemo_minitron.runtime.engine import engine

    architecture = open_checkpoint(tiny.teacher).architecture
    with engine(3, tmp_path / "log"):
        trainer, model, data = trainer_and_model(tiny, architecture, tmp_path / "run", 2)
        trainer.fit(model, data)
        trainer.save_checkpoint(str(tmp_path / "saved"))
        TrainerContext.from_trainer(trainer).io_dump(tmp_path / "saved" / "context", yaml_attrs=["model"])
        expected = weights_of(model)
    found = open_checkpoint(tmp_path / "saved")
    assert found.architecture == architecture
    assert found.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found.tensors[name].read(), value), name
    from nemo_minitron.checkpoints import torch_dist
    from nemo_minitron.checkpoints.files import folder_files

    keys = torch_dist.read_metadata(folder_files(tmp_path / "saved" / "weights")).state_dict_metadata
    assert any("optimizer" in key for key in keys)  # it was there, and passed over, as it is in a conversion:
    convert(c.ConvertConfig(source=str(tmp_path / "saved"), output=str(tmp_path / "converted"), to="hf"))


def test_nemos_trainer_restores_what_we_wrote_and_misses_nothing(tiny, tmp_path):
    from nemo.lightning.pytorch.strategies.utils import RestoreConfig

    from nemo_minitron.runtime.engine import engine

    convert(c.ConvertConfig(source=str(tiny.teacher), output=str(tmp_path / "t.nemo"), verify="none"))
    convert(c.ConvertConfig(source=str(tmp_path / "t.nemo"), output=str(tmp_path / "ours"), verify="none"))
    ours = open_checkpoint(tmp_path / "ours")
    with engine(4, tmp_path / "log"):
        trainer, model, data = trainer_and_model(tiny, ours.architecture, tmp_path / "run", 1)
        trainer.strategy.restore_config = RestoreConfig(path=str(tmp_path / "ours"), load_artifacts=False)
        trainer.strategy.ckpt_load_strictness = "raise_unexpected"  # what it asks for and does not find
        trainer.validate(model, data, verbose=False)
        restored = weights_of(model)
    assert restored.keys() == ours.tensors.keys()
    for name, value in restored.items():
        assert torch.equal(ours.tensors[name].read(), value), name
