"""Pictures of what scoring found: importance of layers, hidden channels, FFN neurons and heads; losses without blocks.

Importance is L2 over samples of the mean magnitude over the sequence (arXiv 2407.14679, section 2.2), in units of the
activations.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_minitron.report.style import NARROW, Theme, log_axis, new_figure, picture, shades, short

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMPORTANCE = "importance (activation units)"
#: Columns of a heat map; of more channels the largest of each stretch is drawn.
MAX_COLUMNS = 480


@picture
def block_influence(values: Sequence[float], dropped: Mapping[str, Sequence[int]], *, theme: Theme) -> "Figure":
    """Block influence by layer; the layers that a student drops are hatched, and named.

    Args:
        values: of each layer, 1 - cos(its input, its output), summed over batches.
        dropped: student -> layers (1-based).
    """
    made, axes = new_figure(NARROW, 3.1)
    gone = {layer for layers in dropped.values() for layer in layers}
    for layer, value in enumerate(values, 1):
        look: dict[str, Any] = {"color": theme.blue}
        if layer in gone:
            look = {"facecolor": theme.paper, "edgecolor": theme.red, "hatch": "////", "linewidth": 1.2}
        axes.bar(layer, value, width=0.75, **look)
        if len(values) <= 12:
            axes.annotate(f"{value:.3g}", (layer, value), xytext=(0, 2), textcoords="offset points", ha="center",
                          fontsize=7.5)  # fmt: skip
    axes.set_xlabel("layer (number, 1 = first)")
    axes.set_ylabel("block influence\n(1 − cos, summed over batches)")
    axes.set_title("Block influence by layer")
    axes.margins(y=0.12)
    axes.grid(axis="x", visible=False)
    _whole_numbers(axes, len(values))
    _dropped_legend(axes, dropped, theme)
    return made


def _dropped_legend(axes: "Axes", dropped: Mapping[str, Sequence[int]], theme: Theme) -> None:
    from matplotlib.patches import Patch

    shown = [f"{short(name)}: {layer_text(layers)} dropped" for name, layers in dropped.items() if layers]
    if shown:
        hatched = Patch(facecolor=theme.paper, edgecolor=theme.red, hatch="////")
        empty = Patch(alpha=0)
        axes.legend([hatched, *[empty] * (len(shown) - 1)], shown, loc="upper right")


def layer_text(layers: Sequence[int]) -> str:
    """Layers as people write them: `layers 2–4, 7`."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    text = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in parts)
    return f"layer{'s' if len(layers) > 1 else ''} {text}"


