"""Settings of `minitron report`."""

import dataclasses
from dataclasses import field
from pathlib import Path

from nemo_minitron.config.schemas.base import Config


@dataclasses.dataclass(kw_only=True)
class ReportConfig(Config):
    """What `minitron report` shows, and where it writes it."""

    runs: list[str] = field(default_factory=list)
    """Folders: a flow's output_dir, or a stage's folder; several are compared on one page."""
    output: str | None = None
    """Page to write (NAME.html, with NAME.json beside it), or a folder for report.html and report.json; none: in the
    run itself, or compare.html in the current directory for several."""
    overwrite: bool = False
    """Also replace a file of that name that is not a report."""

    def problems(self) -> list[str]:
        if not self.runs:
            return ["runs is missing: name a run's folder, minitron report RUN"]
        problems = [f"runs: {run!r} names no folder" for run in self.runs if not run.strip()]
        twice = {run for run in self.runs if [Path(other) for other in self.runs].count(Path(run)) > 1}
        return problems + [f"runs: {run} is named twice" for run in sorted(twice)]
