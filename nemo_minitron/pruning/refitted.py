"""What a refit leaves for the cut: the student's matrices, and the neurons and heads that it was made with.

Beside the matrices, by canonical name, the file holds ``kept.ffn.L`` and ``kept.heads.L``, indices into the teacher's
layer L (from 0): to choose them takes an inverse a layer, which is not worth doing twice.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.artifacts import Manifest, TensorFile, save_tensors
from nemo_minitron.checkpoints.tensors import Computed, Lazy
from nemo_minitron.pruning.compensated import CompensatedCut
from nemo_minitron.pruning.cut import Kept

if TYPE_CHECKING:
    from torch import Tensor

FILE = "refit.safetensors"
KEPT = "kept."
#: What of Kept is stored.
KINDS = ("ffn", "heads")


def save_refit(folder: Path, matrices: dict[str, Tensor], cut: CompensatedCut, teacher: str) -> None:
    """Writes the file.

    Args:
        matrices: canonical name -> the student's.
        teacher: fingerprint of the teacher's weights.
    """
    kept = {
        f"{KEPT}{kind}.{layer}": getattr(cut.kept, kind)[layer]
        for kind in KINDS
        if getattr(cut.kept, kind) is not None
        for layer in cut.stay
    }
    save_tensors(folder / FILE, matrices | kept, {"teacher": teacher})


def kept_by(folder: str | Path) -> Kept | None:
    """The neurons and heads of the layers that stay; None where the file names none."""
    file = TensorFile(Path(folder) / FILE, KEPT)
    if not file.names:
        return None
    kept: dict[str, dict[int, Tensor]] = {kind: {} for kind in KINDS}
    for name in file.names:
        kind, _, layer = name.partition(".")
        kept[kind][int(layer)] = file[name]
    return Kept(ffn=kept["ffn"] or None, heads=kept["heads"] or None)


def refitted(student: dict[str, Lazy], folder: str | Path) -> tuple[dict[str, Lazy], dict[str, Any]]:
    """The student's tensors with the matrices of a refit in place of the cut's, and what is said of it."""
    file = TensorFile(Path(folder) / FILE)
    matrices = {
        name: Computed(student[name].shape, student[name].dtype, functools.partial(file.__getitem__, name))
        for name in file.names
        if not name.startswith(KEPT)
    }
    metrics = Manifest.read(Path(folder)).metrics
    return student | matrices, {"refit": {name: metrics[name] for name in ("samples", "error_left")}}
