"""Blocks of layers left out: losses and maps against transformers' model without those layers, in float64."""

import copy
import dataclasses
import itertools
import json
import re

import pytest
import torch

from hf import llama
from nemo_minitron.artifacts import DepthScan
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.data.samples import random_sequences
from nemo_minitron.errors import EngineError, MinitronError
from nemo_minitron.pruning.command import prune
from nemo_minitron.pruning.folders import scan_folder
from nemo_minitron.pruning.importance import blocks
from nemo_minitron.pruning.importance.blocks import (
    CHOICE_STRENGTH,
    LOWER_STRENGTHS,
    STRENGTHS,
    blocks_of,
    choice_cost,
    layers_of,
    runs,
    scan_layers,
)
from nemo_minitron.pruning.importance.paths import TEACHER, Path, PipelineStage, path_losses, run_moments
from nemo_minitron.pruning.importance.scan import cost, scan
from nemo_minitron.pruning.ridge import ridge

SAMPLES = 32


def scanning(tiny, folder, **targets):
    config = tiny.pruning(
        folder / "student", **{"depth_by": "block_loss", "num_block_samples": SAMPLES, "refit": "once", **targets}
    )
    config.prune.scores_path = str(folder / "scores")
    return config


@pytest.fixture(scope="module")
def scanned(tiny, tmp_path_factory):
    """A scan of all blocks of two layers."""
    config = scanning(tiny, tmp_path_factory.mktemp("scanned"), num_layers=2)
    scan(config)
    return config


def test_a_log_says_how_far_the_scan_is(tiny, tmp_path, capfd):
    scan(scanning(tiny, tmp_path, drop_layers=[3], num_block_samples=20))
    said = capfd.readouterr().err
    found = re.findall(r"depth scan, losses of 2 models: sample (\d+) of 20, [\d,]+ tokens/s, 0:\d\d left", said)
    assert found == ["8", "20"]


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
    return config, prune(config)


