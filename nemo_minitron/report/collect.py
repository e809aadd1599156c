"""Reads a run into one plain dict: its stages' manifests, histories, scores, scans, cuts and table.

A run is a flow's output folder, any folder with stages in it, or one stage's own folder or archive. What a half-done
run does not have yet is said under ``missing``; what is damaged is said there too, and left out. Files are data:
nothing in them is trusted to have the right kind or to be finite.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import MANIFEST, DepthScan, ImportanceScores, Manifest
from nemo_minitron.artifacts.stages import COMMANDS, EVALUATIONS, MODELS, STAGES, model_name, stage_name, students_of
from nemo_minitron.errors import MinitronError
from nemo_minitron.report.facts import facts_of
from nemo_minitron.report.searching import RESULT, search_of
from nemo_minitron.report.stages import (
    REPORT,
    log_file,
    number,
    read_json,
    read_manifests,
    read_report,
    unfinished_stages,
)
from nemo_minitron.report.table import add_gaps, cut_of, row, verdicts

#: What the manifest of a search says made it.
SEARCH = "search"


def collect(path: str | os.PathLike) -> dict[str, Any]:
    """Everything that a report shows of the run at `path`.

    Returns:
        ``run``, ``name``; ``flow``: whether it is a flow's output; ``report``: the flow's own report.json;
        ``stages``: a dict a finished stage; ``unfinished``: one a stage that is running or was stopped;
        ``histories``: stage -> losses; ``importance``; ``scans``; ``cuts``; ``shapes``; ``table``; ``verdicts``;
        ``facts``: an evaluation's metrics (see facts_of), or None; ``searches``: folder -> what a search found (see
        search_of); ``missing``: sentences.

    Raises:
        MinitronError: there is nothing, or nothing of a run, at `path`.
    """
    place = Path(path)
    if not place.exists():
        raise MinitronError(f"{place}: no such run; name a flow's output_dir or a stage's folder")
    missing: list[str] = []
    finished = _whole(list(read_manifests(place, missing)))
    unfinished = unfinished_stages(place)
    if not finished and not unfinished:
        why = "; ".join(missing) or f"there is no {MANIFEST} in it and no stage below it"
        raise MinitronError(f"{place} is not a run: {why}. Name a flow's output_dir or a stage's folder")
    single = len(finished) == 1 and finished[0][0] in ("", place.name) and not unfinished
    report = {} if single else read_report(place / REPORT)
    flow = not single and _is_flow(report, finished, unfinished)
    stages = [_stage(place, folder, manifest, report) for folder, manifest in finished]
    order = [entry.get("folder") for entry in report.get("stages", ()) if isinstance(entry, dict)]
    stages.sort(key=lambda stage: (stage["created"], _order(stage, order), stage["folder"]))
    run: dict[str, Any] = {
        "run": str(place),
        "name": place.resolve().name or str(place),
        "flow": flow,
        "report": report,
        "stages": stages,
        "unfinished": unfinished,
        "missing": missing,
    }
    manifests = {
        stage["folder"]: manifest for stage in stages for folder, manifest in finished if folder == stage["folder"]
    }
    run["histories"] = _histories(stages, manifests)
    run["scans"] = _scans(place, manifests, missing)
    run["importance"] = _importance(place, manifests, missing)
    run |= _cuts(manifests, missing)
    run["table"] = _table(manifests, missing) if flow else []
    run["facts"] = _facts(manifests, missing)
    run["searches"] = _searches(place, manifests, missing)
    run["verdicts"] = verdicts(run["table"])
    if flow:
        missing += _missing(manifests, unfinished)
    return run


def _whole(finished: list[tuple[str, Manifest]]) -> list[tuple[str, Manifest]]:
    """The stages without the parts of a search: the time of its student's training is the search's own."""
    searches = {folder for folder, manifest in finished if manifest.stage == SEARCH}
    return [(folder, manifest) for folder, manifest in finished if folder.rpartition("/")[0] not in searches - {""}]


def _is_flow(report: dict[str, Any], finished: list[tuple[str, Manifest]], unfinished: list[dict[str, Any]]) -> bool:
    folders = {folder for folder, _ in finished} | {stage["folder"] for stage in unfinished}
    data, *teachers = (STAGES[kind].folder for kind in ("data", "correct", "pretrain"))
    return bool(report.get("table")) or (data in folders and not folders.isdisjoint(teachers))


def _order(stage: Mapping[str, Any], told: list[Any]) -> int:
    """Where a stage stands among those that ended in the same second."""
    if stage["folder"] in told:
        return told.index(stage["folder"])
    kinds = list(COMMANDS)
    return kinds.index(stage["kind"]) if stage["kind"] in kinds else len(kinds)


def _stage(place: Path, folder: str, manifest: Manifest, report: dict[str, Any]) -> dict[str, Any]:
    """What the report says of one stage."""
    told = [entry for entry in report.get("stages", ()) if isinstance(entry, dict) and entry.get("folder") == folder]
    name = told[0].get("stage") if told and folder else None
    log = log_file(place / folder)
    return {
        "stage": name if isinstance(name, str) else stage_name(folder, manifest.stage),
        "seconds": number(manifest.timings.get("total_seconds")) or 0.0,
        "peak_memory_bytes": manifest.peak_memory_bytes,
        "kind": manifest.stage,
        "folder": folder,
        "created": manifest.created,
        "seed": manifest.seed,
        "timings": manifest.timings,
        "metrics": {key: value for key, value in manifest.metrics.items() if key not in ("train", "validation")
                    or not isinstance(value, list)},
        "inputs": manifest.inputs,
        "config": manifest.config,
        "versions": manifest.versions,
        "log": None if log is None else os.path.relpath(log, place if place.is_dir() else place.parent),
    }  # fmt: skip


def _histories(stages: list[dict[str, Any]], manifests: Mapping[str, Manifest]) -> dict[str, dict[str, Any]]:
    """Folder -> losses of every stage that trained."""
    histories = {}
    for stage in stages:
        metrics = manifests[stage["folder"]].metrics
        history = {split: lines_of(metrics.get(split)) for split in ("train", "validation")}
        if history["train"] or history["validation"]:
            step = number(metrics.get("result_step"))
            histories[stage["folder"]] = {"stage": stage["stage"], **history, "result_step": step}
    return histories


def lines_of(value: object) -> list[dict[str, float]]:
    """Lines of a history: a step and finite numbers in each."""
    lines = value if isinstance(value, list) else []
    clean = [{key: entry for key, entry in line.items() if number(entry) is not None} for line in lines
             if isinstance(line, dict)]  # fmt: skip
    return [line for line in clean if "step" in line]


def _importance(place: Path, manifests: Mapping[str, Manifest], missing: list[str]) -> dict[str, Any] | None:
    """Importance as the cut sees it: square roots of the sums over samples; numpy arrays."""
    folder = next((folder for folder, manifest in manifests.items() if manifest.stage == "score"), None)
    if folder is None:
        return None
    path = place / folder / ImportanceScores.FILE
    details = manifests[folder].details
    try:
        sums = _read_scores(path)
    except (MinitronError, OSError, ValueError, ArithmeticError) as error:
        missing.append(f"{path} cannot be read: {error}")
        return None
    architecture = details.get("architecture")
    heads = architecture.get("num_attention_heads") if isinstance(architecture, dict) else None
    importance = {name: sums[name] ** 0.5 for name in ("hidden", "ffn")}
    if isinstance(heads, int) and heads > 0 and sums["heads"].shape[1] % heads == 0:
        importance["heads"] = sums["heads"].reshape(len(sums["heads"]), heads, -1).sum(axis=2) ** 0.5
    samples = details.get("samples")
    samples = samples if isinstance(samples, dict) else {}
    return importance | {
        "folder": folder,
        "block_influence": [float(value) for value in sums["block_influence"]],
        "samples": manifests[folder].metrics.get("samples"),
        "tokens": manifests[folder].metrics.get("tokens"),
        "seq_length": samples.get("seq_length"),
    }


def _read_scores(path: Path) -> dict[str, Any]:
    """The scores without the moments, as float64; torch is not needed for that."""
    import numpy
    from safetensors import SafetensorError, safe_open

    scores = {}
    try:
        with safe_open(str(path), framework="numpy") as file:
            for name in ImportanceScores.names():
                scores[name] = numpy.asarray(file.get_tensor(name), dtype=numpy.float64)
    except SafetensorError as error:
        raise MinitronError(str(error)) from None
    for name, value in scores.items():
        if value.ndim != (1 if name == "block_influence" else 2) or not value.size:
            raise MinitronError(f"{name} has the shape {value.shape}")
        if not numpy.isfinite(value).all() or (name != "block_influence" and (value < 0).any()):
            raise MinitronError(f"{name} holds values that are not finite, or sums below zero")
    return scores


def _scans(place: Path, manifests: Mapping[str, Manifest], missing: list[str]) -> list[dict[str, Any]]:
    """Scans of blocks, from their manifests."""
    scans = []
    for folder, manifest in manifests.items():
        if manifest.stage != "scan":
            continue
        blocks, report = manifest.details.get("blocks"), manifest.details.get("report")
        drop = manifest.metrics.get("dropped_layers")
        if not (_are_blocks(blocks) and isinstance(drop, list) and isinstance(report, dict)) or (
            number(report.get("teacher_loss")) is None
        ):
            missing.append(f"{place / folder / MANIFEST} holds no scan of blocks ({DepthScan.FILE} may)")
            continue
        layers = [layer for layer in drop if isinstance(layer, int)]
        scans.append({"folder": folder, "blocks": blocks, "drop_layers": layers, **report})
    return scans


def _are_blocks(blocks: object) -> bool:
    return isinstance(blocks, list) and all(
        isinstance(block, dict) and all(number(block.get(key)) is not None for key in ("first", "last", "loss"))
        for block in blocks
    )


def _cuts(manifests: Mapping[str, Manifest], missing: list[str]) -> dict[str, Any]:
    """``cuts``: student -> how; ``shapes``: student -> teacher's and student's Architecture, layers dropped."""
    cuts, shapes = {}, {}
    for folder, manifest in manifests.items():
        if manifest.stage != "prune":
            continue
        name = STAGES["prune"].student_in(folder) or folder or "student"
        try:
            cut = cut_of(manifest)
            plan = manifest.details["plan"]
            layers = [int(layer) for layer in cut["dropped_layers"]]
            models = {side: Architecture.from_settings(dict(plan[side]), folder) for side in ("teacher", "student")}
            if not all(isinstance(cut[part], dict) for part in ("width", "compensation", "depth")):
                raise TypeError
        except (KeyError, TypeError, ValueError, MinitronError):
            missing.append(f"{folder or MANIFEST}: its manifest does not say what was cut")
            continue
        cuts[name], shapes[name] = cut, {**models, "drop_layers": layers}
    return {"cuts": cuts, "shapes": shapes}


def _table(manifests: Mapping[str, Manifest], missing: list[str]) -> list[dict[str, Any]]:
    """The rows that there are evaluations for, in the order of the flow's table."""
    rows = []
    for folder, manifest in manifests.items():
        head, _, last = folder.rpartition("/")
        name, student, kind = model_name(last)
        if head != EVALUATIONS or kind not in MODELS:
            continue
        if _is_evaluation(manifest.metrics):
            rows.append(row(name, manifest.metrics, student=student, kind=kind))
        else:
            missing.append(f"{folder}: its manifest holds no losses")
    kinds = list(MODELS)
    students = list(dict.fromkeys(entry["student"] for entry in rows if entry["student"]))
    rows.sort(key=lambda entry: (students.index(entry["student"]) if entry["student"] else -1,
                                 kinds.index(entry["kind"])))  # fmt: skip
    return add_gaps(rows)


