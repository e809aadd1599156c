"""The loss of many cuts of one teacher: each made in memory from one set of scores, run on the same held-out text.

What the cuts have in common is worked out once: the scores, what removing each neuron and head costs, the maps of
columns by their number, and the maps that stand in for dropped layers by the number of layers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import config as c
from nemo_minitron.architecture import Architecture, runs
from nemo_minitron.artifacts import DepthScan, ImportanceScores, write_json
from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.checkpoints.tensors import Lazy
from nemo_minitron.data.module import paths
from nemo_minitron.launch.ranks import first_makes, rank
from nemo_minitron.megatron.layout import Layout, layout_of
from nemo_minitron.pruning.calibration import calibration_of
from nemo_minitron.pruning.choice import Costs
from nemo_minitron.pruning.compensated import ColumnMaps
from nemo_minitron.pruning.cut import choose, cut
from nemo_minitron.pruning.folders import scores_folder
from nemo_minitron.pruning.measurements import Measurements, check_scores
from nemo_minitron.pruning.plan import plan_cut
from nemo_minitron.pruning.student import Shared, compensated_cut
from nemo_minitron.search.space import name_of, sizes_of
from nemo_minitron.search.task import Task
from nemo_minitron.training.inputs import LOG

if TYPE_CHECKING:
    from torch import Tensor

LOSSES, SCANS, SCORES = "cuts.json", "scans", "scores"
#: Bytes that maps of columns may take while shapes are measured.
MAPS_BYTES = 2 << 30


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors that a model is built from (megatron.weights.WeightSource)."""

    path: Path
    tensors: Mapping[str, Lazy]