@pytest.fixture(scope="module")
def activations(reference):
    """m of every layer [tokens, h] and the streams x_0 .. x_(l-1) of the samples that maps are fitted to, float64."""
    model, sequences = reference
    outputs = []
    handles = [
        layer.mlp.register_forward_hook(lambda _, args, output: outputs.append(output.flatten(0, 1)))
        for layer in model.model.layers
    ]
    streams = []
    handles += [
        layer.register_forward_pre_hook(lambda _, args: streams.append(args[0].flatten(0, 1)))
        for layer in model.model.layers
    ]
    handles += [model.model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0].flatten(0, 1)))]
    with torch.no_grad():
        model(torch.cat([sequences[first : first + 3] for first in range(0, SAMPLES, 4)])[:, :-1], use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs, streams


def least_squares(activations, run, strength, weighted=False):
    """D of a run (first, end) by a factorisation of the rows themselves instead of their moments."""
    (outputs, streams), (first, end) = activations, run
    weight = 1 / streams[end].pow(2).mean(dim=1, keepdim=True).sqrt() if weighted else 1.0
    m, added = weight * outputs[first - 1], weight * (streams[end] - streams[first])
    width = m.shape[1]
    scale = (m.T @ m).diagonal().mean() * strength
    stacked = torch.cat([m, scale.sqrt() * torch.eye(width, dtype=m.dtype)])
    return torch.linalg.lstsq(stacked, torch.cat([added, torch.zeros(width, width, dtype=m.dtype)])).solution


def without(reference, activations, gone, strength=CHOICE_STRENGTH, weighted=False):
    """The student without the layers `gone` (from 0): a map folded into down_proj before each run of them."""
    student = copy.deepcopy(reference[0])
    for first, end in runs([layer + 1 for layer in gone]):
        if first > 0:
            weight = student.model.layers[first - 1].mlp.down_proj.weight
            weight.data += least_squares(activations, (first, end), strength, weighted).T @ weight.data
    return student


def test_maps_are_the_least_squares_of_what_the_block_added(given_layers, activations):
    config, _ = given_layers
    found = DepthScan.load(scan_folder(config))
    assert found.drop_layers == [2, 4] and set(found.folds) == {"1", "3"}
    for layer in (1, 3):
        expected = least_squares(activations, (layer, layer + 1), found.report["ridge"], found.report["ridge_weighted"])
        assert (found.folds[str(layer)] - expected).norm() < 1e-3 * expected.norm()


def test_the_losses_by_strength_and_weighting_are_those_of_the_folded_students(given_layers, reference, activations):
    report = DepthScan.load(scan_folder(given_layers[0])).report
    for entry in report["held_out_losses"][1::5]:
        student = without(reference, activations, [1, 3], entry["ridge"], entry["weighted"])
        assert entry["loss"] == pytest.approx(loss_without(student, [1, 3], reference[1][3::4]), rel=1e-4), entry


def test_the_map_never_loses_to_plain_dropping_on_held_out_samples(given_layers, scanned, chosen):
    for config in (given_layers[0], scanned, chosen[0]):
        report = DepthScan.load(scan_folder(config)).report
        losses = {(entry["ridge"], entry["weighted"]): entry["loss"] for entry in report["held_out_losses"]}
        strengths = {strength for strength, _ in losses}
        assert len(losses) == 2 * len(strengths) - 1 and strengths >= {None, *STRENGTHS}
        assert report["held_out_loss"] == min(losses.values()) <= losses[None, None] == report["held_out_loss_plain"]
        best = min(losses, key=losses.get)
        assert best == (report["ridge"], report["ridge_weighted"])
        assert report["ridge_inside_grid"] == (best[0] > min(strengths - {None}))
        assert report["ridge_inside_grid"] or best[0] == LOWER_STRENGTHS[-1]


def test_strengths_go_down_until_the_best_is_inside(monkeypatch):
    samples = blocks.Samples(all=[], fit=[], held_out=[], choice=[], batch=1)
    moments = blocks.RunMoments(gram=None, cross=None)
    monkeypatch.setattr(blocks, "run_moments", lambda *_: {((1, 2), False): moments, ((1, 2), True): moments})
    monkeypatch.setattr(blocks, "ridge", lambda gram, cross, strength: torch.full((1, 1), strength))

    def tried(loss):
        """Strengths that were tried with these losses by strength, and the report."""
        monkeypatch.setattr(
            blocks,
            "path_losses",
            lambda stage, sequences, batch, base, paths: [
                loss(float(path.maps[0])) if path.maps else 9.0 for path in paths
            ],
        )
        _, report = blocks._best_folds(None, samples, [(1, 2)])
        return [entry["ridge"] for entry in report["held_out_losses"][1::2]], report

    strengths, report = tried(lambda strength: abs(strength - 1e-3))
    assert strengths == list(STRENGTHS) and report["ridge"] == 1e-3 and report["ridge_inside_grid"]
    strengths, report = tried(lambda strength: 1.0 if strength > 5e-7 else 2.0)
    assert strengths == [*STRENGTHS] and report["ridge"] == 10.0 and report["ridge_inside_grid"]
    strengths, report = tried(lambda strength: strength if strength > 5e-7 else 1.0)
    assert strengths == [*STRENGTHS, LOWER_STRENGTHS[0]] and report["ridge"] == 1e-6 and report["ridge_inside_grid"]
    strengths, report = tried(lambda strength: strength)
    assert strengths == [*STRENGTHS, *LOWER_STRENGTHS] and report["ridge"] == LOWER_STRENGTHS[-1]
    assert not report["ridge_inside_grid"] and "1e-10" in report["ridge_note"]


@pytest.fixture(scope="module")
def chosen(tiny, tmp_path_factory):
    """Two of four layers chosen by the loss with maps in place."""
    config = scanning(
        tiny, tmp_path_factory.mktemp("chosen"), num_layers=2, method="compensated", depth_by="compensated_loss"
    )
    return config, prune(config)


def test_each_round_drops_the_layer_of_least_loss_with_maps_in_place(chosen, reference, activations):
    found = DepthScan.load(scan_folder(chosen[0]))
    held_out, gone = reference[1][3::4], []
    assert found.report["choice_samples"] == len(held_out)
    assert found.report["teacher_loss"] == pytest.approx(loss_without(reference[0], [], held_out), rel=1e-5)
    for entry in found.report["rounds"]:
        losses = {candidate["layer"]: candidate["loss"] for candidate in entry["candidates"]}
        assert list(losses) == [layer + 1 for layer in range(4) if layer not in gone]
        for layer, loss in losses.items():
            dropped = [*gone, layer - 1]
            expected = loss_without(without(reference, activations, dropped), dropped, held_out)
            assert loss == pytest.approx(expected, rel=1e-4), dropped
        assert entry["layer"] == min(losses, key=losses.get) and entry["loss"] == min(losses.values())
        gone.append(entry["layer"] - 1)
    assert found.drop_layers == sorted(layer + 1 for layer in gone) == chosen[1].metrics["dropped_layers"]
    assert [block["loss"] for block in found.blocks] == [
        candidate["loss"] for candidate in found.report["rounds"][0]["candidates"]
    ]


@pytest.fixture
def model(tiny, tmp_path):
    """The teacher as a Megatron model on one rank, to be run in this process."""
    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.layout import Layout
    from nemo_minitron.megatron.session import engine

    layout, teacher = Layout(cuda=False, bf16=False), open_checkpoint(tiny.teacher)
    with engine(1234, tmp_path / "log", cuda=False), parallel_ranks(layout, 1234):
        yield load_model(teacher.architecture, layout, teacher, local_spec=True)


def test_beams_of_all_sets_find_the_best_of_all(model, reference, activations):
    _, sequences = reference
    pairs = list(itertools.combinations(range(4), 2))
    losses = {pair: loss_without(without(reference, activations, pair), pair, sequences[3::4]) for pair in pairs}
    found = scan_layers(model, sequences, 8, 2, samples=8, beam=4)
    assert found.drop_layers == [layer + 1 for layer in min(losses, key=losses.get)]
    assert found.report["rounds"][-1]["loss"] == pytest.approx(min(losses.values()), rel=1e-4)


def test_paths_share_streams_and_have_the_losses_of_whole_models(model, reference, activations):
    stage, (_, sequences) = PipelineStage(model), reference
    maps = {layer: least_squares(activations, (layer + 1, layer + 2), 1e-3).float() for layer in range(3)}
    base = Path(skip=frozenset({2}), maps={1: maps[1]})
    paths = [
        TEACHER,
        base,
        Path(skip=frozenset({2, 3}), maps={1: maps[0]}),
        Path(skip=frozenset({0, 2}), maps={1: maps[1]}),
        Path(maps={3: maps[2]}),
    ]
    expected = []
    for path in paths:
        student = copy.deepcopy(reference[0])
        for layer, fold in path.maps.items():
            weight = student.model.layers[layer].mlp.down_proj.weight
            weight.data += fold.double().T @ weight.data
        expected.append(loss_without(student, path.skip, sequences))
    assert path_losses(stage, sequences, 5, base, paths) == pytest.approx(expected, rel=1e-5)
    assert path_losses(stage, sequences, 32, TEACHER, paths) == pytest.approx(expected, rel=1e-5)


def test_weighted_moments_are_those_of_weighted_rows(model, reference, activations):
    _, sequences = reference
    fit = torch.cat([sequences[first : first + 3] for first in range(0, SAMPLES, 4)])
    found = run_moments(PipelineStage(model), fit, 8, [(1, 3), (2, 3), (3, 4)], [False, True])
    for (run, weighted), moments in found.items():
        expected = least_squares(activations, run, 1e-2, weighted)
        assert (ridge(moments.gram, moments.cross, 1e-2) - expected).norm() < 1e-4 * expected.norm(), run


@pytest.mark.parametrize("count", [0, 1, 3])
def test_choosing_runs_as_many_layers_as_it_says(model, reference, monkeypatch, count):
    ran = []
    run, losses = PipelineStage.run, blocks.path_losses
    monkeypatch.setattr(blocks, "_best_folds", lambda *_: ({}, {}))
    monkeypatch.setattr(blocks, "run_moments", lambda stage, sequences, *_: run_moments(stage, sequences[:2], *_))

    def counted(*args):
        with monkeypatch.context() as patch:
            patch.setattr(PipelineStage, "run", lambda *called: ran.append(called[1]) or run(*called))
            return losses(*args)

    monkeypatch.setattr(blocks, "path_losses", counted)
    scan_layers(model, reference[1][:8], 8, count, samples=2)
    assert len(ran) == choice_cost(4, count)


def test_what_choosing_costs_is_said_before(tiny, chosen):
    # 4 for the teacher, then 3 + 6 with four layers left and 2 + 3 with three.
    assert choice_cost(4, 2) == 4 + 9 + 5 and choice_cost(4, 2, beam=2) == 4 + 9 + 2 * 5
    assert scan_folder(chosen[0]).name == "scores.depth-compensated-loss-2"
    beams = dataclasses.replace(chosen[0], prune=dataclasses.replace(chosen[0].prune, depth_beam=3))
    assert scan_folder(beams).name == "scores.depth-compensated-loss-2-beam-3"
    said = cost(4, chosen[0], 64)
    assert "2 of 4 layers" in said and "18 layer forwards on each of 8 x 64 tokens (36 samples" in said
    assert "48 samples through it to fit maps" in said


@pytest.mark.parametrize("made", ["given_layers", "chosen"])
def test_the_student_has_the_loss_that_was_promised(made, request, reference):
    config, manifest = request.getfixturevalue(made)
    student = llama(config.export.save_path, open_checkpoint(config.export.save_path).architecture).double()
    held_out = reference[1][3::4]
    assert loss_without(student, [], held_out) == pytest.approx(manifest.details["depth"]["held_out_loss"], rel=1e-4)
    assert manifest.details["depth"]["held_out_loss"] < manifest.details["depth"]["held_out_loss_plain"]


def test_the_first_layers_have_nothing_before_them_to_stand_in(tiny, tmp_path):
    config = scanning(tiny, tmp_path, drop_layers=[1], method="compensated")
    prune(config)
    found = DepthScan.load(scan_folder(config))
    assert not found.folds and found.report["ridge"] == "none: plain dropping is best"
    teacher, student = open_checkpoint(tiny.teacher), open_checkpoint(config.export.save_path)
    name = "decoder.layers.{}.mlp.linear_fc2.weight"
    assert torch.equal(student.tensors[name.format(0)].read(), teacher.tensors[name.format(1)].read())


@pytest.mark.usefixtures("forked_ranks")
def test_two_data_parallel_ranks_scan_as_one(tiny, scanned, tmp_path):
    config = scanning(tiny, tmp_path, num_layers=2)
    config.trainer.devices = 2
    scan(config)
    one, other = DepthScan.load(scan_folder(scanned)), DepthScan.load(scan_folder(config))
    assert one.drop_layers == other.drop_layers
    for block, same in zip(one.blocks, other.blocks):
        assert block["loss"] == pytest.approx(same["loss"], rel=1e-5)


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    ("devices", "targets"),
    [(2, {"num_layers": 2}), (4, {"num_layers": 1, "depth_by": "compensated_loss"})],
    ids=["two stages", "two stages of two ranks"],
)
def test_pipeline_ranks_scan_as_one(tiny, tmp_path, devices, targets):
    one = scanning(tiny, tmp_path / "one", **targets)
    other = scanning(tiny, tmp_path / "other", **targets)
    other.trainer.devices, other.model.pipeline_model_parallel_size = devices, 2
    scan(one)
    scan(other)
    found, same = DepthScan.load(scan_folder(one)), DepthScan.load(scan_folder(other))
    assert found.drop_layers == same.drop_layers and found.folds.keys() == same.folds.keys()
    assert flat(same.blocks) == pytest.approx(flat(found.blocks), rel=1e-5)
    assert flat(same.report) == pytest.approx(flat(found.report), rel=1e-4)
    assert flat(found.report, str) == flat(same.report, str)
    for layer in found.folds:
        assert (found.folds[layer] - same.folds[layer]).norm() < 1e-2 * found.folds[layer].norm()


def flat(value, kind=(int, float)) -> list:
    """Every number, or every value of another kind, in lists and dictionaries."""
    if isinstance(value, list | dict):
        return [one for part in (value.values() if isinstance(value, dict) else value) for one in flat(part, kind)]
    return [value] if isinstance(value, kind) else []


def test_a_depth_student_of_the_same_size_runs_nothing_again(tiny, scanned, tmp_path, monkeypatch):
    monkeypatch.setattr(PipelineStage, "run", pytest.fail)
    config = dataclasses.replace(scanned)
    config.export = dataclasses.replace(scanned.export, save_path=str(tmp_path / "student"))
    config.prune = dataclasses.replace(scanned.prune, method="compensated")
    manifest = prune(config)
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
