"""The pictures of losses, sizes and costs: pure functions from numbers to matplotlib figures.

Every function takes plain data as `collect` makes it, and `theme`. Figures belong to no pyplot state; a notebook shows
them as they are.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_minitron.report.style import (
    KINDS,
    MARKS,
    NARROW,
    WIDE,
    Theme,
    log_axis,
    new_figure,
    new_panels,
    picture,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = {"lm_loss": "LM loss", "kd_loss": "KD loss"}
#: Points of a line; of longer histories the means of equal stretches are drawn.
MAX_POINTS = 1200
#: Above this ratio of the largest to the least, an axis is logarithmic.
LOG_FROM = 4.0
MAX_TITLE = 48
#: How a history calls the loss and the share of a source of a blend, before its name.
SOURCE_LOSS, SOURCE_SHARE = "lm_loss/", "share/"


def loss_names(history: Mapping[str, Any]) -> list[str]:
    """Names of the losses of a history, in order."""
    lines = [*history.get("train", ()), *history.get("validation", ())]
    return list(dict.fromkeys(name for line in lines for name in line if name.endswith("loss")))


def points(lines: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one loss; of more than MAX_POINTS steps, means over equal stretches."""
    known = [(line["step"], line[name]) for line in lines if name in line]
    stride = math.ceil(len(known) / MAX_POINTS) or 1
    parts = [known[start : start + stride] for start in range(0, len(known), stride)]
    return (
        [sum(step for step, _ in part) / len(part) for part in parts],
        [sum(value for _, value in part) / len(part) for part in parts],
    )


@picture
def losses(history: Mapping[str, Any], title: str, *, theme: Theme) -> "Figure":
    """Training and validation losses of one stage by step, a panel a loss.

    Args:
        history: ``train`` and ``validation`` (a line a step: step and losses), ``result_step``.
    """
    names = loss_names(history)
    made, grid = new_panels(NARROW, 1.6 + 1.5 * len(names), rows=max(len(names), 1), sharex=True)
    for name, axes in zip(names, grid[:, 0]):
        axes.plot(*points(history["train"], name), color=theme.blue, linewidth=1.0, label="training", zorder=2)
        axes.plot(
            *points(history["validation"], name), color=theme.red, linestyle="--", linewidth=1.2, marker="o",
            markerfacecolor=theme.paper, markeredgewidth=1.3, label="validation", zorder=3,
        )  # fmt: skip
        _loss_axis(axes, LOSSES.get(name, name))
        step = history.get("result_step")
        if step is not None:
            axes.axvline(step, color=theme.ink, linestyle=":", linewidth=1.1, label=f"result: step {step}")
    grid[-1, 0].set_xlabel("step (updates of the weights)")
    grid[0, 0].set_title(short(title, MAX_TITLE))
    grid[0, 0].legend(loc="upper right")
    return made


def source_names(history: Mapping[str, Any]) -> list[str]:
    """Names of the sources of a blend whose LM loss a history has, in order."""
    names = (name for line in history.get("validation", ()) for name in line if name.startswith(SOURCE_LOSS))
    return list(dict.fromkeys(name.removeprefix(SOURCE_LOSS) for name in names))


@picture
def sources(history: Mapping[str, Any], title: str, *, theme: Theme) -> "Figure":
    """Validation losses of the sources of a blend by step, and the shares that follow from them where they do."""
    names = source_names(history)
    lines = history["validation"]
    dynamic = any(f"{SOURCE_SHARE}{name}" in line for line in lines for name in names)
    made, grid = new_panels(NARROW, 4.6 if dynamic else 3.1, rows=2 if dynamic else 1, sharex=True)
    for number, name in enumerate(names):
        mark = tuple(MARKS.values())[(3, 4, 2, 1, 0)[number % 5]]
        look = {"color": theme.colours()[number % 5], "linestyle": mark.dash, "marker": mark.marker, "zorder": 3}
        grid[0, 0].plot(*points(lines, f"{SOURCE_LOSS}{name}"), label=short(name), **look)
        if dynamic:
            steps, shares = points(lines, f"{SOURCE_SHARE}{name}")
            grid[1, 0].plot(steps, [100 * share for share in shares], label=short(name), **look)
    _loss_axis(grid[0, 0], "LM loss")
    if dynamic:
        grid[1, 0].set_ylabel("share that follows\n(% of samples)")
        grid[1, 0].set_ylim(bottom=0)
    grid[-1, 0].set_xlabel("step (updates of the weights)")
    grid[0, 0].set_title(short(title, MAX_TITLE))
    grid[0, 0].legend(loc="upper right", title="validation", title_fontsize=8)
    return made


