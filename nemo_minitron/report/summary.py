"""report.json: all that a report says, of one run or of several."""

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_minitron.artifacts.stages import COMMANDS
from nemo_minitron.report.text import flat

#: Of the settings of a stage, those that say where things lie.
PLACES = ("output", "path", "prefix", "exp_dir", "name", "folder", "save_path", "dir", "tokenizer")
#: What the command of a whole flow is called.
WHOLE_RUN = "the whole run"
Repeat = Callable[[str, Mapping[str, Any]], str | None]


def environment() -> dict[str, Any]:
    """The machine that a run is on: system, processors, memory, and GPUs where torch uses them."""
    machine: dict[str, Any] = {"system": platform.platform(), "processors": os.cpu_count() or 0}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        machine["memory"] = f"{gigabytes:.0f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        machine["gpus"] = names
    return machine


def run_report(run: Mapping[str, Any], repeat: Repeat) -> dict[str, Any]:
    """report.json of one run as `collect` read it, without its pictures.

    Args:
        repeat: the command that makes a stage's result again, from the stage's kind and configuration.
    """
    told = run["report"]
    versions: dict[str, str] = next((stage["versions"] for stage in reversed(run["stages"])), {})
    commands = {}
    if isinstance(told.get("config"), dict):
        commands[WHOLE_RUN] = repeat("flow", told["config"])
    for stage in run["stages"]:
        config = stage["config"]
        own = config.get("command", config)
        if isinstance(own, dict):
            commands[stage["stage"]] = repeat(COMMANDS.get(stage["kind"], stage["kind"]), own)
    machine = told.get("environment")
    machine = {key: value for key, value in machine.items() if key != "versions"} if isinstance(machine, dict) else {}
    return {
        **{name: value for name, value in told.items() if name != "pictures"},
        "name": run["name"],
        "run": run["run"],
        "table": run["table"],
        "verdicts": run["verdicts"],
        "cuts": run["cuts"],
        "facts": run["facts"],
        "searches": run["searches"],
        "stages": run["stages"],
        "unfinished": [{name: stage[name] for name in ("stage", "kind", "folder")} for stage in run["unfinished"]],
        "missing": list(run["missing"]),
        "commands": {name: command for name, command in commands.items() if command},
        "environment": {"versions": versions, **machine},
    }


def comparison_report(reports: Sequence[Mapping[str, Any]], missing: Sequence[str]) -> dict[str, Any]:
    """The JSON report of several runs."""
    return {"runs": list(reports), "differences": differences(reports), "missing": list(missing)}


def differences(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings that are not the same in all runs, of the stages that all have; places left out."""
    by_folder = [{stage["folder"]: stage for stage in report["stages"]} for report in reports]
    different = []
    for folder, stage in by_folder[0].items():
        if not all(folder in stages for stages in by_folder):
            continue
        settings = [flat(stages[folder]["config"]) for stages in by_folder]
        for name in dict.fromkeys(name for each in settings for name in each):
            values = [each.get(name) for each in settings]
            if name.rpartition(".")[2].endswith(PLACES) or all(value == values[0] for value in values):
                continue
            different.append({"stage": stage["stage"], "setting": name, "values": values})
    return different
