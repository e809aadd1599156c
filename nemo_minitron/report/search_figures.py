"""The pictures of a search: loss against parameters, ranks from rung to rung, and how they correlate.

Every function takes a search as `searching.search_of` reads it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import human
from nemo_minitron.report.figures import LOG_FROM, MAX_POINTS, unit_of
from nemo_minitron.report.searching import MAX_CANDIDATES, candidates, distilled, front, ranks, standings
from nemo_minitron.report.style import NARROW, Theme, log_axis, new_figure, picture, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Rival -> its marker; of others the last.
RIVALS = {"uniform": "s", "depth": "v", "width": "^", "published": "D"}
#: Rungs of a map of correlations.
MAX_RUNGS = 16


def thinned(entries: Sequence[Any]) -> list[Any]:
    """All entries, or of more than MAX_POINTS every so-many-th."""
    return list(entries[:: math.ceil(len(entries) / MAX_POINTS) or 1])


@picture
def loss_against_parameters(search: Mapping[str, Any], *, theme: Theme) -> "Figure":
    """Loss of every cut by its parameters, the front, the rivals, the winner before and after distillation.

    The axis is parameters whatever the budget is: all shapes lie at the budget, so it would tell none from another.
    """
    made, axes = new_figure(NARROW + 1.4, 4.9)
    measured = [entry for entry in search["shapes"] if entry["loss"] is not None]
    guessed = [entry for entry in search["shapes"] if entry["loss"] is None and entry["predicted"] is not None]
    scale, unit = unit_of(max(entry["parameters"] for entry in measured))

    def draw(entries: Sequence[Mapping[str, Any]], value: str, label: str, **look: Any) -> None:
        known: dict[str, Any] = {"linestyle": "none", "zorder": 4, "label": label}
        ordered = sorted(entries, key=lambda entry: entry["parameters"])
        axes.plot([entry["parameters"] / scale for entry in ordered], [entry[value] for entry in ordered],
                  **(known | look))  # fmt: skip

    if guessed:
        draw(thinned(sorted(guessed, key=lambda entry: entry["predicted"])), "predicted", "predicted, not cut",
             marker="o", markersize=3, color=theme.faint, alpha=0.45, markeredgewidth=0, zorder=1)  # fmt: skip
    draw(thinned(sorted(measured, key=lambda entry: entry["loss"])), "loss", "cut", marker="o", markersize=4.5,
         color=theme.blue, alpha=0.7, markeredgewidth=0, zorder=2)  # fmt: skip
    draw(thinned(front(measured)), "loss", "front: none is smaller and better", color=theme.ink, linestyle="-",
         linewidth=1.2, drawstyle="steps-post", zorder=3)  # fmt: skip
    for what, rival in list(search["rivals"].items())[:8]:
        if rival["loss"] is not None:
            draw([rival], "loss", f"{short(what, 12)}: {short(rival['name'], 24)}", marker=RIVALS.get(what, "P"),
                 markersize=8, color=theme.orange, markeredgecolor=theme.ink, markeredgewidth=0.8)  # fmt: skip
    _winner(axes, search, scale, theme)
    own = search["teacher"]
    if own["loss"] is not None:
        size = "" if own["parameters"] is None else f" ({human(own['parameters'])})"
        axes.axhline(own["loss"], color=theme.faint, linestyle=":", linewidth=1.2, label=f"teacher{size}")
    for budget in search["budgets"]:
        if budget["name"] == "parameters" and budget["limit"]:
            axes.axvline(budget["limit"] / scale, color=theme.faint, linestyle="--", linewidth=0.9, label="budget")
    _height(axes, search, measured)
    axes.set_xlabel(f"parameters ({unit})")
    axes.set_title("Loss of the cuts against parameters")
    axes.margins(x=0.05)
    made.legend(loc="outside lower center", ncols=2)
    return made


def _winner(axes: "Axes", search: Mapping[str, Any], scale: float, theme: Theme) -> None:
    """Stars for the winner, hollow before distillation and full after it; crosses for the other finalists after it."""
    winner, finals = search["winner"], distilled(search)
    star: dict[str, Any] = {"marker": "*", "markersize": 14, "color": theme.red, "linestyle": "none", "zorder": 6}
    for entry in finals:
        best = winner is not None and entry["name"] == winner["name"]
        look = star if best else star | {"marker": "X", "markersize": 7, "zorder": 5}
        label = f"winner, distilled: {short(entry['name'], 24)}" if best else "finalist, distilled"
        known = label in axes.get_legend_handles_labels()[1]
        axes.plot([entry["parameters"] / scale], [entry["validation_loss"]], label=f"_{label}" if known else label,
                  **look)  # fmt: skip
    if winner is None or winner["cut_loss"] is None:
        return
    place = (winner["parameters"] / scale, winner["cut_loss"])
    hollow = {"fillstyle": "none", "markeredgewidth": 1.4}
    axes.plot([place[0]], [place[1]], label=f"winner, cut: {short(winner['name'], 24)}", **(star | hollow))
    for entry in finals:
        if entry["name"] == winner["name"]:
            look = {"arrowstyle": "->", "color": theme.red, "shrinkA": 8, "shrinkB": 9, "linewidth": 1.2}
            axes.annotate("", (place[0], entry["validation_loss"]), xytext=place, arrowprops=look, zorder=5)


def _height(axes: "Axes", search: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> None:
    """Limits of the losses: predicted ones far above every measured one would squeeze these, and lie outside."""
    winner, own = search["winner"] or {}, search["teacher"]["loss"]
    others = [rival["loss"] for rival in search["rivals"].values()] + [winner.get("cut_loss"), own]
    others += [entry["validation_loss"] for entry in distilled(search)]
    values = [entry["loss"] for entry in measured] + [value for value in others if value is not None]
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_FROM:
        axes.set_yscale("log")
        log_axis(axes.yaxis, high / low)
        axes.set_ylabel("loss (nats a token, log scale)")
        axes.set_ylim(low / 1.1, high * 1.15)
    else:
        room = 0.08 * (high - low) or 0.1
        axes.set_ylabel("loss (nats a token)")
        axes.set_ylim(low - room, high + room)


@picture
def rank_changes(search: Mapping[str, Any], *, theme: Theme) -> "Figure":
    """Rank of each candidate at each rung, a line a candidate; those of the last round are coloured."""
    shown = candidates(search)[:MAX_CANDIDATES]
    rungs = {rung: ranks({name: losses[name] for name in shown if name in losses})
             for rung, losses in standings(search).items()}  # fmt: skip
    labels = list(rungs)
    last = [name for name in shown if name in rungs[labels[-1]]]
    made, axes = new_figure(NARROW + 1.6, 1.6 + 0.22 * len(shown))
    for name in reversed(shown):
        places = [(index, rungs[label][name]) for index, label in enumerate(labels) if name in rungs[label]]
        place = last.index(name) if name in last else None
        coloured = place is not None and place < 4
        axes.plot(
            *zip(*places),
            color=theme.colours()[place] if coloured and place is not None else theme.faint,
            linewidth=2.6 if place == 0 else 1.8 if coloured else 1.0,
            marker="o", markersize=6 if coloured else 4, markerfacecolor=None if name in last else theme.paper,
            zorder=5 if coloured else 3, label=f"_{short(name)}", clip_on=False,
        )  # fmt: skip
        _named(axes, name, places[0], "right")
        if places[-1][0] == len(labels) - 1 and len(places) > 1:
            _named(axes, name, places[-1], "left", weight="bold" if place == 0 else "normal")
    steps = {f"round {one['number']:.0f}": one["steps"] for one in search["rounds"]}
    axes.set_xticks(range(len(labels)), [
        f"{label}\n" if steps.get(label) is None else f"{label}\n{steps[label]:.0f} steps" for label in labels
    ])  # fmt: skip
    axes.set_xlim(-0.1, len(labels) - 0.9)
    axes.set_ylim(len(shown) + 0.5, 0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("rung")
    axes.set_title("Rank by loss, best at the top")
    return made


def _named(axes: "Axes", name: str, place: tuple[int, int], side: str, weight: str = "normal") -> None:
    """A candidate's rank and name beside its mark."""
    offset = -9 if side == "right" else 9
    text = f"{short(name, 24)}  {place[1]}" if side == "right" else f"{place[1]}  {short(name, 24)}"
    axes.annotate(text, place, xytext=(offset, 0), textcoords="offset points", ha=side, va="center", fontsize=7.5,
                  fontweight=weight)  # fmt: skip


