"""report.json of a flow that has run, and the tables that it prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron import config as c
from nemo_minitron.artifacts import Manifest, versions, write_json
from nemo_minitron.artifacts.stages import MODELS
from nemo_minitron.flow.models import as_asked
from nemo_minitron.flow.steps import Step
from nemo_minitron.report.stages import REPORT

#: All steps of a flow, in order, each with what it left.
Results = Sequence[tuple[Step[Any], Manifest]]


def write_summary(config: c.FlowConfig, results: Results) -> dict[str, Any]:
    """Writes report.json; returns what is in it."""
    report = summarize(config, results)
    write_json(Path(config.output_dir) / REPORT, report)
    return report


def summarize(config: c.FlowConfig, results: Results) -> dict[str, Any]:
    """report.json: the table, each stage's time and memory, and how all of it was made."""
    from nemo_minitron.report.summary import environment
    from nemo_minitron.report.table import add_gaps, cut_of, verdicts

    def of(kind: str) -> dict[str, Manifest]:
        """Student ('' where it is none's) -> what the steps of a kind left."""
        return {step.student or "": manifest for step, manifest in results if step.kind == kind}

    rows = add_gaps(_rows(results))
    facts = of("facts")
    return {
        "table": rows,
        "verdicts": verdicts(rows),
        "cuts": {name: cut_of(manifest) for name, manifest in of("prune").items()},
        "instructed": {name: manifest.metrics["validation"] for name, manifest in of("instruct").items()},
        **({"facts": facts[""].metrics} if facts else {}),
        "stages": [
            {
                "stage": step.name,
                "folder": step.output.relative_to(config.output_dir).as_posix(),
                "seconds": manifest.timings.get("total_seconds", 0.0),
                "peak_memory_bytes": manifest.peak_memory_bytes,
            }
            for step, manifest in results
        ],
        "data": of("data")[""].metrics,
        "config": as_asked(config),
        "versions": versions(),
        "environment": environment(),
        "seed": config.seed,
    }


def _rows(results: Results) -> list[dict[str, Any]]:
    """The lines of the table, of the models that were evaluated."""
    from nemo_minitron.report.table import row

    evaluated = {f"evaluate {kind}": kind for kind in MODELS}
    return [
        row(MODELS[kind].format(student=step.student), manifest.metrics, student=step.student, kind=kind)
        for step, manifest in results
        if (kind := evaluated.get(step.kind)) is not None
    ]


def show(config: c.FlowConfig, report: dict[str, Any]) -> None:
    """Prints the tables of a report."""
    from nemo_minitron.report.table import legend, render_cuts, render_stages, render_table

    print()
    print(render_table(report["table"]))
    print()
    for cut in render_cuts(report["cuts"]):
        print(cut)
    print(legend(report["table"]))
    for verdict in report["verdicts"]:
        print(verdict)
    for name, validation in report["instructed"].items():
        losses = ", ".join(f"{entry['lm_loss']:.4f} (step {entry['step']})" for entry in validation)
        print(f"{name} instructed: loss of the answers in validation {losses}")
    print()
    if "facts" in report:
        from nemo_minitron.evaluation.results import render_facts

        print("\n".join([*render_facts(report["facts"]), ""]))
    print(render_stages(report["stages"]))
    print()
    print(f"report: {Path(config.output_dir) / REPORT}")