@picture
def student_losses(series: Mapping[str, Mapping[str, Any]], title: str, *, theme: Theme) -> "Figure":
    """LM losses of a student's trainings beside each other: thin in training, with marks in validation.

    Args:
        series: ``distilled`` and ``control``, or names of runs -> history.
    """
    made, axes = new_figure(NARROW, 3.1)
    for index, (name, history) in enumerate(series.items()):
        mark = MARKS.get(name) or tuple(MARKS.values())[(3, 4, 2, 1, 0)[index % 5]]
        colour = getattr(theme, mark.colour) if name in MARKS else theme.colours()[index % 5]
        axes.plot(*points(history["train"], "lm_loss"), color=colour, linewidth=0.7, alpha=0.45, label="_training")
        axes.plot(
            *points(history["validation"], "lm_loss"), color=colour, linestyle=mark.dash, marker=mark.marker,
            label=KINDS.get(name) or short(name), zorder=3,
        )  # fmt: skip
    axes.set_xlabel("step (updates of the weights)")
    _loss_axis(axes, "LM loss")
    axes.set_title(short(title, MAX_TITLE))
    axes.legend(loc="upper right", title="validation (thin lines: training)", title_fontsize=8)
    return made


def _loss_axis(axes: "Axes", name: str) -> None:
    import numpy

    drawn = [numpy.asarray(line.get_ydata(), dtype=float).tolist() for line in axes.lines]
    values = [value for line in drawn for value in line if math.isfinite(value)]
    unit = "nats a token"
    if values and min(values) > 0 and max(values) / min(values) > LOG_FROM:
        axes.set_yscale("log")
        log_axis(axes.yaxis, max(values) / min(values))
        unit = "nats a token, log scale"
    axes.set_ylabel(f"{name}\n({unit})")
    axes.margins(x=0.02)


@picture
def loss_against_parameters(groups: Mapping[str, Sequence[Mapping[str, Any]]], *, theme: Theme) -> "Figure":
    """Test loss by parameters, a mark a model, an arrow from each pruned student to what training made of it.

    A loss far above the others would squeeze them: it is drawn at the upper edge, with its value.

    Args:
        groups: name of a run -> rows of its table.
    """
    made, axes = new_figure(NARROW + 0.6, 3.9)
    rows = [row for group in groups.values() for row in group]
    scale, unit = unit_of(max(row["parameters"] for row in rows))
    top = _ceiling(rows)
    several = len(groups) > 1
    for index, (run, group) in enumerate(groups.items()):
        for row in group:
            mark = MARKS[row["kind"]]
            colour = theme.colours()[index % 5] if several else getattr(theme, mark.colour)
            shown = min(row["test"]["loss"], top)
            hollow = row["kind"] == "control"  # lies where the distilled one does, more often than not
            axes.plot([row["parameters"] / scale], [shown], marker=mark.marker, color=colour, linestyle="none",
                      markersize=10 if hollow else 6.5, fillstyle="none" if hollow else "full",
                      zorder=4 if hollow else 3, label="_model")  # fmt: skip
            if shown < row["test"]["loss"]:
                axes.annotate(f"{row['test']['loss']:.3g} ↑", (row["parameters"] / scale, shown), xytext=(-7, -3),
                              textcoords="offset points", ha="right", va="top", fontsize=8)  # fmt: skip
        _arrows(axes, group, scale, top, f", {run}" if several else "", theme)
    axes.set_xlabel(f"parameters ({unit})")
    axes.set_ylabel("test loss (nats a token)")
    axes.set_title("Loss against parameters")
    axes.margins(x=0.12, y=0.1)
    _kind_legend(made, rows, groups, theme)
    return made


def _ceiling(rows: Sequence[Mapping[str, Any]]) -> float:
    """The largest loss to draw where it stands: a teacher before correction far above all others is not."""
    others = [row["test"]["loss"] for row in rows if row["kind"] != "teacher"]
    highest = max(row["test"]["loss"] for row in rows)
    if not others or highest <= max(others) + 0.5 * (max(others) - min(others)):
        return highest
    return max(others) + 0.2 * (max(others) - min(others))


def _arrows(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], scale: float, top: float, suffix: str, theme: Theme
) -> None:
    for pruned in (row for row in rows if row["kind"] == "pruned"):
        place = (pruned["parameters"] / scale, min(pruned["test"]["loss"], top))
        name = short(f"{pruned['student']}{suffix}")
        axes.annotate(name, place, xytext=(-8, 0), textcoords="offset points", ha="right", va="center", fontsize=8)
        for row in rows:
            if row["student"] == pruned["student"] and row["kind"] == "distilled":
                target = (row["parameters"] / scale, min(row["test"]["loss"], top))
                look = {"arrowstyle": "->", "color": theme.faint, "shrinkA": 5, "shrinkB": 5}
                axes.annotate("", target, xytext=place, arrowprops=look)