class Cuts:
    """The cuts of a teacher as `prune` makes them with refit=once.

    Args:
        scores: the teacher's, which serve every shape.
        folder: where scans of dropped layers are kept, for further searches of the same teacher and text, too.
    """

    def __init__(self, teacher: Checkpoint, scores: ImportanceScores, config: c.SearchConfig, folder: Path):
        self.teacher, self.scores, self.config, self.folder = teacher, scores, config, folder
        self.shared = Shared(Costs(teacher.tensors, scores.moments, config.prune.ridge), ColumnMaps(MAPS_BYTES))
        self.scans: dict[int, DepthScan] = {}

    @property
    def compensated(self) -> bool:
        return self.config.prune.method == "compensated"

    def architecture(self, shape: Architecture) -> Architecture:
        """The architecture of a shape's cut."""
        return Architecture.from_dict(self.measurements(shape)[0].plan.student)

    def measurements(self, shape: Architecture) -> tuple[Measurements, c.PruneTargets]:
        """What the cut of a shape rests on; its scan has to be there where layers go and are made up for."""
        targets = self.config.prune.targets(sizes_of(shape, self.teacher.architecture))
        plan = plan_cut(self.teacher.architecture, targets, self.scores, None, self.config.prune.method)
        scan = self.scans.get(shape.num_layers)
        return Measurements(plan, self.scores, scan, {}), targets

    def tensors(self, shape: Architecture) -> Mapping[str, Lazy]:
        """The student's tensors, each made when it is read."""
        measured, targets = self.measurements(shape)
        if not self.compensated:
            kept = choose(self.scores, self.teacher.architecture, measured.plan.width)
            return cut(self.teacher.tensors, measured.plan, kept)
        return compensated_cut(self.teacher, measured, targets, shared=self.shared).cut()

    def scan(self, model: Any, sequences: Tensor, depths: Sequence[int]) -> Iterator[int]:
        """Fits the maps for each number of layers that stay, or reads them; gives each number once it is there.

        Args:
            model: the teacher, of the local layer spec.
            sequences: calibration samples.
        """
        from nemo_minitron.pruning.importance.blocks import fit_blocks

        layers = self.teacher.architecture.num_layers
        for depth in sorted(set(depths), reverse=True):
            if depth == layers or not self.compensated:
                continue
            folder = self.folder / SCANS / str(depth)
            if not (folder / DepthScan.FILE).is_file():
                drop = sorted(self.scores.layers_by_importance()[depth:])
                found = fit_blocks(model, sequences, 1, runs(drop))
                first_makes(folder, functools.partial(self._save, folder, found))
            self.scans[depth] = DepthScan.load(folder)
            yield depth

    def _save(self, folder: Path, scan: DepthScan) -> None:
        unfinished = folder.with_name(f".{folder.name}.partial")
        unfinished.mkdir(parents=True, exist_ok=True)
        dataclasses.replace(scan, teacher=self.teacher.content).save(unfinished)
        unfinished.replace(folder)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What measuring found.

    Attributes:
        losses: name of a shape -> its cut's loss on held-out text, the teacher's and cuts of one size alone among them.
        predicted: name of a shape within the budgets -> its loss as predicted from cuts of one size; empty where all
            were measured.
        shapes: those within the budgets that were measured.
        teacher_loss: the teacher's.
        seconds: what took how long.
    """

    losses: dict[str, float]
    predicted: dict[str, float]
    shapes: list[Architecture]
    teacher_loss: float
    seconds: dict[str, float]


@dataclasses.dataclass
class Losses:
    """Losses of cuts by the names of their shapes, kept in a file as they come.

    Attributes:
        path: the file; what it holds is not measured again.
    """

    path: Path
    known: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = self._kept()

    def _kept(self) -> dict[str, float]:
        return dict(json.loads(self.path.read_text(encoding="utf-8"))) if self.path.is_file() else {}

    def add(self, name: str, loss: float) -> None:
        """Keeps one more, beside those that another search of the same teacher may have kept meanwhile."""
        self.known[name] = loss
        if rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self._kept() | self.known)


def measured_cuts(partial: Path, task: Task, prefixes: dict[str, list], length: int) -> tuple[Cuts, Measured]:
    """Scores the teacher, fits the maps of each depth, and measures as many cuts as the settings ask for.

    Args:
        length: tokens a sample.
    """
    import torch

    from nemo_minitron.data.samples import random_sequences
    from nemo_minitron.megatron.forward import parallel_ranks
    from nemo_minitron.megatron.session import engine
    from nemo_minitron.pruning.importance.scoring import score

    config, teacher = task.config, task.teacher
    settings, started = config.search, time.perf_counter()
    if config.prune.scores_path is None:
        config = dataclasses.replace(config, prune=dataclasses.replace(config.prune, scores_path=str(partial / SCORES)))
    needed = prune_config(config, {"hidden_size": task.space.choices["hidden_size"][0]})
    score(needed, teacher)
    held_out, _ = random_sequences(paths(prefixes["validation"]), settings.samples, length, config.calibration_seed)
    sequences, _ = calibration_of(needed, teacher).sequences(config.prune.num_block_samples, config.calibration_seed)
    scores = read_scores(needed, teacher)
    folder = cuts_folder(config, teacher, sequences, held_out)
    cuts = Cuts(teacher, scores, config, folder)
    seconds = {"scoring_seconds": time.perf_counter() - started}
    layout = layout_of(config.trainer, config.model)
    with engine(config.seed, partial / LOG, cuda=layout.cuda), parallel_ranks(layout, config.seed):
        losses, guess = Losses(folder / LOSSES), {}
        torch.distributed.barrier()  # all have read what one will add to
        measure_all = functools.partial(measure, cuts, layout=layout, held_out=held_out, losses=losses)
        own = name_of(teacher.architecture)
        shapes = task.shapes
        few = settings.measured is not None and settings.measured < len(shapes)
        depths = {shape.num_layers for shape in shapes}
        seconds["maps_seconds"] = fit_maps(cuts, sorted(depths), layout, sequences)
        seconds["cuts_seconds"] = measure_all([teacher.architecture])
        if few:
            seconds["cuts_seconds"] += measure_all(task.alone())
            guess = predicted(shapes, teacher.architecture, losses.known, losses.known[own])
            shapes = sorted(shapes, key=lambda shape: (guess[name_of(shape)], name_of(shape)))[: settings.measured]
        compared = [shape for shape in task.rivals.values() if shape.num_layers in depths]
        seconds["cuts_seconds"] += measure_all([*shapes, *compared])
    return cuts, Measured(losses.known, guess, shapes, losses.known[own], seconds)


def cuts_folder(config: c.SearchConfig, teacher: Checkpoint, sequences: Tensor, held_out: Tensor) -> Path:
    """Where losses of cuts and maps of depths are kept: beside the scores, named by all that they depend on.

    So that a second search of the same teacher, of another budget too, measures no cut again.

    Args:
        sequences: calibration samples of the maps.
        held_out: samples of the losses.
    """
    cut = dataclasses.asdict(dataclasses.replace(config.prune, scores_path=None, seed=None))
    seen = hashlib.sha256(json.dumps([teacher.content, cut, config.trainer.precision], sort_keys=True).encode())
    for tokens in (sequences, held_out):
        seen.update(tokens.contiguous().numpy().tobytes())
    scores = scores_folder(prune_config(config, {"num_layers": 1}))
    return scores.with_name(f"{scores.name}.cuts-{seen.hexdigest()[:12]}")


def check_given_scores(config: c.SearchConfig, teacher: Checkpoint) -> None:
    """Raises MinitronError where prune.scores_path holds scores already, and they are not this teacher's."""
    place = config.prune.scores_path
    if place is not None and (Path(place) / ImportanceScores.FILE).exists():
        read_scores(prune_config(config, {"num_layers": 1}), teacher)


