"""`minitron report`: a run, or several beside each other, as report.html and report.json.

A report is derived from manifests: it may be written again over itself, and over nothing else.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_minitron import config as c
from nemo_minitron.artifacts import json_text, replace_file
from nemo_minitron.config.command_line import repeat
from nemo_minitron.errors import ConfigError, EngineError, MinitronError, OutputExistsError
from nemo_minitron.jobs.job import disk_has_room
from nemo_minitron.report.collect import collect
from nemo_minitron.report.stages import PAGE, read_json

COMPARISON = "compare.html"


def report(config: c.ReportConfig) -> None:
    """`minitron report RUN...`: writes the page and its JSON, and says where they are.

    Raises:
        ConfigError: a run is named twice, or the output is a run's own checkpoint.
        EngineError: matplotlib or jinja2 is not installed.
        MinitronError: what is named is not a run; nothing is written.
        OutputExistsError: a file of that name is there that is no report.
    """
    check_libraries()
    runs = [collect(run) for run in config.runs]
    page = page_path(config)
    check_free(page, config.overwrite)
    if len(runs) == 1:
        written = write_run(runs[0], page)
    else:
        written = write_comparison(runs, page)
    for sentence in written["missing"]:
        print(f"not there: {sentence}")
    print(f"report: {page.with_suffix('.json')}")
    print(f"page: {page}")


def draw(run: Path) -> None:
    """Writes the page of a run and prints where it is; without what draws it, says so: the run itself is done."""
    try:
        check_free(run / PAGE, overwrite=False)
        write_run(collect(run), run / PAGE)
    except MinitronError as error:
        print(f"no page: {error}; then `minitron report {run}`", file=sys.stderr)
    else:
        print(f"page: {run / PAGE}")


def check_libraries() -> None:
    """Raises EngineError where what draws the pictures is not installed."""
    lacking = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if lacking:
        raise EngineError(f"a report needs {' and '.join(lacking)}: pip install {' '.join(lacking)}")


def page_path(config: c.ReportConfig) -> Path:
    """Where the page goes; its JSON lies beside it."""
    if config.output is not None:
        output = Path(config.output)
        return output if output.suffix in (".html", ".htm") and not output.is_dir() else output / PAGE
    if len(config.runs) > 1:
        return Path(COMPARISON)
    run = Path(config.runs[0])
    return run / PAGE if run.is_dir() else run.with_name(f"{run.name}.report.html")


def check_free(page: Path, overwrite: bool) -> None:
    """Raises OutputExistsError where writing would replace a file that is no report."""
    from nemo_minitron.report.page import is_ours

    around = next((folder for folder in page.absolute().parents if folder.exists()), None)
    if around is not None and not around.is_dir():
        raise ConfigError(f"output = {page}: {around} is a file; name another place", "minitron report")
    for path in (page, page.with_suffix(".json")):
        if path.is_dir():
            raise ConfigError(f"output = {page}: {path} is a folder; name another file", "minitron report")
        if overwrite or not path.exists():
            continue
        if path == page:
            with path.open(encoding="utf-8", errors="replace") as file:
                ours = is_ours(file.read(4096))
        else:
            value = read_json(path)
            ours = isinstance(value, dict) and (
                {"table", "stages"} <= value.keys() or {"runs", "differences"} <= value.keys()
            )
        if not ours:
            raise OutputExistsError(
                f"{path} exists and is no report: give another output=NAME.html, or overwrite=true to replace it"
            )


def write_run(run: dict[str, Any], page: Path) -> dict[str, Any]:
    """Writes page and JSON of one run as `collect` read it; returns the JSON's content.

    Raises:
        EngineError: matplotlib or jinja2 is not installed.
        MinitronError: the disk is full.
    """
    check_libraries()
    from nemo_minitron.report.page import report_page
    from nemo_minitron.report.pictures import drawn, pictures_of
    from nemo_minitron.report.summary import run_report

    made = run_report(run, repeat)
    pictures = drawn(pictures_of(run), made["missing"])
    return _write(page, report_page(made, pictures), made, pictures)


def write_comparison(runs: list[dict[str, Any]], page: Path) -> dict[str, Any]:
    """Writes page and JSON of several runs; returns the JSON's content."""
    from nemo_minitron.report.page import comparison_page
    from nemo_minitron.report.pictures import comparison_pictures, drawn
    from nemo_minitron.report.summary import comparison_report, run_report

    names = [run["name"] for run in runs]
    named = {run["name"] if names.count(run["name"]) == 1 else run["run"]: run for run in runs}
    reports = [{**run_report(run, repeat), "name": name} for name, run in named.items()]
    missing: list[str] = []
    pictures = drawn(comparison_pictures(named), missing)
    made = comparison_report(reports, missing)
    return _write(page, comparison_page(made, pictures), made, pictures)


def _write(page: Path, text: str, made: dict[str, Any], pictures: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes both files beside and renames them; the JSON holds the pictures on light paper, at its end."""
    shown = [{**picture, "svg": picture["svg"]["light"]} for picture in pictures]
    content = {**made, "pictures": shown}
    with disk_has_room(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        replace_file(page.with_suffix(".json"), json_text(content))
        replace_file(page, text)
    return content
