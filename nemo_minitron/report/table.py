"""The table that ends a flow: what each model costs and what it kept. JSON first, text from it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.architecture import human
from nemo_minitron.artifacts import Manifest
from nemo_minitron.report.stages import number

#: Variance of the difference of two models' losses at a token, over the mean of that difference: 2.1 to 3.1 for
#: SmolLM2-135M against itself with layers left out or noise on its weights, differences of 0.007 to 0.87 nats.
VARIANCE_OF_DIFFERENCE = 3.0
#: Tokens of a document go together: the same measured by windows of 256 tokens has up to twice the variance.
CLUSTERING = 2.0
#: Standard deviation of a test loss over seeds of training, nats (docs/pruning.rst: 3.308, 3.285, 3.304).
SEEDS = 0.01
#: What the table shows of a gap that is less than its noise.
NOTHING = "-"

COLUMNS = ("model", "parameters", "of teacher", "val loss", "val ppl", "test loss", "test ppl", "gap closed")


def row(name: str, metrics: dict[str, Any], *, student: str | None = None, kind: str) -> dict[str, Any]:
    """One line of the table from the metrics of an evaluation.

    Args:
        student: name of the student that the model belongs to; None for the teacher.
        kind: ``teacher``, ``corrected``, ``pruned``, ``distilled`` or ``control``.
    """
    return {
        "model": name,
        "student": student,
        "kind": kind,
        "parameters": metrics["parameters"],
        "validation": metrics["validation"],
        "test": metrics["test"],
    }


def cut_of(manifest: Manifest) -> dict[str, Any]:
    """How a student was cut: method, layers, what was refitted, and what the scan of blocks found."""
    return {
        "method": manifest.metrics["method"],
        "dropped_layers": manifest.metrics["dropped_layers"],
        "width": manifest.details["plan"]["width"],
        "compensation": manifest.details.get("compensation", {}),
        "depth": manifest.details.get("depth", {}),
    }


def render_cuts(cuts: dict[str, dict[str, Any]]) -> list[str]:
    """One line a student."""
    lines = []
    for name, cut in cuts.items():
        parts = [f"{size} {value}" for size, value in cut["width"].items()]
        if cut["dropped_layers"]:
            parts.append(f"layers {', '.join(map(str, cut['dropped_layers']))} dropped")
        energy, depth = cut["compensation"].get("kept_energy"), cut["depth"]
        if energy is not None:
            parts.append(f"{energy:.1%} of the stream's energy kept")
        if len(depth.get("blocks", ())) > 1:
            losses = [f"{block['first']}-{block['last']}: {block['loss']:.3f}" for block in depth["blocks"]]
            parts.append(f"loss without layers {'; '.join(losses)} (teacher {depth['teacher_loss']:.3f})")
        lines.append(f"{name} ({cut['method']}): " + ", ".join(parts))
    return lines


def add_gaps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each line its share of the teacher's parameters and, after pruning, how much of the gap it closed.

    gap closed = (pruned - this) / (pruned - teacher), of test losses; the teacher is the corrected one. What lacks one
    of them gets None, and so does what was cut for less than twice the noise; `gap_in_noise` says which it is.
    """
    teacher = next((entry for entry in rows if entry["kind"] == "corrected"), None)
    pruned = {entry["student"]: entry for entry in rows if entry["kind"] == "pruned"}
    for entry in rows:
        entry["share_of_teacher"] = entry["gap_closed"] = None
        entry["gap_in_noise"] = False
        if teacher is None:
            continue
        entry["share_of_teacher"] = entry["parameters"] / teacher["parameters"]
        if entry["kind"] in ("distilled", "control") and entry["student"] in pruned:
            before = pruned[entry["student"]]["test"]["loss"]
            gap, closed = before - teacher["test"]["loss"], before - entry["test"]["loss"]
            entry["gap_in_noise"] = gap <= 2 * noise(max(abs(gap), abs(closed)), entry["test"].get("tokens"))
            entry["gap_closed"] = None if entry["gap_in_noise"] else closed / gap
    return rows


def noise(difference: float, tokens: object) -> float:
    """Standard deviation of a difference of two test losses, nats a token.

        sqrt(SEEDS^2 + CLUSTERING * VARIANCE_OF_DIFFERENCE * difference / tokens)

    Args:
        tokens: that both were measured on; anything but a number: not known, and nothing is said of them.
    """
    counted = number(tokens) or 0.0
    sampled = CLUSTERING * VARIANCE_OF_DIFFERENCE * difference / counted if counted > 0 else 0.0
    return math.sqrt(SEEDS**2 + sampled)


def gap_text(entry: Mapping[str, Any]) -> str:
    """The share of the gap that was closed; a dash where the gap is less than its noise, and nothing without a gap."""
    if entry["gap_closed"] is not None:
        return f"{entry['gap_closed']:.0%}"
    return NOTHING if entry.get("gap_in_noise") else ""


def render_table(rows: list[dict[str, Any]]) -> str:
    """The table as aligned text."""
    lines = [
        (
            entry["model"],
            human(entry["parameters"]),
            "" if entry["share_of_teacher"] is None else f"{entry['share_of_teacher']:.0%}",
            f"{entry['validation']['loss']:.4f}",
            f"{entry['validation']['perplexity']:.2f}",
            f"{entry['test']['loss']:.4f}",
            f"{entry['test']['perplexity']:.2f}",
            gap_text(entry),
        )
        for entry in rows
    ]
    return aligned([COLUMNS, *lines])


def legend(rows: list[dict[str, Any]]) -> str:
    """What stands under the table."""
    text = "losses in nats a token; gap closed = (pruned - this) / (pruned - corrected teacher), of test losses"
    shown = any(entry["gap_in_noise"] for entry in rows)
    return f"{text}; {NOTHING}: the cut cost no more than the noise of that" if shown else text


def render_stages(stages: list[dict[str, Any]]) -> str:
    """Wall time and peak memory of each stage as aligned text."""
    lines = [("stage", "seconds", "peak memory")]
    lines += [
        (entry["stage"], f"{entry['seconds']:.1f}", f"{entry['peak_memory_bytes'] / 2**20:.0f} MiB") for entry in stages
    ]
    lines.append(("total", f"{sum(entry['seconds'] for entry in stages):.1f}", ""))
    return aligned(lines)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence a student: whether distilling beat retraining with the LM loss alone."""
    sentences = []
    for name in dict.fromkeys(entry["student"] for entry in rows if entry["student"]):
        by_kind = {entry["kind"]: entry for entry in rows if entry["student"] == name}
        if {"distilled", "control"} <= set(by_kind):
            difference = by_kind["control"]["test"]["loss"] - by_kind["distilled"]["test"]["loss"]
            word = "beats" if difference > 0 else "does not beat"
            sentences.append(
                f"{name}: distillation {word} retraining with the LM loss alone by {abs(difference):.4f} nats a token"
                if difference
                else f"{name}: distillation and retraining with the LM loss alone end level"
            )
    return sentences


def share(value: float | None, error: float | None = None) -> str:
    """A share of one in percent, with its standard error where there is one; none: a dash."""
    if value is None:
        return "-"
    return f"{value:.1%}" if error is None else f"{value:.1%} ± {100 * error:.1f}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text: a heading, a rule, the first column to the left and the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rendered = []
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        rendered.append("  ".join(cells).rstrip())
    rendered.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(rendered)
