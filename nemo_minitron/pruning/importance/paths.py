"""Runs a teacher's layers one by one, with some left out, on as many pipeline ranks as share them.

Legend: s sequence, b micro batch, h hidden, l layers, x_k the stream before layer k (k = 0 .. l - 1, x_l after the
last), m_k the output of layer k's MLP with its bias.

A path is a way through the layers that leaves some out and adds m_k D to the stream after others, which is what a map D
folded into linear_fc2 of layer k does. Paths that differ from a common one from some layer on share the stream before
it, so that each of them runs the layers after it only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.progress import Progress, Silent
from nemo_minitron.megatron.chunks import output_in_chunks
from nemo_minitron.pruning.importance.moments import DEVICE_SHARE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    #: What a layer makes of a stream: the stream after it and m, each [s, b, h].
    Outcome = tuple[Tensor, Tensor]

Run = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Path:
    """A way through the layers, numbered from 0.

    Attributes:
        skip: layers that are left out.
        maps: layer -> D [h, h]; m D is added to the stream after it.
    """

    skip: frozenset[int] = frozenset()
    maps: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)

    def leaves(self, other: Path, num_layers: int) -> int:
        """The first layer at which this path is not `other`; num_layers where they are the same."""

        def same(layer: int) -> bool:
            return (layer in self.skip) == (layer in other.skip) and self.maps.get(layer) is other.maps.get(layer)

        return next((layer for layer in range(num_layers) if not same(layer)), num_layers)


TEACHER = Path()


class PipelineStage:
    """The layers of a Megatron GPTModel that this rank holds, all of them or a pipeline stage's, to be run singly.

    Args:
        every: batches between two lines of progress in a log; None: nothing is shown.

    Attributes:
        first, end: its layers are first .. end - 1 of num_layers.
    """

    def __init__(self, model: Any, every: int | None = None):
        import torch
        from megatron.core import parallel_state

        self.every = every
        self.model, self.num_layers = model, model.config.num_layers
        self.layers = {layer.layer_number - 1: layer for layer in model.decoder.layers}
        self.first, self.end = min(self.layers), max(self.layers) + 1
        self.device = next(model.parameters()).device
        self.group = parallel_state.get_pipeline_model_parallel_group()
        self.ranks = torch.distributed.get_process_group_ranks(self.group)
        self.number = self.ranks.index(torch.distributed.get_rank())
        self._calls: dict[int, tuple[tuple, dict[str, Any]]] = {}

    def embed(self, tokens: Tensor) -> Tensor:
        """x_0 [s, b, h] of tokens [b, s + 1]; the first stage has the embedding."""
        inputs, _, positions = self._inputs(tokens)
        return self.model.embedding(input_ids=inputs, position_ids=positions)

    def run(self, number: int, stream: Tensor) -> Outcome:
        """Layer `number` on x [s, b, h]."""
        layer = self.layers[number]
        args, keywords = self._call(stream)
        outputs: list[Tensor] = []
        handle = layer.mlp.register_forward_hook(lambda _, args, output: outputs.append(_whole(output)))
        try:
            after = layer(stream, *args, **keywords)
        finally:
            handle.remove()
        return (after[0] if isinstance(after, tuple) else after), outputs[0]

    def losses(self, stream: Tensor, tokens: Tensor) -> Tensor:
        """Losses a token [b, s] of x_l on tokens [b, s + 1]; the last stage has the final norm and the output layer."""
        inputs, labels, positions = self._inputs(tokens)
        with _layers(self.model, []), output_in_chunks(self.model):
            return self._forward(stream, inputs, positions, labels=labels).float()

    def progress(self, what: str, samples: int) -> Progress:
        """Shows how far a pass over so many samples is."""
        return Silent() if self.every is None else Progress(what, samples, unit="sample", every=self.every)

    def receive(self, count: int, tokens: Tensor) -> list[Tensor]:
        """`count` streams from the stage before."""
        import torch

        length, batch = tokens.shape[1] - 1, tokens.shape[0]
        shape = (count, length, batch, self.model.config.hidden_size)
        streams = torch.empty(shape, dtype=self.model.config.params_dtype, device=self.device)
        torch.distributed.recv(streams, src=self.ranks[self.number - 1], group=self.group)
        return list(streams)

    def send(self, streams: Sequence[Tensor]) -> None:
        """Sends streams to the next stage."""
        import torch

        sent = torch.stack(list(streams)).to(self.model.config.params_dtype)
        torch.distributed.send(sent, dst=self.ranks[self.number + 1], group=self.group)

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over pipeline stages and data-parallel ranks, where it lay."""
        import torch
        from megatron.core import parallel_state

        here = value.to(self.device)
        for group in (self.group, parallel_state.get_data_parallel_group()):
            torch.distributed.all_reduce(here, group=group)
        return here.to(value.device)

    def _inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        tokens = tokens.to(self.device)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return inputs, labels, torch.arange(inputs.shape[1], device=self.device).expand_as(inputs)

    def _forward(self, stream: Tensor, inputs: Tensor, positions: Tensor, **labels: Tensor) -> Tensor:
        """The model's own forward pass of the layers that it has at the moment, on `stream`."""
        given = {"decoder_input": stream} if self.model.pre_process else {}
        if not given:
            self.model.set_input_tensor(stream)
        return self.model(input_ids=inputs, position_ids=positions, attention_mask=None, **given, **labels)

    def _call(self, stream: Tensor) -> tuple[tuple, dict[str, Any]]:
        """What the model itself calls a layer with beside the stream, rotary embeddings above all; versions differ."""
        import torch

        length, batch = stream.shape[:2]
        if length not in self._calls:
            layer, seen = self.layers[self.first], []
            handle = layer.register_forward_pre_hook(lambda _, *call: seen.append(call), with_kwargs=True)
            zeros = torch.zeros(batch, length, dtype=torch.long, device=self.device)
            try:
                with _layers(self.model, [layer]):
                    self._forward(stream, zeros, torch.arange(length, device=self.device).expand_as(zeros))
            finally:
                handle.remove()
            args, keywords = seen[0]
            self._calls[length] = args[1:], {key: value for key, value in keywords.items() if key != "hidden_states"}
        return self._calls[length]


