"""Which block of layers a teacher misses least, and the linear map that stands in for it.

Legend: s sequence, b micro batch, h hidden, f FFN, l layers, x_k the stream before layer k (k = 0 .. l - 1, x_l after
the last), m_k the output of layer k's MLP.

The loss without layers i .. i+n-1 (arXiv 2408.11796, section 2.3, with the language-model loss as the criterion) is
that of layers i+n .. l-1 run on x_i. All x_i come from one pass, so that scanning every block of n layers runs
l + (l-n) + (l-n-1) + ... + 0 layers instead of (l-n+1)(l-n).

A dropped block i .. j-1 is replaced by x_i + m_{i-1} D with D of least ||x_i + m_{i-1} D - x_j||^2 + lambda ||D||^2,
which is a change of linear_fc2 of layer i-1 alone (ReplaceMe, arXiv 2505.02819). D = 0 is plain dropping, and so is
lambda = infinity; lambda is the one of least language-model loss on samples that D was not fitted to.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from nemo_minitron.artifacts import DepthScan
from nemo_minitron.errors import MinitronError
from nemo_minitron.progress import Progress, Silent
from nemo_minitron.ridge import ridge

#: Ridge strengths, in units of the mean diagonal of the gram matrix.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: Every so many samples one is held out of the fit.
HOLD_OUT = 4

Run = tuple[int, int]


def runs(layers: Sequence[int]) -> list[Run]:
    """Contiguous runs of layers (1-based) as (first, one past the last), 0-based."""
    found: list[Run] = []
    for layer in sorted(layer - 1 for layer in layers):
        if found and found[-1][1] == layer:
            found[-1] = (found[-1][0], layer + 1)
        else:
            found.append((layer, layer + 1))
    return found


def blocks_of(num_layers: int, size: int) -> list[Run]:
    """Every contiguous block of `size` layers."""
    return [(first, first + size) for first in range(num_layers - size + 1)]


def layers_of(blocks: Sequence[Run]) -> list[int]:
    """The layers of blocks, 1-based."""
    return [layer + 1 for first, end in blocks for layer in range(first, end)]


def scan_blocks(
    model: Any, sequences: Any, batch: int, blocks: list[Run], *, choose: bool, progress: Progress | None = None
) -> DepthScan:
    """Scans `blocks` of a Megatron GPTModel that is whole on this rank; data-parallel ranks share the samples.

    Args:
        sequences: tokens [n, s + 1].
        choose: drop the one block of least loss; otherwise all of them together.
        progress: is told of each batch that was scanned.

    Returns:
        the scan; `report` has the teacher's loss, and on held-out samples the losses of the student by ridge strength.
    """
    import torch

    ours = _mine(sequences)
    held_out = torch.zeros(len(ours), dtype=torch.bool)
    held_out[HOLD_OUT - 1 :: HOLD_OUT] = True
    sums = _Sums(len(blocks), model.config.hidden_size, next(model.parameters()).device)
    progress = progress or Silent()
    for tokens in progress.over(ours[~held_out].split(batch)):
        _scan_batch(model, tokens, blocks, sums, fit=True)
    for tokens in progress.over(ours[held_out].split(batch)):
        _scan_batch(model, tokens, blocks, sums, fit=False)
    sums.reduce()
    losses = [float(value) for value in sums.losses / sums.tokens]
    listed = [{"first": first + 1, "last": end, "loss": loss} for (first, end), loss in zip(blocks, losses)]
    best = min(range(len(blocks)), key=losses.__getitem__)
    chosen = [best] if choose else range(len(blocks))
    dropped = [blocks[index] for index in chosen]
    folded = {blocks[index][0]: (sums.gram[index], sums.cross[index]) for index in chosen if blocks[index][0] > 0}
    report = {"teacher_loss": float(sums.teacher / sums.tokens)}
    folds, found = _best_folds(model, ours[held_out], batch, dropped, folded)
    return DepthScan(
        blocks=listed,
        drop_layers=layers_of(dropped),
        folds={str(first): fold for first, fold in folds.items()},
        report=report | found,
    )


def _mine(sequences: Any) -> Any:
    from megatron.core import parallel_state

    ranks = parallel_state.get_data_parallel_world_size()
    return sequences[parallel_state.get_data_parallel_rank() :: ranks]


class _Sums:
    """Sums over samples of this rank, float64: losses, and the moments that each block's map is fitted from."""

    def __init__(self, blocks: int, hidden: int, device: Any):
        import torch

        def zeros(*shape: int) -> Any:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens, self.teacher, self.losses = zeros(1), zeros(1), zeros(blocks)
        self.gram = [zeros(hidden, hidden) for _ in range(blocks)]  # m^T m
        self.cross = [zeros(hidden, hidden) for _ in range(blocks)]  # m^T (x_j - x_i)

    def reduce(self) -> None:
        """Adds up those of all data-parallel ranks."""
        import torch
        from megatron.core import parallel_state

        group = parallel_state.get_data_parallel_group()
        for total in (self.tokens, self.teacher, self.losses, *self.gram, *self.cross):
            torch.distributed.all_reduce(total, group=group)


