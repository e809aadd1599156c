"""Pictures: what is drawn is what the manifests say, in the same bytes each time, with units, and not blank."""

import io

import numpy
import pytest
from PIL import Image

import made_runs
from nemo_minitron.report import figures, importance
from nemo_minitron.report.collect import collect
from nemo_minitron.report.pictures import comparison_pictures, drawn, pictures_of
from nemo_minitron.report.shapes import shapes
from nemo_minitron.report.style import DARK, LIGHT, png, short, svg

NAMES = [
    "shapes", "loss-parameters", "kept", "facts", "block-influence", "block-losses", "hidden-curve", "hidden-map",
    "ffn-curve", "ffn-map", "heads-map", "student-depth", "student-width", "losses-teacher-pretrained",
    "losses-teacher", "losses-depth-distilled", "losses-depth-control", "losses-width-distilled",
    "losses-width-control", "cost",
]  # fmt: skip
UNITS = ("(nats a token", "(number", "(rank)", "(activation units)", "(updates of the weights)", "(%", "(s)", "(GiB)",
         "(count)", "(thousands)", "(thousands of rows)", "(rows)", "(1 −", "channels)", "(% of")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return collect(made_runs.flow(tmp_path_factory.mktemp("made") / "run"))


@pytest.fixture(scope="module")
def pictures(run):
    return {picture.name: picture for picture in pictures_of(run)}


def lines(figure, label: str) -> list[tuple[list, list]]:
    """x and y of every line of that label."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for axes in figure.axes for line in axes.lines
            if line.get_label() == label]  # fmt: skip


def test_a_run_has_every_picture(pictures):
    assert list(pictures) == NAMES
    assert all(picture.alt and picture.caption and picture.title for picture in pictures.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_not_blank_and_its_axes_have_units(pictures, name):
    figure = pictures[name].draw(theme=LIGHT)
    pixels = numpy.asarray(Image.open(io.BytesIO(png(figure, dpi=60))).convert("L"))
    assert (pixels < 128).mean() > 0.005 and (pixels > 250).mean() > 0.1
    for axes in figure.axes:
        for label in (axes.get_xlabel(), axes.get_ylabel()):
            assert not label or any(unit in label for unit in UNITS), label
    assert any(axes.get_xlabel() for axes in figure.axes)


def test_the_same_data_give_the_same_bytes(pictures):
    import matplotlib

    first = {name: svg(picture.draw(theme=LIGHT)) for name, picture in pictures.items() if name in NAMES[::4]}
    with matplotlib.rc_context({"font.size": 20, "axes.grid": False, "svg.hashsalt": "other", "lines.linewidth": 9}):
        again = {name: svg(pictures[name].draw(theme=LIGHT)) for name in first}
    assert first == again
    assert all("<dc:date>" not in text and "Matplotlib v" not in text for text in first.values())
    one = pictures["losses-teacher"]
    assert png(one.draw(theme=LIGHT)) == png(one.draw(theme=LIGHT)) != png(one.draw(theme=DARK))


def test_losses_are_the_manifests(run, pictures):
    metrics = made_runs.history(2.0, kd=True)
    figure = pictures["losses-depth-distilled"].draw(theme=LIGHT)
    for name, axes in zip(("kd_loss", "lm_loss"), figure.axes):
        shown = {line.get_label(): line for line in axes.lines}
        for split, label in (("train", "training"), ("validation", "validation")):
            assert list(shown[label].get_xdata()) == [line["step"] for line in metrics[split]]
            assert list(shown[label].get_ydata()) == [line[name] for line in metrics[split]]
        assert list(shown["result: step 20"].get_xdata()) == [20, 20]


def test_sources_of_a_blend_are_drawn_with_their_shares(run, pictures):
    from nemo_minitron.report.pictures import pictures_of, sources_in_words

    assert not any(name.startswith("sources") for name in pictures)
    line = {"lm_loss": 2.5, "lm_loss/wiki": 3.0, "lm_loss/code": 2.0, "share/wiki": 0.5, "share/code": 0.5}
    later = {**line, "step": 4, "lm_loss/wiki": 2.5, "share/wiki": 0.75, "share/code": 0.25}
    history = {"stage": "student", "train": [], "validation": [{**line, "step": 2}, later], "result_step": 4}
    drawn = {one.name: one for one in pictures_of({**run, "histories": {"student": history}})}["sources-student"]
    losses, shares = drawn.draw(theme=LIGHT).axes
    assert [list(one.get_ydata()) for one in losses.lines] == [[3.0, 2.5], [2.0, 2.0]]
    assert [list(one.get_ydata()) for one in shares.lines] == [[50.0, 75.0], [50.0, 25.0]]
    assert drawn.alt == sources_in_words("student", history) and "wiki: share from 50.0% to 75.0%" in drawn.alt
    fixed = {**history, "validation": [{"step": 2, "lm_loss": 2.5, "lm_loss/wiki": 3.0}]}
    assert len(figures.sources(fixed, "student", theme=LIGHT).axes) == 1


def test_a_long_history_is_drawn_as_means_of_equal_stretches():
    train = [{"step": step, "lm_loss": float(step % 2)} for step in range(1, 10_001)]
    steps, values = figures.points(train, "lm_loss")
    assert len(steps) <= figures.MAX_POINTS and steps[0] > 1
    assert numpy.mean(values) == pytest.approx(0.5, abs=1e-2)
    assert figures.points(train[:10], "lm_loss")[0] == list(range(1, 11))


def test_losses_against_parameters_are_the_tables(run, pictures):
    figure = pictures["loss-parameters"].draw(theme=LIGHT)
    scale, unit = figures.unit_of(made_runs.TEACHER.parameters())
    assert f"({unit})" in figure.axes[0].get_xlabel()
    shown = {(round(x[0] * scale), round(y[0], 9)) for x, y in lines(figure, "_model")}
    told = {(row["parameters"], round(row["test"]["loss"], 9)) for row in run["table"] if row["kind"] != "teacher"}
    assert told < shown and len(shown) == len(told) + 1
    # The teacher before correction is far above the rest: at the upper edge, with its value in words.
    assert "4.5 ↑" in [text.get_text() for text in figure.axes[0].texts]


def test_bars_of_what_was_kept_are_the_tables(run, pictures):
    figure = pictures["kept"].draw(theme=LIGHT)
    rows = [row for row in run["table"] if row["student"]]
    widths = [[round(patch.get_width(), 9) for patch in axes.patches] for axes in figure.axes]
    assert widths[0] == [round(100 * row["share_of_teacher"], 9) for row in rows]
    assert widths[1] == [round(row["test"]["loss"] - 1.0, 9) for row in rows]
    assert widths[2] == [75.0, 50.0, 75.0, 50.0]  # (pruned - this) / (pruned - 1.0), by hand
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [row["model"] for row in rows]


def test_bars_of_facts_are_the_questions_answered_right(pictures):
    """Of eight, and of the reference's six choices and two completions; what it has none of has no bar."""
    right, choices, completions = pictures["facts"].draw(theme=LIGHT).axes

    def bars(axes):
        return [round(bar.get_width(), 6) for bar in axes.patches]

    assert bars(right) == [75.0, 25.0, 62.5]
    assert bars(choices) == [100.0, round(100 / 3, 6), round(200 / 3, 6)]
    assert bars(completions) == [100.0, 0.0, 50.0]
    assert [label.get_text() for label in right.get_yticklabels()] == list(made_runs.KNOWN)
    assert right.lines[-1].get_xdata()[0] == 25.0


