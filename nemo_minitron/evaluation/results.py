"""Results of an evaluation as a table: a line a metric, a column a checkpoint."""

from typing import Any

from nemo_minitron.architecture import human
from nemo_minitron.evaluation.facts import CHOICE, COMPLETION, known
from nemo_minitron.report.table import aligned, share

#: Metrics that are not shares of one, and how they are written.
FORMATS = {
    "token_loss": ".4f", "token_perplexity": ".3f", "word_perplexity": ".2f", "byte_perplexity": ".4f",
    "bits_per_byte": ".4f", "rouge1": ".2f", "rouge2": ".2f", "rougeL": ".2f", "rougeLsum": ".2f",
    "total_latency_seconds": ".2f", "output_tokens": ".0f", "tokens_per_second": ".1f", "perplexity": ".3f",
}  # fmt: skip


def rows_of(results: dict[str, Any], shown: list[str]) -> list[tuple[str, str]]:
    """(task, metric) of each line: what was asked for, groups by their own figures and not by their parts'."""
    measured = next(iter(results.values()))
    wanted = [name for name in shown if name in measured]
    asked_without_figures = [name for name in shown if name not in measured]
    if asked_without_figures:
        wanted += [name for name in measured if name not in wanted]
    else:
        wanted += [name for name in ("perplexity", "summarization") if name in measured and name not in wanted]
    return [(task, metric) for task in wanted for metric in measured[task]]


def render(results: dict[str, Any]) -> str:
    """The table, and below it what was kept of the reference's facts."""
    names = [model["name"] for model in results["models"]]
    head = [("", *names), ("parameters", *(human(model["parameters"]) for model in results["models"]))]
    lines = [
        (f"{task} {metric}", *(_shown(metric, results["results"][name][task][metric]) for name in names))
        for task, metric in map(tuple, results["shown"])
        if task not in (CHOICE, COMPLETION)
    ]
    text = [aligned([*head, *lines]), f"± one standard error{_windows(results)}"] if lines else []
    if "facts" in results:
        text += ["", *render_facts(results)] if lines else render_facts(results)
    return "\n".join([*text, *(f"note: {note}" for note in results["notes"])])


def _windows(results: dict[str, Any]) -> str:
    """In what windows texts were read."""
    return f"; perplexity in windows of {results['window']} tokens" if "window" in results else ""


def render_facts(results: dict[str, Any]) -> list[str]:
    """A table with a line a model: how many of the facts it knows, and what share of the reference's it kept."""
    measured, kept = results["results"], results["facts"]["kept"]
    lines = [("facts of the training text", "parameters", "choice", "known", "kept", "completion", "kept")]
    for model in results["models"]:
        name = model["name"]
        choice, completion = kept[name][CHOICE], kept[name][COMPLETION]
        lines.append(
            (
                name,
                human(model["parameters"]),
                _shown("acc", measured[name][CHOICE]["acc"]),
                share(known(measured[name][CHOICE]["acc"]["value"], results["facts"]["chance"])),
                share(choice["value"], choice["stderr"]),
                _shown("acc", measured[name][COMPLETION]["acc"]),
                share(completion["value"], completion["stderr"]),
            )
        )
    asked, chance = results["facts"]["questions"], results["facts"]["chance"]
    return [
        aligned(lines),
        f"{asked} facts that the training split states; choice: right ones of four, guessing gets {chance:.0%}; known: "
        "choice above guessing;",
        f"completion: right ones, greedily; kept: of those that {results['reference']} gets right",
    ]


def _shown(metric: str, entry: dict[str, Any]) -> str:
    form = FORMATS.get(metric.partition(" ")[0], ".4f")
    if entry["stderr"] is None:
        return f"{entry['value']:{form}}"
    return f"{entry['value']:{form}} ± {entry['stderr']:{form}}"