def _facts(manifests: Mapping[str, Manifest], missing: list[str]) -> dict[str, Any] | None:
    """The metrics of the newest evaluation that asked for facts."""
    for folder, manifest in reversed(list(manifests.items())):
        try:
            facts = manifest.stage == "evaluate tasks" and facts_of(manifest.metrics)
        except TypeError:
            missing.append(f"{folder or MANIFEST}: its manifest does not say which facts the models know")
            continue
        if facts:
            return manifest.metrics
    return None


def _searches(place: Path, manifests: Mapping[str, Manifest], missing: list[str]) -> dict[str, dict[str, Any]]:
    """Folder -> what each search found."""
    found = {}
    for folder, manifest in manifests.items():
        if manifest.stage != SEARCH:
            continue
        path = place / folder / RESULT
        search = search_of(read_json(path), manifest.config, path, missing)
        if search is not None:
            found[folder] = search
    return found


def _is_evaluation(metrics: Mapping[str, Any]) -> bool:
    losses = [metrics.get("validation"), metrics.get("test")]
    return bool(number(metrics.get("parameters"))) and all(
        isinstance(loss, dict) and number(loss.get("loss")) is not None and number(loss.get("perplexity")) is not None
        for loss in losses
    )


def _missing(manifests: Mapping[str, Manifest], unfinished: list[dict[str, Any]]) -> list[str]:
    """What a flow of these students would still have."""
    here = set(manifests)
    started = {stage["folder"]: stage for stage in unfinished}
    students = students_of([folder for folder in [*manifests, *started] if "/" not in folder], ("prune", "distill"))
    expected = [STAGES[kind].folder for kind in ("data", "correct", "evaluate teacher", "evaluate corrected")]
    for name in students:
        expected += [
            STAGES[kind].placed(name) for kind in ("prune", "evaluate pruned", "distill", "evaluate distilled")
        ]
    sentences = [f"{stage['stage']} has not ended (it works in {stage['partial']})" for stage in unfinished]
    sentences += [f"{stage_name(folder, '')} is not done: {folder} is missing" for folder in expected
              if folder not in here and folder not in started]  # fmt: skip
    return sentences if students else [*sentences, "no student is there yet"]