def test_time_and_memory_are_the_manifests(run, pictures):
    seconds, memory = pictures["cost"].draw(theme=LIGHT).axes
    assert [patch.get_width() for patch in seconds.patches] == [stage["seconds"] for stage in run["stages"]]
    assert [patch.get_width() * 2**30 for patch in memory.patches] == [
        pytest.approx(stage["peak_memory_bytes"]) for stage in run["stages"]
    ]


def test_block_influence_marks_the_dropped_layers(pictures):
    axes = pictures["block-influence"].draw(theme=LIGHT).axes[0]
    assert [patch.get_height() for patch in axes.patches] == made_runs.INFLUENCE
    assert [bool(patch.get_hatch()) for patch in axes.patches] == [False, True, True, False]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["depth: layers 2–3 dropped"]


def test_block_losses_mark_the_dropped_block(pictures):
    figure = pictures["block-losses"].draw(theme=LIGHT)
    assert lines(figure, "without the block") == [([1, 2, 3], [5.0, 2.5, 3.0])]
    assert lines(figure, "dropped: layers 2–3") == [([2], [2.5])]
    assert lines(figure, "teacher")[0][1] == [1.0, 1.0]


def test_importance_is_that_of_the_cut(tmp_path):
    """Curves and maps show the numbers that `choose` ranks: worked out here from the scores on disk, by torch."""
    from nemo_minitron.artifacts import ImportanceScores
    from nemo_minitron.pruning.cut import choose

    run = collect(made_runs.flow(tmp_path / "run"))
    shown = {picture.name: picture.draw(theme=LIGHT) for picture in pictures_of(run) if picture.section == "importance"}
    on_disk = ImportanceScores.load(tmp_path / "run" / "scores")
    total = on_disk.hidden.double().sqrt().sum(dim=0).sort(descending=True).values
    (_, values), *_ = lines(shown["hidden-curve"], "sum over all norms")
    assert values == pytest.approx(total.tolist(), rel=1e-12)
    for layer, row in enumerate(on_disk.ffn.double().sqrt(), 1):
        (_, values), *_ = lines(shown["ffn-curve"], f"layer {layer}")
        assert values == pytest.approx(row.sort(descending=True).values.tolist(), rel=1e-12)
    image = shown["ffn-map"].axes[0].images[0].get_array()
    assert numpy.allclose(image, on_disk.ffn.double().sqrt().numpy())
    kept = choose(on_disk, made_runs.TEACHER, {"hidden_size": 32}).hidden
    assert run["importance"]["hidden"].sum(axis=0).argsort()[::-1][:32].tolist() == kept.tolist()
    heads = shown["heads-map"].axes[0].images[0].get_array()
    own = on_disk.heads.double().view(4, 4, 16).sum(dim=2).sqrt().numpy()
    assert numpy.allclose(heads, own)


