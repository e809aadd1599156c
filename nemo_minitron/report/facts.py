"""What an evaluation found out about facts (minitron evaluate tasks=facts), for the page and its picture."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.architecture import human
from nemo_minitron.artifacts.stages import model_name
from nemo_minitron.report.stages import number
from nemo_minitron.report.table import share

TASKS = {"choice": "facts_choice", "completion": "facts_completion"}


def facts_of(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The facts of an evaluation's metrics; None where they hold none.

    Returns:
        ``questions``, ``chance``, ``reference``; ``rows``: ``model``, ``kind``, ``parameters``, and for ``choice`` and
        ``completion``: ``right``, ``kept`` (share of the reference's right answers; its value is None where it has
        none), each (value, standard error or None).

    Raises:
        TypeError: the metrics are not what `minitron evaluate` writes.
    """
    told = metrics.get("facts")
    if not isinstance(told, dict):
        return None
    try:
        rows = [_row(model, metrics, told["kept"]) for model in metrics["models"]]
        numbers = {name: number(told[name]) for name in ("questions", "chance")}
        reference = str(metrics["reference"])
    except (KeyError, TypeError, AttributeError) as error:
        raise TypeError(f"not the metrics of facts: {error}") from None
    if None in numbers.values() or not rows:
        raise TypeError("not the metrics of facts: numbers are missing")
    return {**numbers, "reference": reference, "rows": rows}


def _row(model: Mapping[str, Any], metrics: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    name, parameters = str(model["name"]), number(model["parameters"])
    if parameters is None:
        raise TypeError("parameters")
    row = {"model": name, "kind": model_name(name.replace(" ", "-"))[2], "parameters": parameters}
    for short, task in TASKS.items():
        right = _pair(metrics["results"][name][task]["acc"])
        if right[0] is None:
            raise TypeError(task)
        row[short] = {"right": right, "kept": _pair(kept[name][task])}
    return row


def _pair(entry: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return number(entry["value"]), number(entry["stderr"])


def cells(facts: Mapping[str, Any]) -> list[list[str]]:
    """The table's lines as texts: model, parameters, and of both kinds of question right and kept."""
    return [
        [row["model"], human(row["parameters"])]
        + [share(*row[task][what]) for task in TASKS for what in ("right", "kept")]
        for row in facts["rows"]
    ]


def in_words(facts: Mapping[str, Any]) -> str:
    return "; ".join(f"{line[0]}: {line[2]} right of four, {line[3]} kept" for line in cells(facts))