def _kind_legend(made: "Figure", rows: Sequence[Mapping[str, Any]], groups: Mapping[str, Any], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    several = len(groups) > 1
    kinds = [kind for kind in MARKS if any(row["kind"] == kind for row in rows)]
    handles = [
        Line2D([], [], marker=MARKS[kind].marker, linestyle="none", markersize=6, label=KINDS[kind],
               fillstyle="none" if kind == "control" else "full",
               color=theme.faint if several else getattr(theme, MARKS[kind].colour))
        for kind in kinds
    ]  # fmt: skip
    if several:
        handles += [
            Line2D([], [], color=theme.colours()[index % 5], linewidth=5, label=short(name))
            for index, name in enumerate(groups)
        ]
    made.legend(handles=handles, loc="outside lower center", ncols=2)


def unit_of(value: float) -> tuple[float, str]:
    """A factor and its name that bring `value` between 1 and 1000."""
    for factor, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if value >= factor:
            return factor, name
    return 1.0, "count"


@picture
def kept(rows: Sequence[Mapping[str, Any]], *, theme: Theme) -> "Figure":
    """What each model kept and what it cost: share of the parameters, loss above the corrected teacher, gap closed."""
    reference = next(row for row in rows if row["kind"] == "corrected")
    shown = [row for row in rows if row["student"]]
    panels = [
        ("parameters kept\n(% of the teacher's)", [100 * row["share_of_teacher"] for row in shown], "{:.0f}"),
        (
            "test loss above the teacher's\n(nats a token)",
            [row["test"]["loss"] - reference["test"]["loss"] for row in shown],
            "{:.3f}",
        ),
        (
            "gap to the teacher closed\n(%)",
            [None if row["gap_closed"] is None else 100 * row["gap_closed"] for row in shown],
            "{:.0f}",
        ),
    ]
    made, grid = new_panels(WIDE, 1.2 + 0.32 * len(shown), columns=3, sharey=True)
    for axes, (label, values, pattern) in zip(grid[0], panels):
        _bars(axes, shown, values, pattern, theme)
        axes.set_xlabel(label)
    grid[0, 0].invert_yaxis()
    grid[0, 0].set_title("What was kept, and what it cost")
    return made


def _bars(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], values: Sequence[float | None], pattern: str, theme: Theme,
    errors: Sequence[float | None] = (),
) -> None:  # fmt: skip
    """A bar and its number for each model; None: no bar, or no line of its error."""
    for place, (row, value, error) in enumerate(itertools.zip_longest(rows, values, errors)):
        if value is not None:
            mark = MARKS.get(row["kind"])
            axes.barh(place, value, height=0.66, xerr=error, color=getattr(theme, mark.colour) if mark else theme.blue,
                      error_kw={"ecolor": theme.faint, "elinewidth": 1.2})  # fmt: skip
            axes.annotate(pattern.format(value), (max(value, 0) + (error or 0), place), xytext=(3, 0),
                          textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(rows)), [short(row["model"]) for row in rows])
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.22)
    if all(value is None or value >= 0 for value in values):
        axes.set_xlim(left=0)


@picture
def facts(known: Mapping[str, Any], *, theme: Theme) -> "Figure":
    """Which facts each model knows: right choices, and the shares kept of the reference's choices and completions."""
    rows = known["rows"]
    panels = [
        ("right of four\n(% of the facts)", "choice", "right"),
        (f"choices kept\n(% of {short(known['reference'])}'s)", "choice", "kept"),
        (f"completions kept\n(% of {short(known['reference'])}'s)", "completion", "kept"),
    ]
    made, grid = new_panels(WIDE, 1.2 + 0.3 * len(rows), columns=3, sharey=True)
    for axes, (label, task, what) in zip(grid[0], panels):
        values, errors = ([None if part is None else 100 * part for part in column]
                          for column in zip(*(row[task][what] for row in rows)))  # fmt: skip
        _bars(axes, rows, values, "{:.0f}", theme, errors)
        axes.set_xlabel(label)
    grid[0, 0].axvline(100 * known["chance"], color=theme.ink, linestyle=":", linewidth=1.1)
    grid[0, 0].invert_yaxis()
    grid[0, 0].set_title("Facts of the training text")
    return made


@picture
def cost(stages: Sequence[Mapping[str, Any]], *, theme: Theme) -> "Figure":
    """Wall time and peak memory of each stage."""
    made, grid = new_panels(WIDE, 1.2 + 0.24 * len(stages), columns=2, sharey=True)
    seconds = [stage["seconds"] for stage in stages]
    divisor, unit = (
        (3600.0, "hours") if max(seconds) > 7200 else (60.0, "minutes") if max(seconds) > 600 else (1.0, "s")
    )
    panels = [
        (f"wall time ({unit})", [value / divisor for value in seconds], theme.blue),
        ("peak memory (GiB)", [stage["peak_memory_bytes"] / 2**30 for stage in stages], theme.faint),
    ]
    for axes, (label, values, colour) in zip(grid[0], panels):
        axes.barh(range(len(values)), values, height=0.66, color=colour)
        for place, value in enumerate(values):
            axes.annotate(f"{value:.1f}" if value >= 1 else f"{value:.2g}", (value, place), xytext=(3, 0),
                          textcoords="offset points", va="center", fontsize=7.5)  # fmt: skip
        axes.set_xlabel(label)
        axes.set_yticks(range(len(stages)), [short(stage["stage"]) for stage in stages])
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
    grid[0, 0].invert_yaxis()
    grid[0, 0].set_title("Time and memory of each stage")
    return made
