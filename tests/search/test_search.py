"""A search on the tiny teacher: what its cuts lose, how rounds go on, what it leaves, and resuming."""

import json
import shutil
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
    from nemo_minitron.data.samples import random_sequences
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
    held_out, _ = random_sequences([str(tiny.data / "validation")], 8, SEQ_LENGTH, config.seed)
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
    assert last["ranked_by"] == "kd_loss"
    assert last["losses"] == {name: losses["kd_loss"] for name, losses in last["validation"].items()}
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


def test_the_finalists_are_measured_beside_the_teacher(tiny, found):
    """Losses as evaluate_loss has them; bytes by the formula; speeds as ratios to the teacher's own."""
    from nemo_minitron.evaluation.loss import evaluate_loss

    config, result = found
    teacher, best = result["finalists"][0], result["finalists"][1]
    assert [teacher["name"], best["name"]] == ["teacher", result["winner"]["name"]]
    fields = tiny.training(Path(config.output) / "evaluation", restore_from_path=f"{config.output}/student")
    fields["trainer"].limit_val_batches = 1
    measured = evaluate_loss(c.LossConfig(**fields, limit_batches=2)).metrics
    assert best["validation_loss"] == pytest.approx(measured["validation"]["loss"], abs=1e-6)
    assert best["test_loss"] == pytest.approx(measured["test"]["loss"], abs=1e-6)
    assert teacher["memory_bytes"] / 2 > teacher["parameters"] > best["parameters"]
    assert teacher["speed"]["prefill"]["of_teacher"] == 1.0 and best["speed"]["decode"]["tokens_per_second"] > 0
    assert best["speed"]["decode"]["predicted"] is None and result["speed_errors"] == {}


def test_another_budget_measures_no_cut_again(tiny, found, tmp_path, monkeypatch):
    """Scores, maps and losses are kept beside prune.scores_path. The second ranks by the text's loss."""
    from nemo_minitron.evaluation import loss
    from nemo_minitron.pruning.importance import blocks

    first = settings(tiny, tmp_path / "first", candidates=2, steps=1, measured=3, speed_rounds=0)
    first.prune.scores_path = str(tmp_path / "scores")
    search(first)
    again = settings(tiny, tmp_path / "again", candidates=2, steps=1, measured=3, speed_rounds=0)
    again.prune.scores_path, again.seed, again.prune.seed = str(tmp_path / "scores"), 7, first.seed
    again.search.rank_by = "lm_loss"
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "fit_blocks", None)
        measured = []
        original = loss.mean_loss
        patch.setattr(loss, "mean_loss", lambda *given, **named: measured.append(1) or original(*given, **named))
        search(again)
    assert len(measured) == 4  # teacher and winner, on validation and test
    one, other = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("first", "again"))
    assert one["shapes"] == other["shapes"]
    [ranked], [other_ranked] = one["rounds"], other["rounds"]
    assert ranked["validation"] != other_ranked["validation"]
    assert other_ranked["losses"] == {name: losses["lm_loss"] for name, losses in other_ranked["validation"].items()}
    assert other["winner"]["name"] == min(other_ranked["losses"], key=other_ranked["losses"].get)


@pytest.mark.usefixtures("forked_ranks")
def test_two_ranks_find_what_one_finds(tiny, found, tmp_path):
    config, alone = found
    shared = settings(tiny, tmp_path / "shared", speed_rounds=0)
    shared.trainer.devices, shared.prune.scores_path = 2, str(tmp_path / "scores")
    shutil.copytree(Path(config.output) / "scores", tmp_path / "scores")
    search(shared)
    result = json.loads((tmp_path / "shared" / "search.json").read_text())
    losses = {entry["name"]: entry["loss"] for entry in alone["shapes"] if entry["loss"] is not None}
    others = {entry["name"]: entry["loss"] for entry in result["shapes"] if entry["loss"] is not None}
    assert others == pytest.approx(losses, abs=1e-3)
    assert result["rounds"][-1]["losses"] == pytest.approx(alone["rounds"][-1]["losses"], abs=5e-3)
    assert open_checkpoint(tmp_path / "shared" / "student").architecture.to_dict() == result["winner"]["architecture"]
    assert not [path for path in (tmp_path / "shared").iterdir() if path.name.startswith(".")]


def test_what_cannot_be_is_said_before_any_work(tiny, tmp_path, monkeypatch):
    """Scores of another teacher, no validation text, a budget that no shape meets: nothing is written."""
    from nemo_minitron.errors import ConfigError, MinitronError

    output = tmp_path / "out"
    config = settings(tiny, output)
    config.prune.scores_path = str(tmp_path / "scores")
    for wrong, message in (
        ({"parameters": "100%"}, "is no cut: the teacher has"),
        ({"parameters": "1%"}, "below the smallest shape"),
        ({"parameters": "60%", "num_layers": [4, 4], "tolerance": 1e-6}, "nearest: l4"),
    ):
        with pytest.raises(ConfigError, match=message):
            search(settings(tiny, output, **wrong))
    (tmp_path / "few").mkdir()
    for split in ("train", "test"):
        for end in ("bin", "idx"):
            (tmp_path / "few" / f"{split}.{end}").write_bytes((tiny.data / f"{split}.{end}").read_bytes())
    few = settings(tiny, output)
    few.model.data.data_prefix = str(tmp_path / "few")
    with pytest.raises(MinitronError, match="validation"):
        search(few)
    assert not output.exists() and not list(tmp_path.glob(".out*"))


def test_scores_of_another_teacher_are_refused_before_any_work(tiny, found, tmp_path):
    from nemo_minitron.errors import MinitronError
    from nemo_minitron.pruning.command import prune

    student = tmp_path / "student"
    cut = tiny.pruning(student, drop_layers=[2])
    prune(cut)
    other = prune_config(settings(tiny, tmp_path / "out"), {"hidden_size": 96}, str(tmp_path / "cut"))
    other.prune.scores_path = str(tmp_path / "scores")
    prune(other)
    config = settings(tiny, tmp_path / "out")
    config.model.restore_from_path, config.prune.scores_path = str(student), str(tmp_path / "scores")
    with pytest.raises(MinitronError, match="another"):
        search(config)
    assert not (tmp_path / "out").exists()


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
