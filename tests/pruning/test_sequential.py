"""The refit in sequence: against float64 arithmetic on transformers' models, and what it must not change."""

import dataclasses
import json
import shutil

import pytest
import torch

from hf import llama
from nemo_minitron.artifacts import Manifest
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.config import validated
from nemo_minitron.data.samples import random_sequences
from nemo_minitron.errors import ConfigError, EngineError, OutputExistsError
from nemo_minitron.pruning.command import prune
from nemo_minitron.pruning.folders import refit_folder

SAMPLES = 32


def pruning(tiny, folder, **targets):
    config = tiny.pruning(folder / "student", **{"num_block_samples": SAMPLES, "method": "compensated", **targets})
    config.prune.scores_path = str(folder / "scores")
    return config


@pytest.fixture(scope="module")
def refitted(tiny, tmp_path_factory):
    """Folders of a student of half the layers and less width, as it is cut and refitted."""
    folder = tmp_path_factory.mktemp("refit")
    wanted = {"drop_layers": ["2-3"], "hidden_size": 64, "ffn_hidden_size": 128}
    once = pruning(tiny, folder, refit="once", **wanted)
    once.export.save_path = str(folder / "once")
    prune(once)
    config = pruning(tiny, folder, refit="sequential", **wanted)
    prune(config)
    return config, folder / "once", folder / "student"


def hf_model(folder):
    return llama(folder, open_checkpoint(folder).architecture).double()


def loss(model, tokens) -> float:
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_the_refitted_student_loses_less_than_the_cut(tiny, refitted):
    _, once, student = refitted
    held_out, _ = random_sequences([str(tiny.data / "validation")], 16, 64, 7)
    assert loss(hf_model(student), held_out) < loss(hf_model(once), held_out)


def test_the_cut_takes_the_neurons_that_the_refit_was_made_with(tiny, refitted, monkeypatch, tmp_path):
    """They are chosen once, and what is cut again from the same refit is the same, bit for bit, however it is asked."""
    from nemo_minitron.pruning import student as cutting

    config, _, student = refitted
    scores = student.parent / "scores"
    assert (config.prune.method, config.prune.refit, config.prune.scores_path) == (
        "compensated",
        "sequential",
        str(scores),
    )
    monkeypatch.setattr(cutting, "choose_by_saliency", pytest.fail)
    monkeypatch.chdir(scores.parent)
    otherwise = {"method": None, "refit": None, "hidden_size_divisor": 16, "scores_path": "scores"}
    again = dataclasses.replace(config, prune=dataclasses.replace(config.prune, **otherwise))
    again.export = dataclasses.replace(config.export, save_path=str(tmp_path / "again"))
    prune(again)
    assert len(list(scores.parent.glob("scores.refit-*"))) == 1
    before, after = (open_checkpoint(folder).tensors for folder in (student, tmp_path / "again"))
    assert all(torch.equal(before[name].read(), after[name].read()) for name in before)


def test_the_first_matrix_is_the_ridge_least_squares_one(tiny, refitted):
    """linear_qkv of layer 1, from nothing but the cut student, the teacher and the samples."""
    config, once, student = refitted
    entry = Manifest.read(refit_folder(config)).details["matrices"][0]
    assert entry["matrix"] == "self_attention.linear_qkv" and entry["layer"] == 1
    sequences, _ = random_sequences([str(tiny.data / "train")], SAMPLES, 64, config.seed)
    teacher, cut, found = hf_model(tiny.teacher), hf_model(once), hf_model(student)
    layers = [model.model.layers[0] for model in (teacher, cut, found)]
    with torch.no_grad():
        reads, read = (
            layer.input_layernorm(model.model.embed_tokens(sequences[:, :-1])).flatten(0, 1)
            for layer, model in zip(layers, (teacher, cut))
        )
    for name in ("q_proj", "k_proj", "v_proj"):
        whole, before, after = (getattr(layer.self_attn, name).weight.detach() for layer in layers)
        error = reads @ whole.T - read @ before.T
        # One strength for q, k and v: rows of the square root of lambda, lambda = ridge * mean of the diagonal.
        root = (entry["ridge"] * read.square().sum(0).mean()).sqrt()
        rows = torch.cat([read, root * torch.eye(read.shape[1], dtype=torch.float64)])
        target = torch.cat([error, torch.zeros(read.shape[1], error.shape[1], dtype=torch.float64)])
        expected = before + torch.linalg.lstsq(rows, target).solution.T
        assert (after - expected).abs().max() < 2e-4 * expected.abs().max(), name


def test_a_refit_of_a_version_whose_norms_kept_another_size_is_refused(refitted, tmp_path):
    """Its matrices and this version's norms are not of one model."""
    config, _, student = refitted
    shutil.copytree(student.parent, tmp_path / "old")
    old = dataclasses.replace(config, prune=dataclasses.replace(config.prune, scores_path=str(tmp_path / "old/scores")))
    old.export = dataclasses.replace(config.export, save_path=str(tmp_path / "student"))
    place = next((tmp_path / "old").glob("scores.refit-*")).rename(refit_folder(old)) / "manifest.json"
    manifest = json.loads(place.read_text())
    del manifest["config"]["compensation"]["norms"]
    place.write_text(json.dumps(manifest | {"key": "of a version before"}))
    with pytest.raises(OutputExistsError, match="norms"):
        prune(old)
    assert not (tmp_path / "student").exists()


@pytest.mark.usefixtures("forked_ranks")
def test_two_ranks_refit_as_one(tiny, refitted, tmp_path):
    config, _, student = refitted
    other = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, devices=2))
    other.model = dataclasses.replace(config.model, pipeline_model_parallel_size=2)  # scoring is not data parallel
    other.prune = dataclasses.replace(config.prune, scores_path=str(tmp_path / "scores"))
    other.export = dataclasses.replace(config.export, save_path=str(tmp_path / "student"))
    other.inference = dataclasses.replace(config.inference, batch_size=1)
    prune(other)
    matrices = Manifest.read(refit_folder(other)).details["matrices"]
    assert len(matrices) == 8 and all(entry["left"] <= 1.0 for entry in matrices)
    held_out, _ = random_sequences([str(tiny.data / "validation")], 16, 64, 7)
    one, two = (loss(hf_model(folder), held_out) for folder in (student, tmp_path / "student"))
    assert one == pytest.approx(two, rel=0.02)  # other samples are held out, so other strengths may be best


def test_a_matrix_without_error_is_left_as_it_is():
    from nemo_minitron.pruning.sequential import _Moments, best_change

    inputs, nothing = torch.randn(64, 8), torch.zeros(64, 4)
    moments = [_Moments(), _Moments()]
    for part in moments:
        part.add(inputs, nothing)
    change, strength, left = best_change(*moments)
    assert strength is None and left == 1.0 and not change.any()


def test_what_cannot_be_is_said_before_any_work(tiny, tmp_path):
    with pytest.raises(EngineError, match="num_block_samples = 3"):
        prune(pruning(tiny, tmp_path, hidden_size=64, num_block_samples=3))
    with pytest.raises(ConfigError, match="refit=sequential is part of prune.method=compensated"):
        validated(pruning(tiny, tmp_path, hidden_size=64, method="minitron", refit="sequential"))
    without = pruning(tiny, tmp_path, hidden_size=64, refit="sequential")
    without.model.data = dataclasses.replace(without.model.data, data_prefix=None)
    with pytest.raises(ConfigError, match="refit=sequential needs text to run on"):
        validated(without)
    assert not (tmp_path / "student").exists()