def read_scores(config: c.PruneConfig, teacher: Checkpoint) -> ImportanceScores:
    """The scores that a search rests on, checked to be this teacher's."""
    folder = scores_folder(config)
    scores = ImportanceScores.load(folder)
    check_scores(scores, teacher, folder, statistics=config.method == "compensated")
    return scores


def measure(cuts: Cuts, shapes: Sequence[Architecture], *, layout: Layout, held_out: Tensor, losses: Losses) -> float:
    """The loss of each shape's cut on held-out samples; call it inside ``parallel_ranks()``.

    Args:
        held_out: tokens [n, s + 1].
        losses: takes each as it is measured.

    Returns:
        seconds.
    """
    from nemo_minitron.evaluation.loss import mean_loss
    from nemo_minitron.jobs.progress import Progress
    from nemo_minitron.megatron.forward import load_model

    waiting = {name_of(shape): shape for shape in shapes if name_of(shape) not in losses.known}
    batch, every, started = (
        cuts.config.model.micro_batch_size,
        cuts.config.trainer.log_every_n_steps,
        time.perf_counter(),
    )
    with Progress("measure cuts", len(waiting), unit="shape", every=every) as progress:
        for name, shape in waiting.items():
            source = Weights(cuts.teacher.path, cuts.tensors(shape))
            model = load_model(cuts.architecture(shape), layout, source)
            losses.add(name, mean_loss(model, held_out, batch))
            progress.advance(1, loss=f"{losses.known[name]:.4f}", shape=name)
    return time.perf_counter() - started


def fit_maps(cuts: Cuts, depths: Sequence[int], layout: Layout, sequences: Tensor) -> float:
    """Runs the teacher over calibration samples [n, s + 1] for the maps of each depth; seconds."""
    from nemo_minitron.jobs.progress import Progress
    from nemo_minitron.megatron.forward import load_model

    needed = [depth for depth in set(depths) if depth != cuts.teacher.architecture.num_layers]
    if not needed or not cuts.compensated:
        return 0.0
    started = time.perf_counter()
    model = load_model(cuts.teacher.architecture, layout, cuts.teacher, local_spec=True)
    with Progress("maps for dropped layers", len(needed), unit="depth", every=1) as progress:
        for _ in cuts.scan(model, sequences, needed):
            progress.advance()
    return time.perf_counter() - started


def prune_config(config: c.SearchConfig, sizes: dict[str, int], save_path: str = "cut") -> c.PruneConfig:
    """`minitron prune`'s configuration for a shape."""
    model = config.model
    return c.PruneConfig(
        seed=config.calibration_seed,
        trainer=config.trainer,
        model=c.PruneModelConfig(
            restore_from_path=model.restore_from_path,
            pipeline_model_parallel_size=model.pipeline_model_parallel_size,
            encoder_seq_length=model.encoder_seq_length,
            data=model.data,
        ),
        inference=c.InferenceConfig(batch_size=model.micro_batch_size),
        prune=config.prune.targets(sizes),
        export=c.ExportConfig(save_path=save_path),
    )


def predicted(
    shapes: Sequence[Architecture], teacher: Architecture, alone: Mapping[str, float], base: float
) -> dict[str, float]:
    """A loss for each shape from cuts of one size alone: the teacher's, and the excess of each of its sizes.

    Args:
        alone: name of a shape that differs from the teacher in one size -> loss of its cut.
        base: the teacher's loss.
    """
    losses = {}
    for shape in shapes:
        parts = [name_of(teacher.with_sizes(**{size: value})) for size, value in sizes_of(shape, teacher).items()]
        losses[name_of(shape)] = base + sum(alone[part] - base for part in parts)
    return losses