def _whole(output: tuple[Tensor, Tensor | None]) -> Tensor:
    """An MLP's output with its bias added [s, b, h]; a copy, since Megatron adds the stream to it in place."""
    value, bias = output
    return value.clone() if bias is None else value + bias


@contextlib.contextmanager
def _layers(model: Any, layers: list[torch.nn.Module]) -> Iterator[None]:
    """`model` with these layers only."""
    import torch

    own = model.decoder.layers
    model.decoder.layers = torch.nn.ModuleList(layers)
    try:
        yield
    finally:
        model.decoder.layers = own


def _batches(sequences: Tensor, batch: int) -> Sequence[Tensor]:
    return sequences.split(batch) if len(sequences) else ()


def _check_finite(stream: Tensor, number: int) -> None:
    if not stream.isfinite().all():
        raise MinitronError(
            f"layer {number}: the stream after it holds values that are not finite; `minitron inspect --values` tells "
            "whether the weights do"
        )


def path_losses(stage: PipelineStage, sequences: Tensor, batch: int, base: Path, paths: Sequence[Path]) -> list[float]:
    """The mean loss a token of each path, over this rank's sequences [n, s + 1] and all data-parallel ranks'.

    Each batch runs through `base` once, as far as the last path leaves it, and through each path from there on.
    A loss that is not a number counts as infinite.
    """
    import torch

    if not paths:
        return []
    sums = torch.zeros(len(paths) + 1, dtype=torch.float64, device=stage.device)  # losses; tokens
    shared = _Shared(stage, base, paths)
    said = "depth scan, losses" if len(paths) == 1 else f"depth scan, losses of {len(paths)} models"
    with torch.no_grad(), stage.progress(said, len(sequences)) as progress:
        for tokens in progress.over(_batches(sequences, batch)):
            losses = shared.losses(tokens)
            if losses is not None:
                sums += torch.cat([losses, losses.new_tensor([tokens[:, 1:].numel()])])
    sums = stage.total(sums)
    return [float(value) for value in (sums[:-1] / sums[-1]).nan_to_num(nan=float("inf"), posinf=float("inf"))]


class _Shared:
    """Paths that leave a base, a batch at a time. Streams have the number of their path, the base's has -1."""

    BASE = -1

    def __init__(self, stage: PipelineStage, base: Path, paths: Sequence[Path]):
        self.stage, self.base, self.paths = stage, base, paths
        self.leaves = [path.leaves(base, stage.num_layers) for path in paths]

    def carried(self, layer: int) -> list[int]:
        """Whose streams there are before `layer`."""
        return [self.BASE] * (max(self.leaves) >= layer) + [n for n, left in enumerate(self.leaves) if left < layer]

    def losses(self, tokens: Tensor) -> Tensor | None:
        """Sums of the losses of tokens [b, s + 1] by path, float64; None where the stage is not the last."""
        import torch

        stage = self.stage
        if stage.number == 0:
            streams = {self.BASE: stage.embed(tokens)}
        else:
            carried = self.carried(stage.first)
            streams = dict(zip(carried, stage.receive(len(carried), tokens), strict=True))
        for layer in range(stage.first, stage.end):
            streams = self._through(layer, streams)
        if stage.end < stage.num_layers:
            stage.send([streams[key] for key in self.carried(stage.end)])
            return None
        own = [streams[number if number in streams else self.BASE] for number in range(len(self.paths))]
        return torch.stack([stage.losses(stream, tokens).double().sum() for stream in own])

    def _through(self, layer: int, streams: dict[int, Tensor]) -> dict[int, Tensor]:
        """The streams after a layer: the paths that leave here take it from what the base does."""
        after = {
            number: _after(self.paths[number], layer, stream, functools.partial(self.stage.run, layer, stream))
            for number, stream in streams.items()
            if number != self.BASE
        }
        if self.BASE not in streams:
            return after
        before = streams[self.BASE]
        ran: list[Outcome] = []

        def run_once() -> Outcome:
            if not ran:
                ran.append(self.stage.run(layer, before))
                _check_finite(ran[0][0], layer + 1)
            return ran[0]

        leaving = [number for number, left in enumerate(self.leaves) if left == layer]
        after |= {number: _after(self.paths[number], layer, before, run_once) for number in leaving}
        if max(self.leaves) > layer:
            after[self.BASE] = _after(self.base, layer, before, run_once)
        return after


