"""Refits a student layer by layer to what the layers before it produce, with one layer of each model in memory.

Legend: s sequence, b micro batch, h hidden, h' the student's, k a matrix' inputs, m its outputs.

The compensated cut fits every matrix to the teacher's own activations; but what a layer of the student reads has gone
through the layers before it, as they are cut. From the first layer to the last, with x the teacher's stream and x' the
student's at the same place, each matrix W of the student gets the change D of least error over calibration tokens::

    linear_qkv, linear_fc1    ||(W + D) n' - V n||       V n the teacher's rows that stay; n, n' norms' outputs
    linear_proj, linear_fc2   ||w (x' + D a - P^T x)||   x' the student's stream after the matrix, which reads a

P are the directions of the stream that stay (the identity where all do), and w = 1 / rms(x), since norms read the
stream. After the last layer before dropped ones, x is the teacher's stream after these: linear_fc2 stands in for them.
A ridge pulls D to 0; its strength is for each matrix the one of least error on samples that it was not fitted to, among
them infinity, which leaves the matrix as it is. Then D is fitted to all samples.

SparseGPT (arXiv 2301.00774, section 3) and GPTQ (arXiv 2210.17323) refit one layer after the other on the inputs that
the layers before really give; here writers are fitted to the residual stream and not to their own outputs, so that what
one could not keep the next makes up for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.checkpoints.names import LAYERS
from nemo_minitron.checkpoints.tensors import Lazy
from nemo_minitron.errors import MinitronError
from nemo_minitron.megatron.layout import Layout
from nemo_minitron.pruning.calibration import HOLD_OUT
from nemo_minitron.pruning.compensated import CompensatedCut
from nemo_minitron.pruning.cut import layer_indices
from nemo_minitron.pruning.ridge import ridge

if TYPE_CHECKING:
    from torch import Tensor

#: Ridge strengths, in units of the mean diagonal of what is inverted.
STRENGTHS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
QKV, PROJ, FC1, FC2 = "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"


class _Reached(Exception):
    """Ends a forward pass where nothing more of it is wanted."""


@dataclasses.dataclass(frozen=True)
class _View:
    """What megatron.weights asks of a checkpoint: one of its layers as the only one."""

    path: Path
    tensors: Mapping[str, Lazy]


class OneLayer:
    """A Megatron model of one layer, which takes the weights of any layer of a model.

    Args:
        tensors: the model's, by canonical name.
        path: what messages call it.
    """

    def __init__(self, architecture: Architecture, tensors: Mapping[str, Lazy], layout: Layout, path: Path):
        from nemo_minitron.megatron.forward import load_model

        self.tensors, self.path = tensors, path
        self.architecture = architecture.with_sizes(num_layers=1)
        self.model = load_model(self.architecture, layout, self._view(0), local_spec=True)
        self.layer = self.model.decoder.layers[0]

    def _view(self, number: int) -> _View:
        own = f"{LAYERS}{number}."
        outside = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(LAYERS)}
        inside = {name: tensor for name, tensor in self.tensors.items() if name.startswith(own)}
        return _View(
            self.path, outside | {f"{LAYERS}0.{name.removeprefix(own)}": part for name, part in inside.items()}
        )

    def load(self, number: int) -> None:
        """Takes the weights of layer `number` (from 0)."""
        from nemo_minitron.megatron.weights import load_weights

        load_weights(self.model, self.architecture, self._view(number), only=LAYERS)

    def embed(self, tokens: Tensor) -> Tensor:
        """The stream before the first layer [s, b, h], of tokens [b, s]."""
        import torch

        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        with torch.no_grad():
            return self.model.embedding(input_ids=tokens, position_ids=positions)

    def run(self, stream: Tensor, *watched: str) -> dict[str, Tensor]:
        """Runs the layer on `stream` [s, b, h] until the last of `watched` is reached.

        Args:
            watched: in the order in which they are reached: ``NAME.input`` or ``NAME.output`` of a linear layer,
                ``middle``, the stream before the MLP's norm, or ``end``, after the layer.

        Returns:
            each of them [s, b, width].
        """
        import torch

        seen: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor) -> None:
            seen[name] = value
            if name == watched[-1]:
                raise _Reached

        handles = []
        for name in watched:
            module, after = self._module(name)
            register = module.register_forward_hook if after else module.register_forward_pre_hook
            handles.append(register(_hook(keep, name, after)))
        ids = torch.zeros(stream.shape[1], stream.shape[0], dtype=torch.long, device=stream.device)
        try:
            with torch.no_grad():
                self.model(input_ids=ids, position_ids=ids, attention_mask=None, decoder_input=stream.clone())
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _module(self, name: str) -> tuple[Any, bool]:
        """The module whose hook sees `name`, and whether that is the hook after it."""
        if name == "end":
            return self.model.decoder.final_layernorm, False
        if name == "middle":
            return self.layer.pre_mlp_layernorm, False
        path, _, side = name.rpartition(".")
        return self.layer.get_submodule(path), side == "output"


def _hook(keep: Callable[[str, Tensor], None], name: str, after: bool) -> Callable:
    if after:  # Megatron's linear layers return the output and the bias that they leave to others to add
        return lambda module, args, output: keep(name, output[0].detach())
    return lambda module, args: keep(name, args[0].detach().clone())  # Megatron adds to the stream in place


class _Moments:
    """Sums over tokens of what a matrix' inputs and its errors have in common, float64.

    Attributes:
        gram: a a^T [k, k].
        cross: a e^T [k, m].
        energy: ||e||^2.
    """

    def __init__(self) -> None:
        import torch

        nothing = torch.zeros((), dtype=torch.float64)
        self.gram = self.cross = self.energy = nothing

    def add(self, inputs: Tensor, errors: Tensor, weights: Tensor | None = None) -> None:
        """Adds inputs [.., k] and errors [.., m], rows weighted by `weights` [.., 1]."""
        inputs, errors = inputs.flatten(0, -2).float(), errors.flatten(0, -2).float()
        if weights is not None:
            weights = weights.flatten(0, -2).float()
            inputs, errors = inputs * weights, errors * weights
        self.gram = self.gram + (inputs.T @ inputs).double()
        self.cross = self.cross + (inputs.T @ errors).double()
        self.energy = self.energy + errors.double().square().sum()

    def reduce(self) -> None:
        """Adds up those of all data-parallel ranks."""
        import torch
        from megatron.core import parallel_state

        for total in (self.gram, self.cross, self.energy):
            torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())

    def error(self, change: Tensor) -> float:
        """||e - D a||^2 over ||e||^2, of a change D^T [k, m]; 1 where there is no error to begin with."""
        if not float(self.energy):
            return 1.0
        left = self.energy - 2 * (change * self.cross).sum() + ((self.gram @ change) * change).sum()
        return float(left / self.energy)


def best_change(fitted: _Moments, held_out: _Moments) -> tuple[Any, float | None, float]:
    """D^T [k, m] of all samples with the strength that is best on the held-out ones; None: no change is.

    Returns:
        the change, its strength, and the error that is left on the held-out samples, of that without a change.
    """
    import torch

    tried = {strength: held_out.error(ridge(fitted.gram, fitted.cross, strength)) for strength in STRENGTHS}
    strength = min(tried, key=tried.__getitem__)
    if tried[strength] >= 1.0:
        return torch.zeros_like(fitted.cross), None, 1.0
    change = ridge(fitted.gram + held_out.gram, fitted.cross + held_out.cross, strength)
    return change, strength, tried[strength]


class SequentialRefit:
    """One pass over the layers of a cut.

    Args:
        cut: the student as it is cut.
        teacher: the checkpoint that it is cut from.
        sequences: calibration tokens of this rank [n, s + 1].
        batch: samples a forward pass.
    """

    def __init__(self, cut: CompensatedCut, teacher: Checkpoint, layout: Layout, sequences: Tensor, batch: int):
        self.cut = cut
        self.tensors = cut.cut()
        self.teacher = OneLayer(cut.teacher, teacher.tensors, layout, teacher.path)
        self.student = OneLayer(cut.student, self.tensors, layout, Path(f"the student of {teacher.path}"))
        device = next(self.teacher.model.parameters()).device
        self.basis = None if cut.basis is None else cut.basis.to(device).float()
        parts = sequences[:, :-1].split(max(1, min(batch, len(sequences) // HOLD_OUT)))
        self.held_out = [number % HOLD_OUT == HOLD_OUT - 1 for number in range(len(parts))]
        self.before = [self.teacher.embed(part.to(device)) for part in parts]  # x
        self.streams = [self.student.embed(part.to(device)) for part in parts]  # x'
        self.after: list[Tensor] = self.before

    def layers(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Each layer's refitted matrices by canonical name, in the teacher's precision, and what is said of them."""
        self._skip(0, self.cut.stay[0])
        ends = [*self.cut.stay[1:], self.cut.teacher.num_layers]
        for number, (own, end) in enumerate(zip(self.cut.stay, ends)):
            self.teacher.load(own)
            self.student.load(number)
            report = [self._fit(name, number, own) for name in (QKV, PROJ, FC1)]
            self.after = [self.teacher.run(stream, "end")["end"] for stream in self.before]
            self._skip(own + 1, end)
            report.append(self._fit(FC2, number, own))
            self.streams = [self.student.run(stream, "end")["end"] for stream in self.streams]
            self._check(number)
            self.before = self.after
            matrices = {f"{LAYERS}{number}.{name}.weight": self._stored(name, number) for name in (QKV, PROJ, FC1, FC2)}
            yield matrices, report

    def _skip(self, first: int, end: int) -> None:
        """Takes the teacher's stream through layers that the student does not have."""
        for layer in range(first, end):
            self.teacher.load(layer)
            self.after = [self.teacher.run(stream, "end")["end"] for stream in self.after]
        if first == 0:
            self.before = self.after

    def _fit(self, name: str, number: int, own: int) -> dict[str, Any]:
        """Refits one matrix of layer `number`, the teacher's layer `own`."""
        import torch

        if name == QKV and self.cut.kept.heads is not None and self.cut.settings.merge_heads:
            return {
                "layer": number + 1,
                "matrix": name,
                "ridge": None,
                "left": 1.0,
            }  # its queries are not the teacher's
        fitted, held_out = _Moments(), _Moments()
        pairs = self._reader_pairs if name in (QKV, FC1) else self._writer_pairs
        for out, pair in zip(self.held_out, pairs(name, own)):
            (held_out if out else fitted).add(*pair)
        fitted.reduce()
        held_out.reduce()
        change, strength, left = best_change(fitted, held_out)
        weight = self.student.layer.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_((weight.double() + change.T).to(weight.dtype))
        return {"layer": number + 1, "matrix": name, "ridge": strength, "left": round(left, 4)}

    def _reader_pairs(self, name: str, own: int) -> Iterator[tuple[Tensor, ...]]:
        rows = layer_indices(f"{name}.bias", own, self.cut.teacher, self.cut.kept)[0]
        for before, stream in zip(self.before, self.streams):
            wanted = self.teacher.run(before, f"{name}.output")[f"{name}.output"]
            got = self.student.run(stream, f"{name}.input", f"{name}.output")
            wanted = wanted if rows is None else wanted[..., rows.to(wanted.device)]
            yield got[f"{name}.input"], wanted.float() - got[f"{name}.output"].float()

    def _writer_pairs(self, name: str, own: int) -> Iterator[tuple[Tensor, ...]]:
        place = "middle" if name == PROJ else "end"
        for before, after, stream in zip(self.before, self.after, self.streams):
            wanted = (self.teacher.run(before, "middle")["middle"] if name == PROJ else after).float()
            got = self.student.run(stream, f"{name}.input", place)
            weights = wanted.square().mean(dim=-1, keepdim=True).clamp_min(1e-30).rsqrt()
            wanted = wanted if self.basis is None else wanted @ self.basis
            yield got[f"{name}.input"], wanted - got[place].float(), weights

    def _check(self, number: int) -> None:
        if not all(bool(stream.isfinite().all()) for stream in self.streams):
            raise MinitronError(
                f"layer {number + 1} of the student: the stream after it holds values that are not finite; "
                "`minitron inspect --values` tells whether the teacher's weights do; prune.refit=once leaves this out"
            )

    def _stored(self, name: str, number: int) -> Tensor:
        """A matrix as the student's checkpoint will hold it."""
        import torch

        weight = self.student.layer.get_submodule(name).weight.detach()
        return weight.to("cpu", getattr(torch, self.tensors[f"{LAYERS}{number}.{name}.weight"].dtype)).clone()
