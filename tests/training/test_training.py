"""Training by the installed NeMo and Megatron Core does what the configuration says, whatever their versions."""

import dataclasses
import re

import pytest
import torch

from hf import read_weights
from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.names import canonical_shapes
from nemo_minitron.checkpoints.tensors import in_memory
from nemo_minitron.training.finetune import finetune

LR, DECAY = 1e-2, 0.5


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    """A checkpoint of the shared teacher's sizes with biases, all of it random."""
    architecture = dataclasses.replace(
        open_checkpoint(tiny.teacher).architecture, num_layers=2, add_bias_linear=True, add_qkv_bias=True
    )
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: in_memory(torch.randn(shape, generator=generator) * 0.1)
        for name, shape in canonical_shapes(architecture).items()
    }
    path = tmp_path_factory.mktemp("biases") / "start"
    write_checkpoint(path, "nemo2", architecture, tensors, None, {})
    return path


def after_one_step(tiny, start, output, decay) -> dict[str, torch.Tensor]:
    fields = tiny.training(output, 1, restore_from_path=str(start))
    fields["model"].optim = c.OptimConfig(lr=LR, weight_decay=decay, sched=c.SchedConfig(warmup_steps=0, min_lr=LR))
    finetune(c.FinetuneConfig(**fields))
    return read_weights(output)


def test_matrices_decay_and_biases_and_norms_do_not(tiny, start, tmp_path):
    """AdamW: one step with decay lies lr * decay * weight below one without, where the weight decays."""
    before = read_weights(start)
    without, with_decay = (after_one_step(tiny, start, tmp_path / str(decay), decay) for decay in (0.0, DECAY))
    kept = {name for name in before if torch.equal(without[name], with_decay[name])}
    assert kept == {name for name in before if name.endswith("bias") or "norm" in name}
    for name in before.keys() - kept:
        expected = without[name] - LR * DECAY * before[name]
        assert torch.allclose(with_decay[name], expected, rtol=0, atol=1e-6), name


def test_a_log_has_the_losses_of_the_history_and_the_speed(tiny, start, tmp_path, capfd):
    fields = tiny.training(tmp_path / "tuned", 5, restore_from_path=str(start))
    fields["trainer"].log_every_n_steps = 2
    fields["trainer"].val_check_interval = 3
    finetune(c.FinetuneConfig(**fields))
    out, said = capfd.readouterr()
    history = Manifest.read(tmp_path / "tuned").metrics
    pattern = r"tuned: step (\d) of 5, lm_loss (\S+), lr (\S+), [\d,]+ tokens/s, 0:\d\d left"
    steps = {int(match[1]): match for match in re.finditer(pattern, said)}
    assert list(steps) == [1, 2, 4, 5] and out == ""
    for entry in history["train"]:
        if entry["step"] in steps:
            assert steps[entry["step"]].groups()[1:] == (f"{entry['lm_loss']:.4f}", f"{entry['lr']:.1e}")
    [validation] = history["validation"]
    expected = f"tuned: validation after step 3, lm_loss {validation['lm_loss']:.4f}"
    assert expected in said.splitlines() and len(said.splitlines()) == 5
