"""A search on the tiny teacher: what its cuts lose, how rounds go on, what it leaves, and resuming."""

import json
from pathlib import Path

import pytest
from conftest import GRID, SEQ_LENGTH

from nemo_minitron import config as c
from nemo_minitron.checkpoints.checkpoint import open_checkpoint
from nemo_minitron.search.command import search
from nemo_minitron.search.measuring import prune_config
from nemo_minitron.search.rounds import kendall_tau, schedule, total_steps
from nemo_minitron.search.space import name_of, sizes_of
from nemo_minitron.search.task import resolved


def settings(tiny, output, **searched) -> c.SearchConfig:
    fields = tiny.training(output, restore_from_path=str(tiny.teacher))
    fields["model"].nemo_path = None
    return c.validated(
        c.SearchConfig(
            output=str(output),
            search=c.SearchSettings(
                **{"parameters": "60%", "tolerance": 0.1, "measured": 6, "candidates": 3, "steps": 2, "samples": 8}
                | searched
            ),
            prune=c.SearchCutConfig(num_samples=16, num_block_samples=8, **GRID),
            **fields,
        )
    )


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory):
    config = settings(tiny, tmp_path_factory.mktemp("search") / "found")
    search(config)
    return config, json.loads((Path(config.output) / "search.json").read_text())


def test_the_losses_of_cuts_are_those_of_the_checkpoints_that_prune_makes(tiny, found, tmp_path):
    """Shared scores, costs and maps change no cut: prune alone makes one of the same loss on the same windows."""
    from nemo_minitron.data.samples import consecutive_sequences
    from nemo_minitron.evaluation.loss import mean_loss
    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.layout import layout_of
    from nemo_minitron.megatron.session import engine
    from nemo_minitron.pruning.command import prune

    config, result = found
    task = resolved(config)
    names = {entry["name"]: entry["loss"] for entry in result["shapes"] if entry["loss"] is not None}
    shapes = [shape for name, shape in task.by_name().items() if name in names]
    chosen = [next(shape for shape in shapes if shape.num_layers < 4), max(shapes, key=lambda one: one.num_layers)]
    held_out = consecutive_sequences([str(tiny.data / "validation")], SEQ_LENGTH, 8)
    for number, shape in enumerate(chosen):
        cut = prune_config(config, sizes_of(shape, task.teacher.architecture), str(tmp_path / str(number)))
        cut.prune.scores_path = str(tmp_path / f"scores-{number}")
        prune(cut)
        student = open_checkpoint(tmp_path / str(number))
        layout = layout_of(config.trainer, config.model)
        with engine(1, tmp_path / "log", cuda=False), parallel_ranks(layout, 1):
            loss = mean_loss(load_model(student.architecture, layout, student), held_out, 8)
        assert names[name_of(shape)] == pytest.approx(loss, abs=1e-5)


def test_the_winner_is_an_ordinary_checkpoint_within_the_budget(tiny, found):
    config, result = found
    teacher, student = open_checkpoint(tiny.teacher), open_checkpoint(f"{config.output}/student")
    assert abs(student.architecture.parameters() / (0.6 * teacher.architecture.parameters()) - 1) <= 0.1
    assert result["winner"]["architecture"] == student.architecture.to_dict()
    last = result["rounds"][-1]
    assert result["winner"]["name"] == min(last["losses"], key=last["losses"].get)
    assert result["winner"]["loss"] < result["rounds"][0]["losses"][result["winner"]["name"]] + 0.5


def test_the_better_half_goes_on_and_the_best_cuts_begin(found):
    _, result = found
    losses = {entry["name"]: entry["loss"] for entry in result["shapes"] if entry["predicted"] is not None}
    measured = {name: loss for name, loss in losses.items() if loss is not None}
    first = result["rounds"][0]["losses"]
    assert sorted(first) == sorted(sorted(measured, key=measured.get)[:3])
    for before, after in zip(result["rounds"], result["rounds"][1:]):
        assert sorted(after["losses"]) == sorted(before["stay"])
        assert before["stay"] == sorted(before["losses"], key=before["losses"].get)[: len(before["stay"])]


def test_rounds_halve_and_double():
    rounds = schedule(16, 1, 40)
    assert [(one.candidates, one.steps) for one in rounds] == [(16, 40), (8, 80), (4, 160), (2, 320)]
    assert total_steps(rounds) == 4 * 640
    assert [(one.candidates, one.steps) for one in schedule(3, 3, 10)] == [(3, 10)]
    assert [(one.candidates, one.steps) for one in schedule(5, 2, 10)] == [(5, 10), (3, 20)]


def test_kendalls_tau_is_scipys():
    from scipy.stats import kendalltau

    first = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 4.0}
    second = {"a": 1.5, "b": 1.0, "c": 3.0, "d": 2.0, "e": 5.0, "f": 0.0}
    shared = sorted(first.keys() & second.keys())
    expected = kendalltau([first[name] for name in shared], [second[name] for name in shared]).statistic
    assert kendall_tau(first, second) == pytest.approx(expected)
    assert kendall_tau({"a": 1.0}, second) is None
