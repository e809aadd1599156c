"""NeMo's own trainer, its MegatronStrategy and its checkpoint files: read here bit for bit, and ours read there."""

import torch

from nemo_minitron import config as c
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.checkpoints.files import folder_files
from nemo_minitron.checkpoints.storage import torch_dist
from nemo_minitron.conversion.convert import convert
from nemo_trainer import restore, train_and_save, weights_of


def test_what_nemos_trainer_saved_is_read_bit_for_bit(tiny, tmp_path):
    """Weights, optimizer state, random states and context, as a training run of NeMo leaves them."""
    from nemo_minitron.megatron.session import engine

    architecture = open_checkpoint(tiny.teacher).architecture
    fields = tiny.training(tmp_path / "run", 2, restore_from_path=str(tiny.teacher))
    with engine(3, tmp_path / "log"):
        expected = weights_of(train_and_save(fields, architecture, tmp_path / "run", tmp_path / "saved"))
    found = open_checkpoint(tmp_path / "saved")
    assert found.architecture == architecture
    assert found.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found.tensors[name].read(), value), name
    keys = torch_dist.read_metadata(folder_files(tmp_path / "saved" / "weights")).state_dict_metadata
    assert any("optimizer" in key for key in keys)  # it was there, and passed over, as it is in a conversion:
    convert(c.ConvertConfig(source=str(tmp_path / "saved"), output=str(tmp_path / "converted"), to="hf"))


def test_nemos_trainer_restores_what_we_wrote_and_misses_nothing(tiny, tmp_path):
    from nemo_minitron.megatron.session import engine

    convert(c.ConvertConfig(source=str(tiny.teacher), output=str(tmp_path / "t.nemo"), verify="none"))
    convert(c.ConvertConfig(source=str(tmp_path / "t.nemo"), output=str(tmp_path / "ours"), verify="none"))
    ours = open_checkpoint(tmp_path / "ours")
    fields = tiny.training(tmp_path / "run", 1, restore_from_path=str(tiny.teacher))
    with engine(4, tmp_path / "log"):
        model = restore(fields, ours.architecture, tmp_path / "run", tmp_path / "ours", "raise_unexpected")
        restored = weights_of(model)
    assert restored.keys() == ours.tensors.keys()
    for name, value in restored.items():
        assert torch.equal(ours.tensors[name].read(), value), name