def _after(path: Path, layer: int, stream: Tensor, run: Callable[[], Outcome]) -> Tensor:
    """A path's stream after a layer; `run` runs the layer."""
    import torch

    if layer in path.skip:
        return stream
    after, m = run()
    if layer not in path.maps:
        return after
    precise = torch.promote_types(m.dtype, torch.float32)
    return after + (m.to(precise) @ path.maps[layer].to(m.device, precise)).to(after.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunMoments:
    """What the map that stands in for layers i .. j-1 is fitted from: sums over tokens, float64, each [h, h].

    Attributes:
        gram: m^T m, m the output of layer i-1's MLP.
        cross: m^T (x_j - x_i).
    """

    gram: Tensor
    cross: Tensor


def run_moments(
    stage: PipelineStage, sequences: Tensor, batch: int, wanted: Sequence[Run], weightings: Sequence[bool]
) -> dict[tuple[Run, bool], RunMoments]:
    """Moments by (run, weighted) over this rank's sequences [n, s + 1] and all data-parallel ranks', on every rank.

    Args:
        wanted: runs of layers (i, j), i > 0.
        weightings: True: tokens weigh 1 / mean(x_j^2), as the norm after them sees them.
    """
    import torch

    hidden = stage.model.config.hidden_size
    place = _place(stage, 16 * hidden**2 * len(wanted) * len(weightings))

    def zeros() -> Tensor:
        return torch.zeros(hidden, hidden, dtype=torch.float64, device=place)

    keys = [(run, weighted) for run in wanted for weighted in weightings]
    sums = {key: RunMoments(gram=zeros(), cross=zeros()) for key in keys}
    count = len(sequences) if wanted else 0
    with torch.no_grad(), stage.progress("depth scan, moments", count) as progress:
        for tokens in progress.over(_batches(sequences, batch) if wanted else ()):
            _add_moments(stage, tokens, wanted, sums)
    return {key: RunMoments(gram=stage.total(s.gram), cross=stage.total(s.cross)) for key, s in sums.items()}


def _place(stage: PipelineStage, size: int) -> torch.device:
    """The model's own device where accumulators of `size` bytes fit there, the host otherwise."""
    import torch

    if stage.device.type != "cuda" or size < DEVICE_SHARE * torch.cuda.mem_get_info(stage.device)[0]:
        return stage.device
    return torch.device("cpu")


def _add_moments(stage: PipelineStage, tokens: Tensor, wanted: Sequence[Run], sums: dict) -> None:
    """Adds a batch: one pass of the teacher as far as the last run's end."""
    last = max(end for _, end in wanted)

    def open_at(layer: int) -> list[int]:
        return sorted({first for first, end in wanted if first <= layer < end})

    held: dict[int, Outcome] = {}  # first layer i of a run -> x_i, m_{i-1}
    if stage.first >= last:
        return
    if stage.number == 0:
        stream = stage.embed(tokens)
    else:
        begun = open_at(stage.first)
        stream, *rest = stage.receive(1 + 2 * len(begun), tokens)
        held = dict(zip(begun, zip(rest[::2], rest[1::2])))
    for layer in range(stage.first, min(stage.end, last)):
        stream, m = stage.run(layer, stream)
        _check_finite(stream, layer + 1)
        for key, moments in sums.items():
            (first, end), weighted = key
            if end == layer + 1:
                _add(moments, *held[first], stream, weighted)
        held = {first: pair for first, pair in held.items() if first in open_at(layer + 1)}
        if layer + 1 in open_at(layer + 1):
            held[layer + 1] = (stream, m)
    if stage.end < last:
        stage.send([stream] + [value for first in open_at(stage.end) for value in held[first]])


def _add(moments: RunMoments, before: Tensor, m: Tensor, after: Tensor, weighted: bool) -> None:
    """Adds x_i, m and x_j of a batch; products in float32 (float64 on a model in float64)."""
    import torch

    precise = torch.promote_types(m.dtype, torch.float32)
    before, m, after = (value.to(precise).flatten(0, 1) for value in (before, m, after))  # [sb, h]
    left = m
    if weighted:
        left = m / after.pow(2).mean(dim=1, keepdim=True).clamp_min(torch.finfo(precise).tiny)
    moments.gram.add_((left.T @ m).to(moments.gram))
    moments.cross.add_((left.T @ (after - before)).to(moments.cross))
