"""What scoring finds out about a teacher, and what is to be cut.

Legend: h hidden, f FFN, n heads, d head size, l layers.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import MinitronError

if TYPE_CHECKING:
    from torch import Tensor

META = "nemo_minitron"


class TensorFile(Mapping[str, Any]):
    """The tensors of a safetensors file under a prefix; each is read when it is asked for, and must be finite.

    Raises:
        MinitronError: the file is missing, truncated or none of ours; a tensor is missing or holds NaN or Inf.
    """

    def __init__(self, path: str | os.PathLike, prefix: str = ""):
        from safetensors import SafetensorError, safe_open

        self.path, self.prefix = Path(path), prefix
        try:
            with safe_open(str(self.path), framework="pt") as file:
                self.names = [name.removeprefix(prefix) for name in [*file.keys()] if name.startswith(prefix)]
                self.meta = json.loads((file.metadata() or {}).get(META, "{}"))
        except (OSError, SafetensorError, ValueError) as error:
            raise MinitronError(
                f"{self.path} cannot be read ({error}): it is missing, truncated or not of this tool; "
                f"remove {self.path.parent} to make it again"
            ) from None

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        if name not in self.names:
            raise KeyError(name)
        with safe_open(str(self.path), framework="pt") as file:
            tensor = file.get_tensor(self.prefix + name)
        if not tensor.isfinite().all():
            raise MinitronError(
                f"{self.path}: {self.prefix}{name} holds values that are not finite; remove {self.path.parent} to make "
                "it again"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes tensors and what is said of them (JSON) to a safetensors file."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), {META: json.dumps(meta)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportanceScores:
    """What one calibration pass over a teacher found; float32 unless said.

    The first three are sums over calibration samples of squared means over the sequence, so that L2 over samples is
    their square root (arXiv 2407.14679, section 2.2: L2 over the batch, mean over the sequence).

    Attributes:
        hidden: sums for each channel of each norm's output, two norms a layer in forward order [2l, h].
        ffn: sums for each FFN neuron [l, f].
        heads: sums for each channel of the attention output before its projection [l, n*d].
        block_influence: sum over batches of 1 - cos(layer's input, its output), float64 [l].
        moments: second moments, means over tokens of x x^T, read when asked for; empty where they were not gathered:
            ``stream.K`` [h, h] of norm K's normalised input before its gain (K = 2 * layer, 2 * layer + 1 before the
            MLP, 2l the final norm); ``ffn.L`` [f, f] of the input of layer L's linear_fc2; ``attention.L`` [nd, nd] of
            the input of its linear_proj. Layers from 0.
        teacher: fingerprint of the teacher's weights (Checkpoint.content).
        samples: which calibration samples: data, seed, seq_length, starts, tokens.
    """

    hidden: Tensor
    ffn: Tensor
    heads: Tensor
    block_influence: Tensor
    moments: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    teacher: str = ""
    samples: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    FILE = "scores.safetensors"
    MOMENTS = "moments."

    def save(self, folder: Path) -> None:
        tensors = {name: getattr(self, name) for name in self.names()}
        tensors |= {f"{self.MOMENTS}{name}": self.moments[name] for name in self.moments}
        save_tensors(Path(folder) / self.FILE, tensors, {"teacher": self.teacher, "samples": dict(self.samples)})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return ("hidden", "ffn", "heads", "block_influence")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> ImportanceScores:
        """Reads the scores in `folder`, the moments apart; raises MinitronError where they are damaged."""
        path = Path(folder) / cls.FILE
        file = TensorFile(path)
        missing = [name for name in cls.names() if name not in file]
        if missing:
            raise MinitronError(f"{path} holds no importance scores ({', '.join(missing)} missing)")
        return cls(
            **{name: file[name] for name in cls.names()},
            moments=TensorFile(path, cls.MOMENTS),
            teacher=file.meta.get("teacher", ""),
            samples=file.meta.get("samples", {}),
        )

    def layers_by_importance(self) -> list[int]:
        """Layers, 1-based, the most important first."""
        order = sorted(range(len(self.block_influence)), key=lambda layer: -float(self.block_influence[layer]))
        return [layer + 1 for layer in order]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthScan:
    """What leaving blocks of layers out does to the language-model loss, and the linear maps that stand in for them.

    Attributes:
        blocks: one a contiguous block: first and last layer (1-based), and the loss without it (nats a token); where
            layers were chosen one after the other with maps in place, the single layers of the first round.
        drop_layers: the layers chosen, or given, 1-based.
        folds: layer before a dropped block (1-based, as text) -> D [h, h]: with m the output of that layer's MLP,
            adding m D to the stream stands in for the block (ReplaceMe, arXiv 2505.02819). Empty: plain dropping is
            better.
        report: losses of the teacher and, on held-out samples, of plain and folded students by ridge strength and
            weighting (``held_out_losses``), the best of these (``ridge``, ``ridge_weighted``, ``ridge_inside_grid``);
            ``rounds``, where layers were chosen one after the other: the layer, the loss without it and all before it,
            and the same of each other candidate.
        teacher: fingerprint of the teacher's weights.
    """

    blocks: list[dict[str, Any]]
    drop_layers: list[int]
    folds: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    teacher: str = ""

    FILE = "blocks.safetensors"

    def save(self, folder: Path) -> None:
        import torch

        meta = {name: getattr(self, name) for name in ("blocks", "drop_layers", "report", "teacher")}
        folds = {f"fold.{layer}": value for layer, value in self.folds.items()}
        save_tensors(Path(folder) / self.FILE, folds or {"none": torch.zeros(1)}, meta)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> DepthScan:
        """Reads the scan in `folder`; raises MinitronError where it is damaged."""
        path = Path(folder) / cls.FILE
        folds = TensorFile(path, "fold.")
        try:
            meta = {name: folds.meta[name] for name in ("blocks", "drop_layers", "report", "teacher")}
        except KeyError as error:
            raise MinitronError(f"{path} holds no scan of blocks ({error} missing)") from None
        return cls(**meta, folds=folds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """What to cut, worked out before anything is cut.

    Attributes:
        teacher: the architecture before (a dict of Architecture).
        student: the architecture after.
        drop_layers: layers to drop, 1-based, ascending.
        width: width targets by ModelOpt's names; empty for depth alone.
        method: ``minitron`` or ``compensated``.
    """

    teacher: dict[str, Any]
    student: dict[str, Any]
    drop_layers: list[int]
    width: dict[str, int]
    method: str = "minitron"
