"""The page of a search: its pictures show search.json's numbers, a damaged file is said and crashes nothing."""

import copy
import json
import math
import random

import pytest

import made_runs
from nemo_minitron.cli import main as cli
from nemo_minitron.report import search_figures
from nemo_minitron.report.collect import collect
from nemo_minitron.report.pictures import drawn, pictures_of
from nemo_minitron.report.searching import candidate_cells, finalist_cells, front, rival_cells, search_of
from nemo_minitron.report.style import LIGHT

HOSTILE = "</td><script>alert(1)</script>$\\frac{\x00\ud800"
PICTURES = ["search-losses", "search-ranks", "search-correlations"]


def found(candidates: int = 16) -> dict:
    """A search.json as `minitron search` writes it; the numbers are invented."""
    draw = random.Random(3)
    shapes = []
    for index in range(240):
        layers, hidden = 14 + index % 17, 320 + 32 * (index // 17 % 8)
        name = f"l{layers}-h{hidden}-f{768 + 64 * (index % 9)}-a{6 + index % 4}"
        depth = abs(layers - 23) / 6
        predicted = 3.9 + 0.5 * depth**2 + draw.gauss(0, 0.15)
        shapes.append({"name": name, "parameters": 80_700_000 + draw.randrange(-4_000_000, 4_000_000), "load": 1.0,
                       "loss": None, "predicted": predicted})  # fmt: skip
    shapes.sort(key=lambda shape: shape["predicted"])
    for shape in shapes[:64]:
        shape["loss"] = shape["predicted"] + draw.gauss(0, 0.1)
    measured = sorted(shapes[:64], key=lambda shape: shape["loss"])
    rivals = {}
    for what, loss in (("uniform", 4.6), ("depth", 5.4), ("width", 4.9), ("published", None)):
        name = f"{what[0]}20-h448-f1152-a7"
        shapes.append({"name": name, "parameters": 79_500_000 + 400_000 * len(rivals), "load": 0.99, "loss": loss,
                       "predicted": None})  # fmt: skip
        rivals[what] = {name_: shapes[-1][name_] for name_ in ("name", "loss", "parameters")}
    names, losses, rounds = [shape["name"] for shape in measured[:candidates]], {}, []
    for name, shape in zip(names, measured):
        losses[name] = 0.4 * shape["loss"] - 0.9
    while len(names) > 1:
        number = len(rounds) + 1
        losses = {name: losses[name] * 0.9 + draw.gauss(0, 0.02 / number) for name in names}
        names = sorted(names, key=losses.__getitem__)[: max(1, len(names) // 2)]
        rounds.append({"number": number, "steps": 20 * 2**number, "losses": losses, "stay": names, "seconds": 100.0})
    winner = next(shape for shape in shapes if shape["name"] == names[0])
    finalists = [
        {"name": "teacher", "parameters": 134_515_008, "validation_loss": 2.98, "test_loss": 2.95,
         "memory_bytes": 300e6, "speed": {"decode": {"tokens_per_second": 40.0, "of_teacher": 1.0, "predicted": 1.0}}},
        {"name": names[0], "parameters": winner["parameters"], "validation_loss": 3.4, "test_loss": 3.375,
         "memory_bytes": 180e6, "speed": {"decode": {"tokens_per_second": 64.0, "of_teacher": 1.6, "predicted": 1.68}}},
    ]  # fmt: skip
    return {
        "teacher": {"architecture": made_runs.TEACHER.to_dict(), "parameters": 134_515_008, "loss": 3.01},
        "budgets": [{"name": "parameters", "limit": 80_709_004.8, "teacher": 134_515_008}],
        "space": {"shapes": 9000, "within": 240, "choices": {"num_layers": [14, 15]}},
        "shapes": shapes,
        "rounds": rounds,
        "kendall_tau": {
            f"{before} to {after}": tau
            for (before, after), tau in {
                ("cut", "round 1"): 0.45, ("cut", "round 2"): 0.29, ("cut", "round 3"): -0.33, ("cut", "round 4"): None,
                ("round 1", "round 2"): 0.71, ("round 1", "round 3"): 0.33, ("round 1", "round 4"): 1.0,
                ("round 2", "round 3"): 0.67, ("round 2", "round 4"): 1.0, ("round 3", "round 4"): 1.0,
            }.items()
        },
        "rivals": rivals,
        "winner": {"name": names[0], "architecture": {}, "parameters": winner["parameters"],
                   "loss": losses[names[0]], "cut_loss": winner["loss"]},
        "finalists": finalists,
        "seconds": {"cuts_seconds": 640.0},
    }  # fmt: skip


def write(folder, told) -> None:
    """A search's folder, with the winner's own beneath."""
    made_runs.stage(folder, "search", 5, config={"kd": {"kd_weight": 1.0}}, metrics={"winner": "l", "shapes": 240})
    made_runs.stage(folder / "student", "distill", 4, metrics=made_runs.history(2.0, kd=True))
    if told is not None:
        (folder / "search.json").write_text(told if isinstance(told, str) else json.dumps(told))


@pytest.fixture
def told():
    return found()


@pytest.fixture
def search(told):
    missing: list[str] = []
    read = search_of(told, {"kd": {"kd_weight": 1.0}}, "search.json", missing)
    assert missing == [] and read["loss"] == "kd_loss"
    stated = {"kd": {"kd_weight": 1.0}, "search": {"rank_by": "lm_loss"}}
    assert search_of(told, stated, "search.json", missing)["loss"] == "lm_loss"
    return read


def line(axes, label: str) -> tuple[list, list]:
    (found,) = [line for line in axes.lines if line.get_label().startswith(label)]
    return list(found.get_xdata()), list(found.get_ydata())


def test_a_search_becomes_a_page(tmp_path, told):
    write(tmp_path / "search", told)
    assert cli.main(["report", str(tmp_path / "search")]) == 0
    report = json.loads((tmp_path / "search" / "report.json").read_text())
    assert [picture["name"] for picture in report["pictures"]] == [*PICTURES, "cost"] and report["missing"] == []
    page = (tmp_path / "search" / "report.html").read_text()
    winner = told["winner"]["name"]
    for text in (winner, "parameters at most 80.71M (60% of the teacher", "240 within the budget", "KD loss, round 4",
                 "1.60x", "1.68x", "+5.0%", "not measured", "3.3750"):  # fmt: skip
        assert text in page, text
    assert report["searches"][""]["winner"]["cut_loss"] == told["winner"]["cut_loss"]


def test_a_search_among_other_stages_is_found_and_its_parts_are_not_counted_twice(tmp_path, told):
    run = made_runs.small(tmp_path / "run")
    write(run / "best-search", told)
    write(run / "other" / "search", told)
    found = collect(run)
    assert list(found["searches"]) == ["best-search", "other/search"]
    assert not [sentence for sentence in found["missing"] if "search" in sentence]
    folders = [stage["folder"] for stage in found["stages"]]
    assert "best-search" in folders and not [folder for folder in folders if folder.endswith("student")]
    pictures = pictures_of(found)
    assert [picture.name for picture in pictures if picture.section == "search"] == [
        *PICTURES, *(f"{name}-2" for name in PICTURES)
    ]  # fmt: skip
    assert all(picture.caption.startswith(("best-search: ", "other/search: ")) for picture in pictures
               if picture.section == "search")  # fmt: skip
    assert cli.main(["report", str(run)]) == 0
    assert "best-search: Winner" in (run / "report.html").read_text()


def test_losses_are_the_searchs(told, search):
    axes = search_figures.loss_against_parameters(search, theme=LIGHT).axes[0]
    measured = [shape for shape in told["shapes"] if shape["loss"] is not None]
    assert sorted(line(axes, "cut")[1]) == sorted(shape["loss"] for shape in measured)
    guessed = [shape["predicted"] for shape in told["shapes"] if shape["loss"] is None and shape["predicted"]]
    assert sorted(line(axes, "predicted")[1]) == sorted(guessed)
    # By hand: of each shape of the front, no other is as small and as good.
    best = {shape["loss"] for shape in measured if not any(
        other is not shape and other["parameters"] <= shape["parameters"] and other["loss"] <= shape["loss"]
        for other in measured)}  # fmt: skip
    assert set(line(axes, "front")[1]) == best and len(best) > 1
    assert line(axes, "teacher")[1] == [3.01, 3.01]
    for what in ("uniform", "depth", "width"):
        rival = told["rivals"][what]
        assert line(axes, what) == ([rival["parameters"] / 1e6], [rival["loss"]])
    assert not [one for one in axes.lines if one.get_label().startswith("published")]
    winner = told["winner"]
    assert line(axes, "winner, cut") == ([winner["parameters"] / 1e6], [winner["cut_loss"]])
    assert line(axes, "winner, distilled") == ([winner["parameters"] / 1e6], [3.4])


def test_ranks_are_those_of_the_losses(told, search):
    axes = search_figures.rank_changes(search, theme=LIGHT).axes[0]
    cuts = {shape["name"]: shape["loss"] for shape in told["shapes"]}
    rungs = [{name: cuts[name] for name in told["rounds"][0]["losses"]}, *(one["losses"] for one in told["rounds"])]
    assert len(axes.lines) == 16 and len(rungs) == 5
    for one in axes.lines:
        name = one.get_label().removeprefix("_")
        there = [losses for losses in rungs if name in losses]
        assert list(one.get_xdata()) == list(range(len(there)))
        assert list(one.get_ydata()) == [sorted(losses.values()).index(losses[name]) + 1 for losses in there]


def test_correlations_are_the_searchs(told, search):
    axes = search_figures.rank_correlations(search, theme=LIGHT).axes[0]
    grid = axes.images[0].get_array().filled(math.nan)
    rows, columns = ([label.get_text() for label in labels] for labels in (axes.get_yticklabels(),
                                                                          axes.get_xticklabels()))  # fmt: skip
    shown = {f"{before} to {after}": float(grid[row, column]) for row, before in enumerate(rows)
             for column, after in enumerate(columns) if math.isfinite(grid[row, column])}  # fmt: skip
    assert shown == {label: tau for label, tau in told["kendall_tau"].items() if tau is not None}
    assert "0.45\n(16)" in [text.get_text() for text in axes.texts]


def test_tables_are_the_searchs(told, search):
    columns, lines = candidate_cells(search)
    assert columns[3:] == [f"KD loss, round {one['number']} ({one['steps']} steps)" for one in told["rounds"]]
    assert lines[0][0] == told["winner"]["name"] and lines[0][-1] == f"{told['winner']['loss']:.4f}"
    # The last to go stands before those that went earlier.
    assert [sum(bool(cell) for cell in row[3:]) for row in lines] == [4] * 2 + [3] * 2 + [2] * 4 + [1] * 8
    beside = told["rivals"]["uniform"]["loss"] - told["winner"]["cut_loss"]
    assert rival_cells(search)[1][0][3:] == ["4.6000", f"{beside:+.4f}"]
    assert rival_cells(search)[1][3][3:] == ["not measured", ""]
    assert finalist_cells(search)[1][1][2:] == ["3.4000", "3.3750", "171.7 MiB", "64", "1.60x", "1.68x", "+5.0%"]


def test_a_front_has_no_equals():
    shapes = [{"parameters": size, "loss": loss} for size, loss in ((3, 1.0), (1, 2.0), (2, 2.0), (2, None), (3, 0.5))]
    assert [(entry["parameters"], entry["loss"]) for entry in front(shapes)] == [(1, 2.0), (3, 0.5)]


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "3", "{}", '{"shapes": [{}], "rounds": 1}', '{"shapes": 1' + "0" * 6000 + "}"]
)
def test_a_search_without_its_result_is_a_page_without_its_pictures(tmp_path, text):
    write(tmp_path / "search", text)
    assert cli.main(["report", str(tmp_path / "search")]) == 0
    report = json.loads((tmp_path / "search" / "report.json").read_text())
    assert [picture["name"] for picture in report["pictures"]] == ["cost"]
    assert "search.json" in "\n".join(report["missing"])


WRONG = [None, float("nan"), float("inf"), -1e300, 10**400, True, HOSTILE, [], [HOSTILE], [[]], {}, {HOSTILE: {}}, 0]


def places(value, path=()):
    """Paths of all values of a tree, of lists the first and the last entry's."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        if not isinstance(value, list) or key in (0, len(value) - 1):
            yield from places(entry, (*path, key))


def damaged(told, path, value):
    """A copy of the tree with another value, or without one (KeyError), at a path."""
    copied = copy.deepcopy(told)
    part = copied
    for key in path[:-1]:
        part = part[key]
    if value is KeyError:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return copied


def test_no_damage_to_a_value_crashes(tmp_path, told):
    """Every value of the file is left out and replaced by each wrong one; texts and tables come, pictures at times."""
    from nemo_minitron.report.page import report_page
    from nemo_minitron.report.summary import run_report

    write(tmp_path / "search", found(candidates=2))
    run = collect(tmp_path / "search")
    small = found(candidates=2)
    small["shapes"] = small["shapes"][:3] + small["shapes"][-4:]
    paths = [path for path in places(small) if path and "architecture" not in path]
    assert len(paths) > 60
    for index, path in enumerate(paths):
        for number, value in enumerate([KeyError, *WRONG]):
            missing: list[str] = []
            read = search_of(damaged(small, path, value), {"kd": value}, "search.json", missing)
            if read is None:
                assert missing
                continue
            shown = {**run, "searches": {"": read}, "missing": []}
            pictures = [one for one in pictures_of(shown) if one.section == "search"]
            if (index + number) % 61 == 0:  # each takes a while
                drawn(pictures, missing, [LIGHT])
                assert not [sentence for sentence in missing if "cannot be drawn" in sentence], (path, value)
                assert "<script" not in report_page(run_report(shown, lambda *_: None), [])
            json.dumps(read, allow_nan=False)
            assert all(isinstance(cell, str) for cells in (candidate_cells, rival_cells, finalist_cells)
                       for line in cells(read)[1] for cell in line)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("shapes", 0, "loss"), float("nan"), "shapes.loss, 1 value is missing or not"),
        (("shapes", 0, "parameters"), "many", "shapes.parameters"),
        (("shapes", 0), 3, "shapes, 1 value"),
        (("rounds", 0, "losses"), [], "rounds.losses"),
        (("finalists",), KeyError, "finalists, 1 value"),
        (("winner", "cut_loss"), KeyError, "winner.cut_loss"),
        (("finalists", 1, "speed", "decode", "of_teacher"), "fast", "finalists.speed.decode.of_teacher"),
        (("kendall_tau", "cut to round 1"), 2.0, "kendall_tau"),
        (("teacher",), None, "teacher, 1 value"),
        (("rivals", "depth"), 1, "rivals"),
    ],
)
def test_what_is_damaged_is_said(told, path, value, said):
    missing: list[str] = []
    read = search_of(damaged(told, path, value), {}, "there/search.json", missing)
    assert read is not None and read["loss"] is None
    assert any(sentence.startswith("there/search.json: ") and said in sentence for sentence in missing), missing


def test_a_large_search_is_drawn_thinned(told):
    told["shapes"] = [{"name": f"s{index}", "parameters": 10**6 + index, "load": 1, "loss": 2 + 1 / (index + 1),
                       "predicted": None} for index in range(20_000)]  # fmt: skip
    told["rounds"][0]["losses"] = {f"s{index}": 1 + index / 1e6 for index in range(5_000)}
    read = search_of(told, {}, "search.json", [])
    axes = search_figures.loss_against_parameters(read, theme=LIGHT).axes[0]
    assert len(line(axes, "cut")[0]) <= 1200 and len(line(axes, "front")[0]) <= 1200
    assert len(search_figures.rank_changes(read, theme=LIGHT).axes[0].lines) == 64 == len(candidate_cells(read)[1])
