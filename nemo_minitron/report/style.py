"""How every picture looks: one set of sizes, colours, marks and dashes, on light paper and on dark.

Series differ in mark and dash as well as in colour, and the colours in lightness, so that a picture can be read in
black and white. The bytes of a picture depend on its data alone: no dates, no random ids, nobody's matplotlibrc.
"""

import dataclasses
import functools
import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Inches. Narrow pictures stay readable on a phone; wide ones scroll there.
NARROW, WIDE = 4.8, 7.6
MAX_NAME = 34


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of paper, of lines and text, and of the series."""

    name: str
    paper: str
    ink: str
    faint: str
    grid: str
    blue: str
    orange: str
    red: str
    fill: str

    def colours(self) -> tuple[str, ...]:
        """Colours for series of one kind, by falling contrast."""
        return (self.blue, self.orange, self.red, self.ink, self.faint)


LIGHT = Theme("light", "#ffffff", "#1b1f24", "#6b7280", "#dfe3e8", "#124e8c", "#e08a00", "#b3362b", "#c9d8ea")
DARK = Theme("dark", "#171b21", "#e8eaed", "#9aa3ae", "#333a44", "#7db8f7", "#ffcf70", "#f0756a", "#2d4a6b")


class Mark(NamedTuple):
    """How a kind of model is drawn: the name of its colour in Theme, its marker, its dash."""

    colour: str
    marker: str
    dash: str | tuple[int, tuple[int, ...]]


MARKS = {
    "teacher": Mark("faint", "D", ":"),
    "corrected": Mark("ink", "s", (0, (1, 1))),
    "pruned": Mark("red", "v", "-."),
    "distilled": Mark("blue", "o", "-"),
    "control": Mark("orange", "^", "--"),
}
KINDS = {
    "teacher": "teacher",
    "corrected": "teacher, corrected",
    "pruned": "pruned",
    "distilled": "distilled",
    "control": "retrained with the LM loss alone",
}


def settings(theme: Theme) -> dict[str, Any]:
    """matplotlib's settings for a picture."""
    return {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.parse_math": False,
        "text.color": theme.ink,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "figure.constrained_layout.use": True,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "xtick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.color": theme.faint,
        "ytick.labelcolor": theme.ink,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.framealpha": 0.85,
        "legend.facecolor": theme.paper,
        "legend.edgecolor": "none",
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
        "hatch.linewidth": 0.7,
        "svg.hashsalt": "nemo_minitron",
        "svg.fonttype": "path",
        "savefig.dpi": 150,
    }


Arguments = ParamSpec("Arguments")
#: Attribute of a figure that says which theme it was drawn in.
THEME = "minitron_theme"


def picture(draw: "Callable[Arguments, Figure]") -> "Callable[Arguments, Figure]":
    """Draws with the settings of the keyword `theme`, LIGHT by default, whatever matplotlib is set to otherwise."""

    @functools.wraps(draw)
    def drawn(*arguments: Arguments.args, **named: Arguments.kwargs) -> "Figure":
        import matplotlib.style

        theme = named.setdefault("theme", LIGHT)
        assert isinstance(theme, Theme)
        with matplotlib.style.context(["default", settings(theme)]):
            made = draw(*arguments, **named)
        vars(made)[THEME] = theme
        return made

    return drawn


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """An empty figure and its axes, without pyplot."""
    made, grid = new_panels(width, height)
    return made, grid[0, 0]


def new_panels(
    width: float, height: float, rows: int = 1, columns: int = 1, *, sharex: bool = False, sharey: bool = False
) -> "tuple[Figure, numpy.ndarray]":
    """An empty figure and its axes [rows, columns], without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height))
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)


def svg(made: "Figure") -> str:
    """A figure as SVG: the same text for the same data."""
    return _saved(made, "svg", {"Date": None, "Creator": None, "Format": None, "Type": None}).decode("utf-8")


def png(made: "Figure", dpi: int = 150) -> bytes:
    """A figure as PNG: the same bytes for the same data."""
    return _saved(made, "png", {"Software": None}, dpi=dpi)


def _saved(made: "Figure", kind: str, metadata: dict[str, Any], **options: Any) -> bytes:
    import matplotlib.style

    file = io.BytesIO()
    with matplotlib.style.context(["default", settings(vars(made)[THEME])]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        made.savefig(file, format=kind, metadata=metadata, **options)
    return file.getvalue()


def short(name: object, limit: int = MAX_NAME) -> str:
    """A name on one line that fits a picture."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in str(name)).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def log_axis(axis: "Axis", ratio: float) -> None:
    """Ticks of a logarithmic axis as plain numbers; `ratio`: of the largest value to the least."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if ratio < 30 else (1, 3) if ratio < 1000 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def shades(count: int, theme: Theme) -> list[tuple[float, float, float, float]]:
    """Colours for `count` ordered things (layers), from far off the paper to near it."""
    from matplotlib import colormaps

    low, high = (0.0, 0.85) if theme.name == "light" else (1.0, 0.5)
    ramp = colormaps["cividis"]
    return [ramp(low + (high - low) * (index / max(count - 1, 1))) for index in range(count)]
