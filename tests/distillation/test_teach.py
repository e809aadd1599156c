"""A teacher's answers, kept and read back: against the teacher that runs, and against float64 arithmetic."""

import dataclasses
import json
import shutil

import numpy
import pytest
import torch

from hf import llama, read_weights
from nemo_minitron import config as c
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.distillation.command import distill
from nemo_minitron.distillation.teach.command import teach
from nemo_minitron.errors import ConfigError, DataError, MinitronError
from nemo_minitron.pruning.command import prune

STEPS = 3


@pytest.fixture(scope="module")
def student(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("students") / "student"
    prune(tiny.pruning(path, hidden_size=96, ffn_hidden_size=192, drop_layers=[3]))
    return path


def teaching(tiny, output, keep="hidden", tokens=STEPS * 8 * 64, **settings) -> c.TeachConfig:
    fields = tiny.training(output, restore_from_path=str(tiny.teacher))
    return c.validated(c.TeachConfig(**fields, teach=c.AnswersConfig(keep=keep, tokens=tokens, **settings)))


@pytest.fixture(scope="module")
def kept(tiny, tmp_path_factory):
    """Folders of answers by what is kept, each with its manifest."""
    root, made = tmp_path_factory.mktemp("kept"), {}

    def make(name):
        if name not in made:
            keep, _, precision = name.partition("-")
            settings = {"precision": precision} if precision else {}
            made[name] = root / name, teach(teaching(tiny, root / name, keep, **settings))
        return made[name]

    return make


def distilling(tiny, student, output, live=False, steps=STEPS, kd=None, **model) -> c.DistillConfig:
    """A run on fixed windows; with `live` the teacher runs."""
    if live:
        model["kd_teacher_restore_from_path"] = str(tiny.teacher)
    fields = tiny.training(output, steps, restore_from_path=str(student), **model)
    fields["model"].data.windows = "fixed"
    return c.validated(c.DistillConfig(**fields, kd=c.KDConfig(**(kd or {}))))


@pytest.fixture(scope="module")
def live(tiny, student, tmp_path_factory):
    """What the teacher that runs gives."""
    path = tmp_path_factory.mktemp("live") / "live"
    return path, distill(distilling(tiny, student, path, live=True))


def same_weights(one, two) -> bool:
    first, second = read_weights(one), read_weights(two)
    return first.keys() == second.keys() and all(torch.equal(second[name], value) for name, value in first.items())


def losses(manifest):
    return [entry["kd_loss"] for split in ("train", "validation") for entry in manifest.metrics[split]]


def test_hidden_states_in_fp32_give_the_live_teachers_run_bit_for_bit(tiny, student, kept, live, tmp_path):
    folder, manifest = kept("hidden-fp32")
    path, expected = live
    got = distill(distilling(tiny, student, tmp_path / "kept", kd={"teacher": str(folder)}))
    assert got.metrics["train"] == expected.metrics["train"]
    assert got.metrics["validation"] == expected.metrics["validation"]
    assert same_weights(path, tmp_path / "kept")
    assert manifest.metrics["relative_error"] == 0.0 and manifest.metrics["samples"] == STEPS * 8 + 16
    assert "teacher" not in got.inputs and got.inputs["answers0"]["path"] == str(folder)
