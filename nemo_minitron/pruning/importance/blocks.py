"""Which layers a teacher misses least, and the linear maps that stand in for them.

Legend: h hidden, l layers, n layers to drop, x_k the stream before layer k (k = 0 .. l - 1, x_l after the last), m_k
the output of layer k's MLP.

The loss without layers i .. i+n-1 (arXiv 2408.11796, section 2.3, with the language-model loss as the criterion) is
that of layers i+n .. l-1 run on x_i. All x_i come from one pass, so that scanning every block of n layers runs
l + (l-n) + (l-n-1) + ... + 0 layers instead of (l-n+1)(l-n).

A dropped run i .. j-1 is replaced by x_i + m_{i-1} D with D of least sum_t w_t ||x_i + m_{i-1} D - x_j||^2 +
lambda ||D||^2, which is a change of linear_fc2 of layer i-1 alone (ReplaceMe, arXiv 2505.02819). w_t is 1, or
1 / mean(x_j^2) of the token, as the norm after it sees it. D = 0 is plain dropping, and so is lambda = infinity; lambda
and w are those of least language-model loss on samples that D was not fitted to.

Layers can be chosen by the loss with the maps in place, too: one more in each round, the one that costs least (beams
keep several sets). Runs that meet become one run with a map of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import runs
from nemo_minitron.artifacts import DepthScan
from nemo_minitron.pruning.calibration import HOLD_OUT, dealt
from nemo_minitron.pruning.importance.paths import (
    TEACHER,
    Path,
    PipelineStage,
    Run,
    RunMoments,
    path_losses,
    run_moments,
)
from nemo_minitron.pruning.ridge import ridge

if TYPE_CHECKING:
    from torch import Tensor

#: Ridge strengths, in units of the mean diagonal of the gram matrix.
STRENGTHS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
#: Further ones, each tried if the one before it was the best so far.
LOWER_STRENGTHS = (1e-7, 1e-8, 1e-9, 1e-10)
#: Ridge strength of the maps that are in place while layers are chosen.
CHOICE_STRENGTH = 1e-4
#: Whether tokens weigh 1 / mean(x_j^2) in the fit.
WEIGHTINGS = (False, True)


def blocks_of(num_layers: int, size: int) -> list[Run]:
    """Every contiguous block of `size` layers."""
    return [(first, first + size) for first in range(num_layers - size + 1)]


def layers_of(blocks: Sequence[Run]) -> list[int]:
    """The layers of blocks, 1-based."""
    return [layer + 1 for first, end in blocks for layer in range(first, end)]


def scan_blocks(
    model: Any, sequences: Tensor, batch: int, blocks: list[Run], *, choose: bool, every: int | None = None
) -> DepthScan:
    """Scans `blocks` of a Megatron GPTModel; pipeline ranks share its layers, data-parallel ranks the samples.

    Args:
        sequences: tokens [n, s + 1], the same on every rank.
        choose: drop the one block of least loss; otherwise all of them together.
        every: batches between two lines of progress in a log; None: nothing is shown.

    Returns:
        the scan; `report` has the teacher's loss, and on held-out samples the losses of the student by ridge strength.
    """
    stage, samples = PipelineStage(model, every), Samples.of(sequences, batch)
    plain = [Path(skip=frozenset(range(first, end))) for first, end in blocks]
    teacher, *losses = path_losses(stage, samples.all, batch, TEACHER, [TEACHER, *plain])
    listed = [{"first": first + 1, "last": end, "loss": loss} for (first, end), loss in zip(blocks, losses)]
    best = min(range(len(blocks)), key=losses.__getitem__)
    dropped = [blocks[best]] if choose else blocks
    folds, held_out = _best_folds(stage, samples, dropped)
    return DepthScan(
        blocks=listed, drop_layers=layers_of(dropped), folds=folds, report={"teacher_loss": teacher} | held_out
    )


def fit_blocks(model: Any, sequences: Tensor, batch: int, blocks: list[Run]) -> DepthScan:
    """The maps of scan_blocks with choose=False, without the loss that each block alone costs, nor the teacher's."""
    folds, held_out = _best_folds(PipelineStage(model, None), Samples.of(sequences, batch), blocks)
    return DepthScan(blocks=[], drop_layers=layers_of(blocks), folds=folds, report=held_out)


