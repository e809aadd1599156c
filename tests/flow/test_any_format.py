"""Every stage takes any format of checkpoint and makes any."""

import pytest
import torch

from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.conversion.convert import convert
from nemo_minitron.distillation.command import distill
from nemo_minitron.evaluation.loss import evaluate_loss
from nemo_minitron.pruning.command import prune
from nemo_minitron.training.finetune import finetune


@pytest.fixture(scope="module")
def teachers(tiny, tmp_path_factory) -> dict:
    """The shared teacher in every format."""
    folder = tmp_path_factory.mktemp("formats")
    found = {"nemo2": tiny.teacher, "nemo1": folder / "teacher.nemo", "hf": folder / "teacher-hf"}
    for form in ("nemo1", "hf"):
        convert(c.ConvertConfig(source=str(tiny.teacher), output=str(found[form]), to=form, verify="none"))
    return found


def same(one, other) -> None:
    first, second = open_checkpoint(one), open_checkpoint(other)
    assert first.architecture == second.architecture
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor.read(), second.tensors[name].read()), name


def test_the_loss_is_the_same_from_every_format(tiny, teachers, tmp_path):
    losses = set()
    for form, path in teachers.items():
        fields = tiny.training(tmp_path / form, restore_from_path=str(path))
        losses.add(evaluate_loss(c.LossConfig(**fields, limit_batches=1, splits=["test"])).metrics["test"]["loss"])
    assert len(losses) == 1


def test_the_cut_is_the_same_from_and_to_every_format(tiny, teachers, tmp_path):
    """`prune` of an archive into an archive is one job; the archive says how it was made."""
    outputs = {"nemo2": tmp_path / "nemo2", "nemo1": tmp_path / "cut.nemo", "hf": tmp_path / "hf"}
    for form, output in outputs.items():
        source = teachers["nemo1" if form == "nemo1" else "hf"]
        config = tiny.pruning(
            output, source, drop_layers=[2], hidden_size=96, scores_path=str(tmp_path / f"scores-{form}")
        )
        config.to = form
        prune(config)
        assert open_checkpoint(output).format == form
        assert Manifest.read(output).details["plan"]["drop_layers"] == [2]
    same(outputs["nemo1"], outputs["nemo2"])
    same(outputs["hf"], outputs["nemo2"])


def test_training_starts_from_and_ends_in_every_format(tiny, teachers, tmp_path):
    """finetune hf -> .nemo, distill student .nemo under teacher hf -> hf; equal to NeMo 2 throughout, bit for bit."""
    ways = {"nemo2": (tmp_path / "tuned", tmp_path / "distilled"), "mixed": (tmp_path / "t.nemo", tmp_path / "d-hf")}
    for way, (tuned, distilled) in ways.items():
        start = teachers["nemo2" if way == "nemo2" else "hf"]
        finetune(c.FinetuneConfig(**tiny.training(tuned, 2, restore_from_path=str(start))))
        fields = tiny.training(distilled, 2, restore_from_path=str(tuned), kd_teacher_restore_from_path=str(start))
        distill(c.DistillConfig(**fields, to=None if way == "nemo2" else "hf"))
    same(ways["nemo2"][0], ways["mixed"][0])
    assert (tmp_path / "t.nemo.logs" / "logs" / "engine.log").is_file()
    same(ways["nemo2"][1], ways["mixed"][1])
    assert not list((tmp_path / "d-hf").rglob("*.distcp"))
    assert open_checkpoint(tmp_path / "d-hf").tokenizer_files.files