def test_kept_sizes_are_marked(pictures):
    for name, count in (("hidden-curve", 32), ("ffn-curve", 64)):
        axes = pictures[name].draw(theme=LIGHT).axes[0]
        assert [count, count] in [list(line.get_xdata()) for line in axes.lines]
        assert f"width: {count} kept" in [text.get_text() for text in axes.texts]


def test_wide_heat_maps_keep_the_largest_of_each_stretch():
    scores = numpy.random.default_rng(0).random((3, 5001))
    scores[1, 4999] = 7.0
    shown = importance.stretches(scores)
    assert shown.shape == (3, importance.MAX_COLUMNS) and shown[1].max() == 7.0 == shown[1, -1]
    assert importance.stretches(scores[:, :100]) is not None and importance.stretches(scores[:, :100]).shape == (3, 100)


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_to_scale(tied):
    """The areas of the boxes are the parameters of their parts, up to the norms and biases in no box of their own."""
    teacher = made_runs.TEACHER.with_sizes(share_embeddings_and_output_weights=tied)
    student = teacher.with_sizes(hidden_size=32, num_layers=2)
    figure = shapes([("teacher", teacher, []), ("small", student, [1, 4])])
    scale = figures.unit_of(max(patch.get_y() + patch.get_height() for patch in figure.axes[0].patches) * 1e3)[0]
    boxes = [patch for patch in figure.axes[0].patches if patch.get_fill()]
    for model, left in ((teacher, 0), (student, teacher.hidden_size)):
        mine = [box for box in boxes if (box.get_x() >= left) == (left > 0) or left == 0 and box.get_x() < 64]
        mine = [box for box in mine if box.get_width() == model.hidden_size]
        area = sum(box.get_width() * box.get_height() for box in mine) * scale
        assert area == pytest.approx(model.parameters() - model.hidden_size, rel=1e-9)
    outlines = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    assert len(outlines) == teacher.num_layers


def test_many_layers_and_names_of_any_kind_are_drawn(tmp_path):
    scores = numpy.random.default_rng(0).random((80, 300)) + 1e-9
    figure = importance.sorted_curves(scores, "FFN neurons", {"a $x^$ \\frac{ <b>": 100, "\x00\ud800" + "x" * 99: 200})
    assert len(figure.axes[0].lines) == 82 and svg(figure)
    assert len(short("x" * 999)) <= 34 and short("a\nb\x00c\ud800") == "a b c"
    assert svg(importance.block_influence(list(range(80)), {"s": [3, 4, 9]}))
    assert svg(importance.heat_map(numpy.zeros((2, 3)), "nothing", "columns (number)"))


def test_what_cannot_be_drawn_is_said_and_left_out(run, pictures):
    broken = pictures["cost"]._replace(draw=lambda theme: figures.cost([], theme=theme))
    missing: list[str] = []
    found = drawn([broken, pictures["kept"]], missing)
    assert [picture["name"] for picture in found] == ["kept"] and found[0]["svg"].keys() == {"light", "dark"}
    assert len(missing) == 1 and "Time and memory of each stage" in missing[0]


def test_runs_are_compared_by_stage(run, tmp_path):
    other = collect(made_runs.flow(tmp_path / "other", students=("depth",), shift=0.5))
    found = {picture.name: picture for picture in comparison_pictures({"run": run, "other": other})}
    assert list(found) == ["loss-parameters", "losses-teacher-pretrained", "losses-teacher", "losses-depth-distilled",
                           "losses-depth-control"]  # fmt: skip
    figure = found["losses-depth-control"].draw(theme=LIGHT)
    for name, shift in (("run", 0.0), ("other", 0.5)):
        told = made_runs.history(2.5 + shift)["validation"]
        assert lines(figure, name) == [([line["step"] for line in told], [line["lm_loss"] for line in told])]
