"""Blocks of layers left out: losses and maps against transformers' model without those layers, in float64."""

import dataclasses
import json

import pytest
import torch

from hf import llama
from nemo_minitron import flow
from nemo_minitron.artifacts import DepthScan
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.data.samples import random_sequences
from nemo_minitron.errors import EngineError, MinitronError
from nemo_minitron.importance.blocks import STRENGTHS, blocks_of, layers_of, runs
from nemo_minitron.importance.scan import scan, scan_folder

SAMPLES = 32


def scanning(tiny, folder, **targets):
    config = tiny.pruning(folder / "student", **{"depth_by": "block_loss", "num_block_samples": SAMPLES, "refit": "once", **targets})
    config.prune.scores_path = str(folder / "scores")
    return config


@pytest.fixture(scope="module")
def scanned(tiny, tmp_path_factory):
    """A scan of all blocks of two layers."""
    config = scanning(tiny, tmp_path_factory.mktemp("scanned"), num_layers=2)
    scan(config)
    return config


@pytest.fixture(scope="module")
def reference(tiny):
    """transformers' model in float64, and the samples."""
    model = llama(tiny.teacher, open_checkpoint(tiny.teacher).architecture).double()
    sequences, _ = random_sequences([str(tiny.data / "train")], SAMPLES, 64, 1234)
    return model, sequences


def loss_without(model, gone, tokens) -> float:
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layer for number, layer in enumerate(layers) if number not in gone])
    try:
        with torch.no_grad():
            logits = model(tokens[:, :-1], use_cache=False).logits
    finally:
        model.model.layers = layers
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_runs_are_the_contiguous_parts():
    assert runs([2, 3, 6]) == [(1, 3), (5, 6)]
    assert runs([6, 3, 2]) == [(1, 3), (5, 6)] and runs([]) == []
    assert blocks_of(4, 2) == [(0, 2), (1, 3), (2, 4)]
    assert layers_of([(1, 3), (5, 6)]) == [2, 3, 6]


def test_the_loss_without_each_block_is_that_of_the_model_without_it(scanned, reference):
    found = DepthScan.load(scan_folder(scanned))
    model, sequences = reference
    assert [(block["first"], block["last"]) for block in found.blocks] == [(1, 2), (2, 3), (3, 4)]
    for block in found.blocks:
        expected = loss_without(model, range(block["first"] - 1, block["last"]), sequences)
        assert block["loss"] == pytest.approx(expected, rel=1e-5)
    assert found.report["teacher_loss"] == pytest.approx(loss_without(model, [], sequences), rel=1e-5)
    best = min(found.blocks, key=lambda block: block["loss"])
    assert found.drop_layers == [best["first"], best["last"]]


@pytest.fixture(scope="module")
def given_layers(tiny, tmp_path_factory):
    """Layers 2 and 4 of 4, which are two blocks."""
    config = scanning(tiny, tmp_path_factory.mktemp("given"), drop_layers=[2, 4], method="compensated")
    return config, flow.prune(config)


def test_maps_are_the_least_squares_of_what_the_block_added(given_layers, reference):
    config, _ = given_layers
    found = DepthScan.load(scan_folder(config))
    assert found.drop_layers == [2, 4] and set(found.folds) <= {"1", "3"}
    model, sequences = reference
    fit = torch.cat([sequences[first : first + 3] for first in range(0, SAMPLES, 4)])
    outputs = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: outputs.append(output))
    with torch.no_grad():
        states = model(fit[:, :-1], output_hidden_states=True).hidden_states
    handle.remove()
    m = outputs[0].flatten(0, 1)
    scale = (m.T @ m).diagonal().mean() * found.report["ridge"]
    width = m.shape[1]
    stacked = torch.cat([m, scale.sqrt() * torch.eye(width, dtype=m.dtype)])
    added = torch.cat([(states[2] - states[1]).flatten(0, 1), torch.zeros(width, width, dtype=m.dtype)])
    expected = torch.linalg.lstsq(stacked, added).solution
    assert (found.folds["1"] - expected).norm() < 1e-3 * expected.norm()


def test_the_map_never_loses_to_plain_dropping_on_held_out_samples(given_layers, scanned):
    for config in (given_layers[0], scanned):
        report = DepthScan.load(scan_folder(config)).report
        losses = {entry["ridge"]: entry["loss"] for entry in report["held_out_losses"]}
        assert set(losses) == {None, *STRENGTHS}
        assert report["held_out_loss"] == min(losses.values()) <= losses[None] == report["held_out_loss_plain"]


def test_the_student_has_the_loss_that_was_promised(given_layers, reference):
    config, manifest = given_layers
    student = llama(config.export.save_path, open_checkpoint(config.export.save_path).architecture).double()
    held_out = reference[1][3::4]
    assert loss_without(student, [], held_out) == pytest.approx(manifest.details["depth"]["held_out_loss"], rel=1e-4)
    assert manifest.details["depth"]["held_out_loss"] < manifest.details["depth"]["held_out_loss_plain"]


def test_the_first_layers_have_nothing_before_them_to_stand_in(tiny, tmp_path):
    config = scanning(tiny, tmp_path, drop_layers=[1], method="compensated")
    flow.prune(config)
    found = DepthScan.load(scan_folder(config))
    assert not found.folds and found.report["ridge"] == "none: plain dropping is best"
    teacher, student = open_checkpoint(tiny.teacher), open_checkpoint(config.export.save_path)
    name = "decoder.layers.{}.mlp.linear_fc2.weight"
    assert torch.equal(student.tensors[name.format(0)].read(), teacher.tensors[name.format(1)].read())


def test_two_data_parallel_ranks_scan_as_one(tiny, scanned, tmp_path):
    config = scanning(tiny, tmp_path, num_layers=2)
    config.trainer.devices = 2
    scan(config)
    one, other = DepthScan.load(scan_folder(scanned)), DepthScan.load(scan_folder(config))
    assert one.drop_layers == other.drop_layers
    for block, same in zip(one.blocks, other.blocks):
        assert block["loss"] == pytest.approx(same["loss"], rel=1e-5)


def test_a_depth_student_of_the_same_size_runs_nothing_again(tiny, scanned, tmp_path, monkeypatch):
    from nemo_minitron.importance import blocks

    monkeypatch.setattr(blocks, "_losses", pytest.fail)
    config = dataclasses.replace(scanned)
    config.export = dataclasses.replace(scanned.export, save_path=str(tmp_path / "student"))
    config.prune = dataclasses.replace(scanned.prune, method="compensated")
    manifest = flow.prune(config)
    assert manifest.metrics["dropped_layers"] == DepthScan.load(scan_folder(scanned)).drop_layers
    assert manifest.details["depth"]["blocks"] == DepthScan.load(scan_folder(scanned)).blocks
    json.dumps(manifest.details)


def test_too_few_samples_to_hold_any_out_are_refused(tiny, tmp_path):
    with pytest.raises(EngineError, match="num_block_samples = 3"):
        scan(scanning(tiny, tmp_path, num_layers=2, num_block_samples=3))
    assert not list(tmp_path.iterdir())


def test_a_damaged_scan_is_refused(scanned, tmp_path):
    file = scan_folder(scanned) / DepthScan.FILE
    (tmp_path / DepthScan.FILE).write_bytes(file.read_bytes()[:200])
    with pytest.raises(MinitronError, match="cannot be read"):
        DepthScan.load(tmp_path)