def _whole_numbers(axes: "Axes", count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.set_xlim(0.3, count + 0.7)


@picture
def block_losses(scan: Mapping[str, Any], *, theme: Theme) -> "Figure":
    """LM loss without each contiguous block of layers, the dropped block marked, the teacher's loss as a line.

    Args:
        scan: ``blocks`` (first, last, loss), ``drop_layers``, ``teacher_loss``.
    """
    made, axes = new_figure(NARROW, 3.1)
    blocks = scan["blocks"]
    firsts, losses = [block["first"] for block in blocks], [block["loss"] for block in blocks]
    axes.plot(firsts, losses, color=theme.blue, marker="o", markersize=4, label="without the block")
    axes.axhline(scan["teacher_loss"], color=theme.ink, linestyle=":", label="teacher")
    gone = set(scan["drop_layers"])
    for block in blocks:
        if gone.issuperset(range(block["first"], block["last"] + 1)):
            axes.plot([block["first"]], [block["loss"]], marker="X", markersize=10, color=theme.red, linestyle="none",
                      label=f"dropped: {layer_text(range(block['first'], block['last'] + 1))}")  # fmt: skip
    size = blocks[0]["last"] - blocks[0]["first"] + 1
    axes.set_xlabel(f"first layer of the {size} left out (number)")
    axes.set_ylabel("LM loss (nats a token)")
    axes.set_title("Loss without each block of layers")
    _whole_numbers(axes, max(firsts))
    axes.legend()
    return made


@picture
def sorted_curves(
    scores: "numpy.ndarray", what: str, kept: Mapping[str, int], *, of_layers: bool = True, theme: Theme
) -> "Figure":
    """Importance by falling rank, a line a layer; dashed lines show how many each student keeps.

    Args:
        scores: [l, c], or [1, c] for what all layers share.
        what: ``hidden channels`` or ``FFN neurons``.
        kept: student -> how many.
        of_layers: rows are layers; else they are one sum over all norms.
    """
    import numpy

    made, axes = new_figure(NARROW, 3.1)
    scores = numpy.asarray(scores, dtype=numpy.float64)
    ranks = numpy.arange(1, scores.shape[1] + 1)
    colours = shades(len(scores), theme) if len(scores) > 1 else [theme.blue]
    dashes = ("-", "--", "-.", ":")
    for number, (row, colour) in enumerate(zip(scores, colours), 1):
        named = len(scores) <= 8 or number in (1, (len(scores) + 1) // 2, len(scores))
        label = (f"layer {number}" if named else "_layer") if of_layers else "sum over all norms"
        axes.plot(
            ranks, -numpy.sort(-row), color=colour, linestyle=dashes[(number - 1) % 4], linewidth=1.2, label=label
        )
    _log_if_wide(axes, scores)
    for index, (name, count) in enumerate(kept.items()):
        axes.axvline(count, color=theme.red, linestyle=(0, (4, 2)), linewidth=1.2)
        axes.annotate(f"{short(name)}: {count} kept", (count, 0.03 + 0.08 * (index % 3)), (-3, 0), ha="right",
                      xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlabel(f"{what} by falling importance (rank)")
    axes.set_ylabel(IMPORTANCE)
    axes.set_title(f"{what[:1].upper()}{what[1:]} by importance")
    axes.margins(x=0.02)
    axes.legend(loc="upper right", ncols=2 if len(scores) > 3 else 1)
    return made


def _log_if_wide(axes: "Axes", scores: "numpy.ndarray") -> None:
    positive = scores[scores > 0]
    if positive.size and scores.min() >= 0 and positive.max() / max(positive.min(), 1e-300) > 8:
        axes.set_yscale("log")
        ratio = positive.max() / positive.min()
        log_axis(axes.yaxis, ratio)
        if ratio > 1e6:
            axes.set_ylim(bottom=positive.max() / 1e6)


@picture
def heat_map(
    scores: "numpy.ndarray", title: str, columns: str, rows: str = "layer (number)", *, per_layer: int = 1, theme: Theme
) -> "Figure":
    """Importance of every channel of every layer, brighter for more, on a logarithmic scale.

    Args:
        scores: [l * per_layer, c].
        columns: what the columns are, with their unit.
        per_layer: rows a layer.
    """
    import numpy
    from matplotlib.colors import LogNorm

    scores = numpy.asarray(scores, dtype=numpy.float64)
    width = scores.shape[1]
    shown = stretches(scores)
    positive = shown[shown > 0]
    high = float(positive.max()) if positive.size else 1.0
    low = max(float(positive.min()) if positive.size else 0.1, high / 1e4)
    norm = LogNorm(low, high if high > low else low * 1.001, clip=True)
    made, axes = new_figure(NARROW, 3.1)
    layers = len(scores) / per_layer
    image = axes.imshow(
        numpy.maximum(shown, low), aspect="auto", cmap="cividis", norm=norm, interpolation="nearest",
        extent=(0.5, width + 0.5, layers + 0.5, 0.5),
    )  # fmt: skip
    axes.grid(False)
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    axes.set_title(title)
    bar = made.colorbar(image, ax=axes, pad=0.02)
    log_axis(bar.ax.yaxis, high / low)
    bar.set_label(IMPORTANCE)
    bar.outline.set_visible(False)
    return made


def stretches(scores: "numpy.ndarray") -> "numpy.ndarray":
    """The largest of each stretch of columns [r, at most MAX_COLUMNS]."""
    import numpy

    width = scores.shape[1]
    if width <= MAX_COLUMNS:
        return scores
    starts = numpy.unique(numpy.linspace(0, width, MAX_COLUMNS, endpoint=False).astype(int))
    return numpy.maximum.reduceat(scores, starts, axis=1)
