"""Which pictures a run has data for, with title, caption and a description in words."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_minitron.architecture import human
from nemo_minitron.artifacts.stages import STAGES, students_of
from nemo_minitron.report import figures, importance, search_figures, searching
from nemo_minitron.report.facts import facts_of, in_words
from nemo_minitron.report.shapes import shapes
from nemo_minitron.report.style import DARK, LIGHT, Theme, short, svg

if TYPE_CHECKING:
    import numpy
    from matplotlib.figure import Figure

IMPORTANCE_NOTE = "L2 over calibration samples of the mean magnitude over the sequence (arXiv 2407.14679, section 2.2)."


class Picture(NamedTuple):
    """A picture that can be drawn.

    Attributes:
        name: a word for files and anchors, the same for the same picture of every run.
        section: which part of the page it stands in: result, search, importance, training, cost.
        title, caption: for people.
        alt: what is on it, in words and numbers.
        draw: theme=... -> matplotlib Figure.
        wide: whether it needs the whole width of a page.
    """

    name: str
    section: str
    title: str
    caption: str
    alt: str
    draw: "Callable[..., Figure]"
    wide: bool = False


def pictures_of(run: Mapping[str, Any]) -> list[Picture]:
    """The pictures of a run as `collect` read it, in the order of the page."""
    return [*_results(run), *_searches(run), *_importance(run), *_trainings(run), *_costs(run)]


def _results(run: Mapping[str, Any]) -> list[Picture]:
    rows = run["table"]
    pictures = [_to_scale(run)] if run["shapes"] else []
    if len(rows) > 1:
        pictures.append(
            Picture(
                "loss-parameters",
                "result",
                "Loss against parameters",
                "Lower and further left is better. Arrows lead from a pruned student to what distillation made of it. "
                "A teacher far worse than all others before its correction is drawn at the upper edge.",
                _losses_in_words(rows),
                lambda theme: figures.loss_against_parameters({run["name"]: rows}, theme=theme),
            )  # fmt: skip
        )
    if any(row["kind"] == "corrected" for row in rows) and any(row["student"] for row in rows):
        pictures.append(
            Picture(
                "kept",
                "result",
                "What was kept, and what it cost",
                "Gap closed = (pruned - this) / (pruned - corrected teacher), of test losses.",
                _losses_in_words(rows),
                lambda theme: figures.kept(rows, theme=theme),
                wide=True,
            )  # fmt: skip
        )
    facts = facts_of(run["facts"] or {})
    return [*pictures, _knowledge(facts)] if facts else pictures


def _to_scale(run: Mapping[str, Any]) -> Picture:
    """Teacher and students as boxes."""
    models = shape_models(run)
    alt = "; ".join(f"{name}: {human(model.parameters())} parameters, {model.num_layers} layers, hidden size "
                    f"{model.hidden_size}, FFN {model.ffn_hidden_size}" for name, model, _ in models)  # fmt: skip
    return Picture(
        "shapes",
        "result",
        "Teacher and students, to scale",
        "Boxes of embedding, layers and output. A box is as wide as the hidden size, its area is its share of "
        "the parameters; dashed lines show where the teacher's layers are.",
        alt,
        lambda theme: shapes(models, theme=theme),
    )


def _knowledge(facts: Mapping[str, Any]) -> Picture:
    """Which facts each model knows."""
    return Picture(
        "facts",
        "result",
        "Facts of the training text",
        f"{facts['questions']:.0f} questions; kept: of those that {facts['reference']} gets right. Lines at "
        "the ends of bars are one standard error, the dotted line is what guessing gets.",
        in_words(facts),
        lambda theme: figures.facts(facts, theme=theme),
        wide=True,
    )


def _losses_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{row['model']}: {human(row['parameters'])} parameters, test loss {row['test']['loss']:.4f} nats a token"
        for row in rows
    )


def shape_models(run: Mapping[str, Any]) -> list[tuple[str, Any, list[int]]]:
    """Name, architecture and dropped layers of the teacher and of each student cut from it."""
    entries = run["shapes"]
    teacher = next(iter(entries.values()))["teacher"]
    students = [(name, entry["student"], entry["drop_layers"]) for name, entry in entries.items()
                if entry["teacher"] == teacher]  # fmt: skip
    return [("teacher", teacher, []), *students]


def _searches(run: Mapping[str, Any]) -> list[Picture]:
    searches = run["searches"]
    pictures = []
    for index, (folder, search) in enumerate(searches.items()):
        suffix = f"-{index + 1}" if index else ""
        before = f"{short(folder)}: " if len(searches) > 1 else ""
        pictures += [
            picture._replace(name=f"{picture.name}{suffix}", caption=f"{before}{picture.caption}")
            for picture in _search(search)
        ]
    return pictures


def _search(search: Mapping[str, Any]) -> list[Picture]:
    """Loss against parameters, ranks, and their correlations, as far as there are numbers for them."""
    pictures = []
    if any(entry["loss"] is not None for entry in search["shapes"]):
        pictures.append(
            Picture(
                "search-losses",
                "search",
                "Loss of the cuts against parameters",
                "Lower and further left is better: the loss of each cut on held-out text, before any training. "
                + searching.distilled_note(search),
                searching.losses_in_words(search),
                lambda theme: search_figures.loss_against_parameters(search, theme=theme),
            )
        )
    if searching.candidates(search):
        pictures.append(
            Picture(
                "search-ranks",
                "search",
                "Rank by loss",
                "Ranks among the candidates of a rung: by the loss of the cut, then by the loss after each round of "
                "distillation. A line ends where its shape was dropped.",
                searching.ranks_in_words(search),
                lambda theme: search_figures.rank_changes(search, theme=theme),
            )
        )
    if len(search["kendall_tau"]) > 1:
        pictures.append(
            Picture(
                "search-correlations",
                "search",
                "Correlation of the ranks",
                "Kendall's tau: 1 where two rungs rank alike, 0 where the one says nothing of the other, -1 where they "
                "rank in opposite order. In brackets: candidates that both have.",
                "; ".join(f"{before} to {after}: {tau:.2f}" for before, after, tau in search["kendall_tau"]),
                lambda theme: search_figures.rank_correlations(search, theme=theme),
            )
        )
    return pictures


def _importance(run: Mapping[str, Any]) -> list[Picture]:
    pictures = []
    scores = run["importance"]
    if scores is not None:
        dropped = {name: entry["drop_layers"] for name, entry in run["shapes"].items() if entry["drop_layers"]}
        influence = scores["block_influence"]
        least = min(range(len(influence)), key=influence.__getitem__) + 1
        gone = "; ".join(f"{name} drops {importance.layer_text(layers)}" for name, layers in dropped.items())
        pictures.append(
            Picture(
                "block-influence",
                "importance",
                "Block influence by layer",
                "How much a layer turns the residual stream: 1 - cos(its input, its output), summed over the batches "
                "of the calibration. Hatched layers were dropped.",
                f"{len(influence)} layers, layer {least} has the least influence, {influence[least - 1]:.4g}. {gone}",
                lambda theme: importance.block_influence(influence, dropped, theme=theme),
            )  # fmt: skip
        )
    for number, scan in enumerate(run["scans"]):
        if len(scan["blocks"]) > 1:
            best = min(scan["blocks"], key=lambda block: block["loss"])
            pictures.append(
                Picture(
                    f"block-losses-{number + 1}" if number else "block-losses",
                    "importance",
                    "Loss without each block of layers",
                    "LM loss of the teacher on calibration text with each contiguous block of layers left out"
                    + (" and a linear map in its place, as the choice of layers began." if "rounds" in scan else "."),
                    f"without layers {best['first']} to {best['last']} the loss is least, {best['loss']:.4f} nats a "
                    f"token; the teacher has {scan['teacher_loss']:.4f}",
                    lambda theme, scan=scan: importance.block_losses(scan, theme=theme),
                )  # fmt: skip
            )
    return pictures + (_widths(run, scores) if scores is not None else [])


def _widths(run: Mapping[str, Any], scores: Mapping[str, Any]) -> list[Picture]:
    """Sorted curves and heat maps of hidden channels, FFN neurons and heads."""
    total = scores["hidden"].sum(axis=0, keepdims=True)

    def kept(size: str) -> dict[str, int]:
        return {name: getattr(entry["student"], size) for name, entry in run["shapes"].items()
                if getattr(entry["student"], size) != getattr(entry["teacher"], size)}  # fmt: skip

    rotated = any(cut["compensation"].get("hidden") for cut in run["cuts"].values())
    note = " The compensated cut keeps as many directions, rotated, not these channels." if rotated else ""
    hidden, ffn = kept("hidden_size"), kept("ffn_hidden_size")
    pictures = [
        Picture("hidden-curve", "importance", "Hidden channels by importance",
                f"{IMPORTANCE_NOTE} Summed over all norms.{note}", _curve_in_words(total, "hidden channels"),
                lambda theme: importance.sorted_curves(total, "hidden channels", hidden, of_layers=False, theme=theme)),
        Picture("hidden-map", "importance", "Hidden channels, layer by layer",
                "Two norms a layer: before attention and before the FFN. Bright columns matter in all layers.",
                _curve_in_words(scores["hidden"], "hidden channels of all norms"),
                lambda theme: importance.heat_map(scores["hidden"], "Importance of hidden channels",
                                                  "hidden channel (number)", "layer (number, two norms each)",
                                                  per_layer=2, theme=theme)),
        Picture("ffn-curve", "importance", "FFN neurons by importance", f"{IMPORTANCE_NOTE} A line a layer.",
                _curve_in_words(scores["ffn"], "FFN neurons"),
                lambda theme: importance.sorted_curves(scores["ffn"], "FFN neurons", ffn, theme=theme)),
        Picture("ffn-map", "importance", "FFN neurons, layer by layer", "Neurons in the order of the checkpoint.",
                _curve_in_words(scores["ffn"], "FFN neurons"),
                lambda theme: importance.heat_map(scores["ffn"], "Importance of FFN neurons", "FFN neuron (number)",
                                                  theme=theme)),
    ]  # fmt: skip
    if "heads" in scores:
        pictures.append(
            Picture(
                "heads-map",
                "importance",
                "Attention heads, layer by layer",
                f"{IMPORTANCE_NOTE} L2 over a head's channels.",
                _curve_in_words(scores["heads"], "attention heads"),
                lambda theme: importance.heat_map(
                    scores["heads"], "Importance of attention heads", "attention head (number)", theme=theme
                ),
            )  # fmt: skip
        )
    return pictures


def _curve_in_words(values: "numpy.ndarray", what: str) -> str:
    low, high, mean = values.min(), values.max(), values.mean()
    return f"importance of {values.shape[1]} {what}: from {low:.3g} to {high:.3g}, mean {mean:.3g}"


def _trainings(run: Mapping[str, Any]) -> list[Picture]:
    pictures: list[Picture] = []
    for student in [*run["shapes"], *students_of(run["histories"], ("distill",))]:
        folders = {"distilled": STAGES["distill"].placed(student), "control": STAGES["retrain"].placed(student)}
        series = {kind: run["histories"].get(folder) for kind, folder in folders.items()}
        series = {kind: history for kind, history in series.items() if history}
        name = f"student-{slug(student)}"
        if len(series) > 1 and name not in [picture.name for picture in pictures]:
            pictures.append(
                Picture(
                    name,
                    "training",
                    f"{student}: distilled and retrained",
                    "Both start from the same pruned weights and see the same batches; one has the teacher's logits, "
                    "the other the text alone.",
                    "; ".join(history_in_words(short(kind), history) for kind, history in series.items()),
                    lambda theme, series=series, student=student: figures.student_losses(
                        series, f"{student}: distilled and retrained", theme=theme
                    ),
                )  # fmt: skip
            )
    for folder, history in run["histories"].items():
        title = history["stage"]
        pictures.append(
            Picture(
                f"losses-{slug(folder) or 'stage'}",
                "training",
                f"Losses: {title}",
                "Means over the tokens of a batch; marks are validations.",
                history_in_words(title, history),
                lambda theme, history=history, title=title: figures.losses(history, title, theme=theme),
            )  # fmt: skip
        )
        if figures.source_names(history):
            pictures.append(
                Picture(
                    f"sources-{slug(folder) or 'stage'}",
                    "training",
                    f"Sources: {title}",
                    "Each source of the blend on its own validation samples. Shares that follow from a validation "
                    "count from the next one on.",
                    sources_in_words(title, history),
                    lambda theme, history=history, title=title: figures.sources(history, title, theme=theme),
                )  # fmt: skip
            )
    return pictures


def sources_in_words(title: str, history: Mapping[str, Any]) -> str:
    """First and last losses and shares of the sources of a blend."""
    parts = []
    for name in figures.source_names(history):
        for key, what, form in (
            (f"{figures.SOURCE_LOSS}{name}", "LM loss", ".4f"),
            (f"{figures.SOURCE_SHARE}{name}", "share", ".1%"),
        ):
            known = [line[key] for line in history["validation"] if key in line]
            if known:
                parts.append(f"{name}: {what} from {known[0]:{form}} to {known[-1]:{form}}")
    return f"{title}: " + ", ".join(parts)


def history_in_words(title: str, history: Mapping[str, Any]) -> str:
    """First and last losses of a training."""
    parts = []
    for split in ("train", "validation"):
        lines = history[split]
        for name in figures.loss_names({split: lines}):
            known = [line for line in lines if name in line]
            first, last = known[0], known[-1]
            parts.append(
                f"{split} {figures.LOSSES.get(name, name)} from {first[name]:.4f} at step {first['step']} to "
                f"{last[name]:.4f} at step {last['step']}"
            )
    return f"{title}: " + ", ".join(parts)


def _costs(run: Mapping[str, Any]) -> list[Picture]:
    stages = run["stages"]
    if not stages:
        return []
    total = sum(stage["seconds"] for stage in stages)
    longest = max(stages, key=lambda stage: stage["seconds"])
    return [
        Picture(
            "cost",
            "cost",
            "Time and memory of each stage",
            "Memory is the process's peak resident memory; on a GPU the peak allocated there.",
            f"{len(stages)} stages took {total:.1f} s; the longest, {longest['stage']}, {longest['seconds']:.1f} s",
            lambda theme: figures.cost(stages, theme=theme),
            wide=True,
        )  # fmt: skip
    ]


def comparison_pictures(runs: Mapping[str, Mapping[str, Any]]) -> list[Picture]:
    """The pictures of several runs beside each other.

    Args:
        runs: a name of its own for each run -> the run.
    """
    pictures = []
    tables = {name: run["table"] for name, run in runs.items() if run["table"]}
    if tables:
        words = ". ".join(f"{name}: {_losses_in_words(rows)}" for name, rows in tables.items())
        pictures.append(
            Picture(
                "loss-parameters",
                "result",
                "Loss against parameters",
                "A colour a run, a mark a kind of model.",
                words,
                lambda theme: figures.loss_against_parameters(tables, theme=theme),
            )  # fmt: skip
        )
    folders = dict.fromkeys(folder for run in runs.values() for folder in run["histories"])
    for folder in folders:
        series = {name: run["histories"][folder] for name, run in runs.items() if folder in run["histories"]}
        if len(series) > 1:
            title = next(iter(series.values()))["stage"]
            pictures.append(
                Picture(
                    f"losses-{slug(folder) or 'stage'}",
                    "training",
                    f"LM loss: {title}",
                    "Validation; thin lines: training.",
                    "; ".join(history_in_words(name, history) for name, history in series.items()),
                    lambda theme, series=series, title=title: figures.student_losses(series, title, theme=theme),
                )  # fmt: skip
            )
    return pictures


def slug(name: str) -> str:
    """A name as a word of letters, digits and dashes."""
    return "-".join(
        "".join(letter if letter.isascii() and letter.isalnum() else " " for letter in name).split()
    ).lower()


def drawn(
    pictures: Sequence[Picture], missing: list[str], themes: Sequence[Theme] = (LIGHT, DARK)
) -> list[dict[str, Any]]:
    """The pictures as SVG in each theme; one whose data cannot be drawn is said in `missing` and left out."""
    shown = []
    for picture in pictures:
        try:
            images = {theme.name: svg(picture.draw(theme=theme)) for theme in themes}
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            missing.append(f"the picture {picture.title!r} cannot be drawn: {type(error).__name__}: {error}")
            continue
        words = {name: getattr(picture, name) for name in ("name", "section", "title", "caption", "alt", "wide")}
        shown.append({**words, "svg": images})
    return shown