def _scan_batch(model: Any, tokens: Any, blocks: list[Run], sums: _Sums, *, fit: bool) -> None:
    """One pass over all layers, then the layers after each block on what was there before it."""
    layers = list(model.decoder.layers)
    streams: list[Any] = []  # x_0 .. x_l, each [s, b, h]
    outputs: list[Any] = []  # m_0 .. m_{l-1}, each [s, b, h]
    handles = []
    for layer in layers:
        handles.append(layer.input_layernorm.register_forward_pre_hook(lambda _, args: streams.append(args[0])))
        handles.append(layer.mlp.register_forward_hook(lambda _, args, output: outputs.append(_whole(output))))
    handles.append(model.decoder.final_layernorm.register_forward_pre_hook(lambda _, args: streams.append(args[0])))
    try:
        losses = _losses(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    bad = next((number for number, stream in enumerate(streams) if not stream.isfinite().all()), None)
    if bad is not None:
        raise MinitronError(
            f"layer {bad}: the stream after it holds values that are not finite; `minitron inspect --values` tells "
            "whether the weights do"
        )
    sums.tokens += losses.numel()
    sums.teacher += losses.double().sum()
    for index, (first, end) in enumerate(blocks):
        with _layers(model, layers[end:]):
            sums.losses[index] += _losses(model, tokens, streams[first]).double().sum()
        if fit and first > 0:
            m = outputs[first - 1].flatten(0, 1).float()  # [sb, h]
            difference = (streams[end].float() - streams[first].float()).flatten(0, 1)
            sums.gram[index] += (m.T @ m).double()
            sums.cross[index] += (m.T @ difference).double()


def _whole(output: Any) -> Any:
    """An MLP's output with its bias added [s, b, h]; a copy, since Megatron adds the stream to it in place."""
    value, bias = output
    return value.clone() if bias is None else value + bias


def _losses(model: Any, tokens: Any, stream: Any = None) -> Any:
    """Losses a token [b, s] on tokens [b, s + 1], with `stream` [s, b, h], if given, in the embedding's place."""
    import torch

    from nemo_minitron.runtime.chunks import output_in_chunks

    tokens = tokens.to(next(model.parameters()).device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    with torch.no_grad(), output_in_chunks(model):
        output = model(
            input_ids=inputs, position_ids=positions, attention_mask=None, decoder_input=stream, labels=labels
        )
    return output.float()


@contextlib.contextmanager
def _layers(model: Any, layers: list[Any]) -> Iterator[None]:
    """`model` with these layers only."""
    import torch

    own = model.decoder.layers
    model.decoder.layers = torch.nn.ModuleList(layers)
    try:
        yield
    finally:
        model.decoder.layers = own


def _best_folds(
    model: Any, held_out: Any, batch: int, dropped: list[Run], moments: dict[int, tuple[Any, Any]]
) -> tuple[dict[int, Any], dict[str, Any]]:
    """The maps of the ridge strength with the least held-out loss of the student, none where plain dropping has it.

    Args:
        moments: first layer of a dropped block -> gram and cross moments.

    Returns:
        number of the layer before a block (1-based) -> D [h, h] float32; losses on the held-out samples by strength.
    """
    import torch

    layers = list(model.decoder.layers)
    gone = {layer for first, end in dropped for layer in range(first, end)}
    candidates: list[tuple[float | None, dict[int, Any]]] = [(None, {})]
    for strength in STRENGTHS if moments else ():
        candidates += [(strength, {first: ridge(*pair, strength).float() for first, pair in moments.items()})]
    losses = []
    with _layers(model, [layer for number, layer in enumerate(layers) if number not in gone]):
        for _, folds in candidates:
            with _folded(layers, folds):
                total = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
                for tokens in held_out.split(batch):
                    found = _losses(model, tokens)
                    total += torch.stack([found.double().sum(), torch.tensor(float(found.numel())).to(total)])
                losses.append(_shared_mean(total))
    best = min(range(len(losses)), key=losses.__getitem__)
    strength, folds = candidates[best]
    report = {
        "held_out_loss_plain": losses[0],
        "held_out_loss": losses[best],
        "ridge": strength if strength is not None else "none: plain dropping is best",
        "held_out_losses": [{"ridge": candidate[0], "loss": loss} for candidate, loss in zip(candidates, losses)],
    }
    return {first: fold.cpu() for first, fold in folds.items()}, report


def _shared_mean(total: Any) -> float:
    """Mean of (sum, count) over the data-parallel ranks."""
    import torch
    from megatron.core import parallel_state

    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total[0] / total[1])


@contextlib.contextmanager
def _folded(layers: list[Any], folds: dict[int, Any]) -> Iterator[None]:
    """The model with the maps in linear_fc2 of the layers before the blocks: W2 -> (I + D)^T W2."""
    import torch

    saved = []
    with torch.no_grad():
        for first, fold in folds.items():
            fc2 = layers[first - 1].mlp.linear_fc2
            for parameter in (fc2.weight, fc2.bias):
                if parameter is not None:
                    saved.append((parameter, parameter.clone()))
                    parameter += (fold.to(parameter.device).T @ parameter.float()).to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, before in saved:
                parameter.copy_(before)
