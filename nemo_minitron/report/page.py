"""report.html, from report.json and pictures.

One file with its pictures in it, that asks the network for nothing and runs no script.
"""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import human
from nemo_minitron.report import searching
from nemo_minitron.report.facts import cells, facts_of
from nemo_minitron.report.summary import WHOLE_RUN
from nemo_minitron.report.table import gap_text, legend, render_cuts
from nemo_minitron.report.text import counted, duration, flat_rows, mebibytes, percent, text_of

#: What tells a page of ours from any other file.
MARKER = "nemo_minitron report"
SECTIONS = {
    "result": "Result",
    "search": "Search",
    "importance": "Importance in the teacher",
    "training": "Losses",
    "cost": "Time and memory",
}
STAGES_TEXT = ["Each with its command, where it has one, its settings, inputs by content, and what was measured."]


@dataclasses.dataclass
class Table:
    """A table of a page: texts alone; `align` is `number` or `text`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    align: str = "text"


@dataclasses.dataclass
class Block:
    """Something to unfold."""

    title: str
    aside: str = ""
    command: str = ""
    tables: Sequence[Table] = ()
    open: bool = False


@dataclasses.dataclass
class Section:
    """A part of a page."""

    id: str
    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Mapping[str, Any]] = ()
    blocks: Sequence[Block] = ()

    def __bool__(self) -> bool:
        return bool(self.texts or self.tables or self.pictures or self.blocks)


def render(title: str, lead: str, sections: Sequence[Section], missing: Sequence[str], footer: str) -> str:
    """The page as text; every value in it is escaped."""
    import jinja2
    from markupsafe import Markup

    folder = Path(__file__).parent
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    table = engine.from_string((folder / "table.html").read_text(encoding="utf-8"))
    page = engine.from_string((folder / "page.html").read_text(encoding="utf-8"))
    text = page.render(
        title=title,
        lead=lead,
        sections=[dataclasses.replace(section, pictures=[_embedded(picture) for picture in section.pictures])
                  for section in sections if section],
        missing=missing,
        footer=footer,
        marker=MARKER,
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        draw_table=lambda shown: Markup(table.render(table=shown)),
    )  # fmt: skip
    return "".join(letter if letter in "\n\t" or letter.isprintable() else " " for letter in text)


def is_ours(page: str) -> bool:
    """Whether the text of a file is a page of ours."""
    return f'<meta name="generator" content="{MARKER}">' in page[:4096]


def _embedded(picture: Mapping[str, Any]) -> dict[str, Any]:
    """A picture with its images as data URIs."""
    images = {
        theme: f"data:image/svg+xml;base64,{base64.b64encode(text.encode('utf-8')).decode('ascii')}"
        for theme, text in picture["svg"].items()
    }
    return {**picture, "light": images["light"], "dark": images.get("dark")}


def report_page(report: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> str:
    """The page of one run, from its report.json and its pictures (with both themes)."""
    sections = [
        _result(report, pictures),
        _search(report, pictures),
        *(Section(name, SECTIONS[name], pictures=_of(pictures, name)) for name in ("importance", "training")),
        Section(
            "cost",
            SECTIONS["cost"],
            [],
            [],
            _of(pictures, "cost"),
            [Block("As a table", tables=[stage_table(report["stages"])])] if report["stages"] else [],
        ),
        Section("repeat", "To do it again", repeat_texts(report), blocks=_whole_run(report)),
        Section(
            "stages",
            "Stages",
            STAGES_TEXT if report["stages"] else [],
            blocks=[_stage_block(stage, report["commands"].get(stage["stage"], "")) for stage in report["stages"]],
        ),
        Section("environment", "Environment", tables=_environment(report)),
    ]
    stages = report["stages"]
    seconds = sum(stage["seconds"] for stage in stages)
    lead = f"{report['run']}: {counted(len(stages), 'stage')}, {duration(seconds)}"
    ended = max((stage["created"] for stage in stages), default="")
    return render(
        f"{report['name']}: what was cut, and what it kept", lead + (f", ended {ended}" if ended else ""), sections,
        report["missing"], "Losses are in nats a token. Made by minitron report from the run's manifests.",
    )  # fmt: skip


def _of(pictures: Sequence[Mapping[str, Any]], section: str) -> list[Mapping[str, Any]]:
    return [picture for picture in pictures if picture["section"] == section]


def _result(report: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> Section:
    tables = [model_table(report["table"])] if report["table"] else []
    facts = facts_of(report["facts"] or {})
    tables += [facts_table(facts)] if facts else []
    noted = [legend(report["table"])] if any(row["gap_in_noise"] for row in report["table"]) else []
    texts = [*report["verdicts"], *noted, *_cut_lines(report["cuts"])]
    return Section("result", SECTIONS["result"], texts, tables, _of(pictures, "result"))


def _search(report: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> Section:
    """What each search of a run found; `Folder: ` before it where there are several."""
    texts, tables = [], []
    for folder, search in report["searches"].items():
        before = f"{folder}: " if len(report["searches"]) > 1 else ""
        texts += [before + text for text in searching.texts(search)]
        for title, (columns, rows) in (
            ("Teacher and finalists", searching.finalist_cells(search)),
            ("Rivals: the shape of each kind nearest to the budget", searching.rival_cells(search)),
            ("Candidates, by the round that they reached", searching.candidate_cells(search)),
        ):
            tables += [Table(columns, rows, before + title, align="number")] if rows else []
    return Section("search", SECTIONS["search"], texts, tables, _of(pictures, "search"))


def _cut_lines(cuts: Mapping[str, Any]) -> list[str]:
    return [line for name, cut in cuts.items() for line in _cut_line(name, cut)]


def _cut_line(name: str, cut: Any) -> list[str]:
    try:
        return render_cuts({name: cut})
    except (KeyError, TypeError, ValueError, AttributeError):
        return [f"{name}: how it was cut cannot be read"]


def model_table(rows: Sequence[Mapping[str, Any]], runs: Sequence[str] = ()) -> Table:
    """The table of the models; `runs`: a row's run, where there are several."""
    columns = ["model", *(["run"] if runs else []), "parameters", "of teacher", "val loss", "val ppl", "test loss",
               "test ppl", "gap closed"]  # fmt: skip
    cells = [
        [
            row["model"],
            *([runs[index]] if runs else []),
            human(row["parameters"]),
            percent(row["share_of_teacher"]),
            f"{row['validation']['loss']:.4f}",
            f"{row['validation']['perplexity']:.2f}",
            f"{row['test']['loss']:.4f}",
            f"{row['test']['perplexity']:.2f}",
            gap_text(row),
        ]
        for index, row in enumerate(rows)
    ]
    return Table(columns, cells, align="number")


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Which facts of the training text each model knows."""
    columns = ["model", "parameters", "right of four", "kept", "completed", "kept"]
    title = (
        f"{facts['questions']:.0f} facts that the training text states (guessing gets {facts['chance']:.0%} of the "
        f"choices); kept: of those that {facts['reference']} gets right"
    )
    return Table(columns, cells(facts), title, align="number")


def stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """Time and memory of each stage."""
    rows = [[stage["stage"], f"{stage['seconds']:.1f}", mebibytes(stage["peak_memory_bytes"])] for stage in stages]
    rows.append(["total", f"{sum(stage['seconds'] for stage in stages):.1f}", ""])
    return Table(["stage", "seconds", "peak memory"], rows, align="number")


def repeat_texts(report: Mapping[str, Any]) -> list[str]:
    """What stands before the commands."""
    if WHOLE_RUN in report["commands"]:
        return ["A stage whose manifest matches is not run again. Give another output_dir to run all of it anew."]
    return [] if report["commands"] else ["This version's commands take no such configuration as this run's."]


def _whole_run(report: Mapping[str, Any]) -> list[Block]:
    command = report["commands"].get(WHOLE_RUN)
    return [Block(WHOLE_RUN, command=command, open=True)] if command else []


def _stage_block(stage: Mapping[str, Any], command: str) -> Block:
    tables = [
        Table(["setting", "value"], flat_rows(stage["config"]), "Configuration"),
        Table(["input", "path", "fingerprint"],
              [[name, text_of(entry.get("path", "")), text_of(entry.get("fingerprint", ""))] for name, entry in
               stage["inputs"].items()], "Inputs"),
        Table(["measured", "value"], flat_rows(stage["metrics"]) + flat_rows(stage["timings"]), "Measured"),
    ]  # fmt: skip
    aside = f"{duration(stage['seconds'])}, {mebibytes(stage['peak_memory_bytes'])}"
    notes = [["folder", stage["folder"] or "."], ["ended", stage["created"]], ["seed", text_of(stage["seed"])]]
    notes += [["log", stage["log"]]] if stage["log"] else []
    tables.insert(0, Table(["", ""], notes))
    return Block(stage["stage"], aside, command, [table for table in tables if table.rows])


def _environment(report: Mapping[str, Any]) -> list[Table]:
    environment = report["environment"]
    tables = [Table(["package", "version"], flat_rows(environment["versions"]), "Versions")]
    machine = {name: value for name, value in environment.items() if name != "versions"}
    if machine:
        tables.append(Table(["machine", ""], flat_rows(machine), "Machine"))
    return tables


def comparison_page(report: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> str:
    """The page of several runs, from the comparison's report and its pictures."""
    runs = report["runs"]
    models = list(dict.fromkeys(row["model"] for run in runs for row in run["table"]))
    rows = [(row, run["name"]) for model in models for run in runs for row in run["table"] if row["model"] == model]
    tables = [model_table([row for row, _ in rows], [name for _, name in rows])] if rows else []
    texts = [f"{run['name']}: {sentence}" for run in runs for sentence in run["verdicts"]]
    names = [run["name"] for run in runs]
    sections = [
        Section("result", SECTIONS["result"], texts, tables, _of(pictures, "result")),
        Section("training", SECTIONS["training"], pictures=_of(pictures, "training")),
        Section("differences", "Settings that differ", _alike(report["differences"]),
                [Table(["stage", "setting", *names],
                       [[entry["stage"], entry["setting"], *map(text_of, entry["values"])] for entry in
                        report["differences"]])] if report["differences"] else []),
        Section("cost", SECTIONS["cost"], tables=[comparison_cost(runs)]),
        Section("repeat", "To do it again", blocks=[
            Block(f"{run['name']}: {name}", command=command) for run in runs for name, command in
            list(run["commands"].items())[:1]]),
        Section("environment", "Environment", tables=[
            Table(["package", *names], _side_by_side([run["environment"]["versions"] for run in runs]), "Versions")]),
    ]  # fmt: skip
    missing = [f"{run['name']}: {sentence}" for run in runs for sentence in run["missing"]]
    lead = "; ".join(f"{run['name']} = {run['run']}" for run in runs)
    return render(f"{counted(len(runs), 'run')} beside each other", lead, sections, [*missing, *report["missing"]],
                  "Losses are in nats a token. Made by minitron report from the runs' manifests.")  # fmt: skip


def _alike(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    return [] if differences else ["The stages that the runs share have the same settings."]


def comparison_cost(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds of each stage, a column a run."""
    seconds = [{stage["stage"]: f"{stage['seconds']:.1f}" for stage in run["stages"]} for run in runs]
    totals = [{"total": f"{sum(stage['seconds'] for stage in run['stages']):.1f}"} for run in runs]
    rows = _side_by_side(seconds) + _side_by_side(totals)
    return Table(["stage (seconds)", *(run["name"] for run in runs)], rows, align="number")


def _side_by_side(columns: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [[str(name), *(text_of(column.get(name, "")) for column in columns)] for name in names]
