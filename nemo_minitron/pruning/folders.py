"""Where the measurements of a teacher lie: scores, scans of blocks and refits, each by what tells them apart."""

import dataclasses
import hashlib
import json
from pathlib import Path

from nemo_minitron.architecture import parse_layers, runs
from nemo_minitron.config import PruneConfig

#: Settings that change no refit: where scores lie, the grid, what only scoring reads, and what every refit has.
NOT_THE_REFIT = (
    "scores_path", "hidden_size_divisor", "ffn_hidden_size_divisor", "num_layers_divisor", "statistics",
    "num_query_groups", "method", "refit",
)  # fmt: skip


def scores_folder(config: PruneConfig) -> Path:
    """Scores: prune.scores_path, or beside the teacher's checkpoint."""
    if config.prune.scores_path:
        return Path(config.prune.scores_path)
    teacher = Path(config.teacher)
    return teacher.with_name(f"{teacher.name}.scores")


def scan_folder(config: PruneConfig) -> Path:
    """A scan: beside the scores, named by the layers given, or by how many are to be kept."""
    scores, targets = scores_folder(config), config.prune
    if targets.drop_layers:
        given_runs = runs(parse_layers(targets.drop_layers))
        name = "+".join(f"{first + 1}-{end}" if end - first > 1 else f"{end}" for first, end in given_runs)
    else:
        name = f"{targets.depth_by.replace('_', '-')}-{targets.num_layers}"
        name += f"-beam-{targets.depth_beam}" if targets.chooses_by_maps and targets.depth_beam > 1 else ""
    return scores.with_name(f"{scores.name}.depth-{name}")


def refit_folder(config: PruneConfig) -> Path:
    """A refit: beside the scores, named by what is cut and how; one student is one, whichever way it is stated."""
    stated = dataclasses.asdict(config.prune) | {"drop_layers": sorted(parse_layers(config.prune.drop_layers))}
    told = json.dumps({name: value for name, value in stated.items() if name not in NOT_THE_REFIT}, sort_keys=True)
    scores = scores_folder(config)
    return scores.with_name(f"{scores.name}.refit-{hashlib.sha256(told.encode()).hexdigest()[:12]}")