def scan_layers(
    model: Any, sequences: Tensor, batch: int, count: int, *, samples: int, beam: int = 1, every: int | None = None
) -> DepthScan:
    """Chooses `count` layers of a Megatron GPTModel by the loss with maps in place; ranks share as in scan_blocks.

    Args:
        sequences: tokens [n, s + 1], the same on every rank.
        samples: how many of the held-out samples the choice is made on.
        beam: sets of layers that each round keeps.
        every: batches between two lines of progress in a log; None: nothing is shown.

    Returns:
        the scan; its blocks are the single layers of the first round, `report["rounds"]` has every layer's choice.
    """
    stage, dealt = PipelineStage(model, every), Samples.of(sequences, batch, choice=samples)
    (teacher,) = path_losses(stage, dealt.choice, batch, TEACHER, [TEACHER])
    order, rounds = _choose(stage, dealt, count, beam)
    dropped = runs([layer + 1 for layer in order])
    folds, held_out = _best_folds(stage, dealt, dropped)
    listed = [{"first": entry["layer"], "last": entry["layer"], "loss": entry["loss"]} for entry in _first(rounds)]
    report = {"teacher_loss": teacher, "choice_samples": min(samples, len(sequences) // HOLD_OUT), "beam": beam}
    return DepthScan(
        blocks=listed,
        drop_layers=layers_of(dropped),
        folds=folds,
        report=report | held_out | {"rounds": rounds},
    )


def choice_cost(num_layers: int, count: int, beam: int = 1) -> int:
    """Layers that choosing `count` layers runs on each token, at most: with beam=1 exactly.

    In a round that k layers are left in, leaving out the q-th of them runs the k - q after it; what is before it is
    shared, k - 1 layers. So l + sum over k = l - n + 1 .. l of (k - 1) + k (k - 1) / 2, the first l for the teacher's
    own loss; after the first round times the beams.
    """
    left = range(num_layers - count + 1, num_layers + 1)
    rounds = [(k - 1) + k * (k - 1) // 2 for k in reversed(left)]
    return num_layers + sum(rounds[:1]) + beam * sum(rounds[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """This rank's samples, tokens [n, s + 1]; all samples are split before they are dealt to the data-parallel ranks.

    Attributes:
        fit: three in four, which maps are fitted to.
        held_out: one in four.
        choice: those of held_out on which layers are chosen.
        batch: samples a forward pass.
    """

    all: Tensor
    fit: Tensor
    held_out: Tensor
    choice: Tensor
    batch: int

    @classmethod
    def of(cls, sequences: Tensor, batch: int, choice: int = 0) -> Samples:
        import torch

        out = torch.zeros(len(sequences), dtype=torch.bool)
        out[HOLD_OUT - 1 :: HOLD_OUT] = True
        held_out = sequences[out]
        parts = {"all": sequences, "fit": sequences[~out], "held_out": held_out, "choice": held_out[:choice]}
        return cls(**{name: dealt(part) for name, part in parts.items()}, batch=batch)


class _ChoiceMaps:
    """The maps of runs of layers at CHOICE_STRENGTH, each fitted once; on the host."""

    def __init__(self, stage: PipelineStage, samples: Samples):
        self.stage, self.samples = stage, samples
        self.maps: dict[Run, Tensor] = {}

    def fit(self, sets: Sequence[frozenset[int]]) -> None:
        """Fits what dropping any of these sets of layers (from 0) needs and is not there yet."""
        needed = {run for layers in sets for run in _runs(layers) if run[0] > 0}
        missing = sorted(needed - self.maps.keys())
        sums = run_moments(self.stage, self.samples.fit, self.samples.batch, missing, [False])
        for run in missing:
            moments = sums.pop((run, False))
            self.maps[run] = ridge(moments.gram, moments.cross, CHOICE_STRENGTH).float().cpu()

    def path(self, layers: frozenset[int]) -> Path:
        """The student without these layers, a map before each run of them."""
        return Path(skip=layers, maps={first - 1: self.maps[first, end] for first, end in _runs(layers) if first > 0})


def _runs(layers: frozenset[int]) -> list[Run]:
    return runs([layer + 1 for layer in layers])


def _choose(
    stage: PipelineStage, samples: Samples, count: int, beam: int
) -> tuple[tuple[int, ...], list[dict[str, Any]]]:
    """`count` layers (from 0), in the order in which they were chosen, and the rounds that led to them."""
    maps = _ChoiceMaps(stage, samples)
    beams: list[tuple[int, ...]] = [()]
    tried: dict[tuple[int, ...], dict[int, float]] = {}  # dropped before -> layer -> loss without it, too
    for _ in range(count):
        reached: dict[frozenset[int], tuple[float, tuple[int, ...]]] = {}
        for order in beams:
            gone = frozenset(order)
            sets = {layer: gone | {layer} for layer in range(stage.num_layers) if layer not in gone}
            new = [layer for layer, layers in sets.items() if layers not in reached]
            maps.fit([sets[layer] for layer in new])
            paths = [maps.path(sets[layer]) for layer in new]
            losses = path_losses(stage, samples.choice, samples.batch, maps.path(gone), paths)
            reached |= {sets[layer]: (loss, (*order, layer)) for layer, loss in zip(new, losses)}
            tried[order] = {layer: reached[layers][0] for layer, layers in sets.items()}
        beams = [order for _, order in sorted(reached.values())[:beam]]
    order = beams[0]
    return order, [_round(tried[order[:number]], layer) for number, layer in enumerate(order)]


def _round(losses: dict[int, float], chosen: int) -> dict[str, Any]:
    """A round of the choice for the report, layers from 1."""
    candidates = [{"layer": layer + 1, "loss": loss} for layer, loss in losses.items()]
    return {"layer": chosen + 1, "loss": losses[chosen], "candidates": candidates}


def _first(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rounds[0]["candidates"] if rounds else []


def _best_folds(stage: PipelineStage, samples: Samples, dropped: list[Run]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The maps of the ridge strength and weighting with the least held-out loss, none where plain dropping has it.

    Returns:
        number of the layer before a run (1-based, as text) -> D [h, h] float32; losses on the held-out samples.
    """
    fitted = [run for run in dropped if run[0] > 0]
    moments = run_moments(stage, samples.fit, samples.batch, fitted, WEIGHTINGS)
    skip = frozenset(layer for first, end in dropped for layer in range(first, end))

    def losses(paths: list[Path]) -> list[float]:
        return path_losses(stage, samples.held_out, samples.batch, TEACHER, paths)

    entries = [{"ridge": None, "weighted": None, "loss": losses([Path(skip=skip)])[0]}]
    for strength in STRENGTHS + LOWER_STRENGTHS if fitted else ():
        if strength in LOWER_STRENGTHS and _best(entries) not in entries[-len(WEIGHTINGS) :]:
            break
        paths = [Path(skip=skip, maps=_maps(moments, fitted, strength, weighted)) for weighted in WEIGHTINGS]
        entries += [
            {"ridge": strength, "weighted": weighted, "loss": loss} for weighted, loss in zip(WEIGHTINGS, losses(paths))
        ]
    best = _best(entries)
    folds = _maps(moments, fitted, best["ridge"], best["weighted"]) if best["ridge"] else {}
    return {str(layer + 1): fold.cpu() for layer, fold in folds.items()}, _report(entries, best)


def _best(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return min(entries, key=lambda entry: entry["loss"])


def _maps(
    moments: dict[tuple[Run, bool], RunMoments], fitted: list[Run], strength: float, weighted: bool
) -> dict[int, Tensor]:
    """Layer before each run (from 0) -> D [h, h], float32."""
    pairs = {run: moments[run, weighted] for run in fitted}
    return {run[0] - 1: ridge(pair.gram, pair.cross, strength).float() for run, pair in pairs.items()}


def _report(entries: list[dict[str, Any]], best: dict[str, Any]) -> dict[str, Any]:
    """What the scan says of its maps; the strengths' upper end is plain dropping, which is an infinite one."""
    report = {
        "held_out_loss_plain": entries[0]["loss"],
        "held_out_loss": best["loss"],
        "ridge": best["ridge"] or "none: plain dropping is best",
        "held_out_losses": entries,
    }
    if best["ridge"]:
        at_floor = best["ridge"] == LOWER_STRENGTHS[-1]
        report["ridge_weighted"] = best["weighted"]
        report["ridge_inside_grid"] = not at_floor
        if at_floor:
            report["ridge_note"] = f"the lowest strength of all, {best['ridge']:.0e}, is best; none lower is tried"
    return report