@picture
def rank_correlations(search: Mapping[str, Any], *, theme: Theme) -> "Figure":
    """Kendall's tau of the ranks at each two rungs, and how many candidates both have."""
    from matplotlib.colors import LinearSegmentedColormap

    taus = search["kendall_tau"]
    names = list(dict.fromkeys(name for before, after, _ in taus for name in (before, after)))[:MAX_RUNGS]
    losses = standings(search)
    rows = [name for name in names if any(before == name for before, _, _ in taus)]
    columns = [name for name in names if any(after == name for _, after, _ in taus)]
    grid = [[math.nan] * len(columns) for _ in rows]
    for before, after, tau in taus:
        if before in rows and after in columns:
            grid[rows.index(before)][columns.index(after)] = tau
    made, axes = new_figure(max(4.0, 1.8 + 0.8 * len(columns)), 1.5 + 0.55 * len(rows))
    colours = LinearSegmentedColormap.from_list("tau", [theme.red, theme.paper, theme.blue])
    axes.imshow(grid, cmap=colours, vmin=-1, vmax=1, aspect="auto")
    for row, line in enumerate(grid):
        for column, tau in enumerate(line):
            if math.isfinite(tau):
                shared = len(losses.get(rows[row], {}).keys() & losses.get(columns[column], {}).keys())
                axes.text(column, row, f"{tau:.2f}\n({shared})", ha="center", va="center", fontsize=8.5,
                          color=theme.paper if abs(tau) > 0.55 else theme.ink)  # fmt: skip
    for place in range(1, len(rows)):
        axes.axhline(place - 0.5, color=theme.paper, linewidth=2)
    for place in range(1, len(columns)):
        axes.axvline(place - 0.5, color=theme.paper, linewidth=2)
    axes.set_xticks(range(len(columns)), [short(name, 12) for name in columns])
    axes.set_yticks(range(len(rows)), [short(name, 12) for name in rows])
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("to")
    axes.set_ylabel("from")
    axes.set_title("Kendall's tau of the ranks")
    return made
