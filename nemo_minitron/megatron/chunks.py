"""Forward passes of a Megatron GPTModel without whole logits: the output layer a few tokens at a time, or not at all.

Legend: s sequence, b micro batch, v vocabulary rows of this rank, h hidden.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor
    from torch.nn import Module

#: Bytes of logits in float32 that are worked out at once.
CHUNK = 64 << 20


@contextlib.contextmanager
def output_in_chunks(
    model: "GPTModel", *, losses: bool = True, states: "Callable[[Tensor], None] | None" = None
) -> Iterator[None]:
    """In the body, passes of `model` with labels give the same losses a token [b, s], and keep no logits [s, b, v].

    Where the sequence is spread over tensor-parallel ranks, the output layer gathers it, and logits stay whole; each
    rank has its share of the vocabulary there. No gradients.

    Args:
        losses: whether the losses are wanted; otherwise they are zeros, and the output layer does not run.
        states: takes what the output layer is given, the last hidden states [s, b, h]; not where the
            sequence is spread.
    """
    if not model.post_process or (losses and model.config.sequence_parallel):
        yield
        return
    layer = model.output_layer
    given: dict[str, Any] = {}
    logits_of, losses_of = layer.forward, model.compute_language_model_loss

    def hand_on(hidden: "Tensor", *arguments: Any, **options: Any) -> "tuple[Tensor, None]":
        given.update(arguments=arguments, options=options)
        return hidden, None

    def in_chunks(labels: "Tensor", hidden: "Tensor") -> "Tensor":
        import torch

        if states is not None:
            states(hidden)
        if not losses:
            return hidden.new_zeros(labels.shape)
        rows = max(1, CHUNK // (4 * hidden.shape[1] * layer.output_size_per_partition))
        parts = []
        for first in range(0, len(hidden), rows):
            logits, _ = logits_of(hidden[first : first + rows], *given["arguments"], **given["options"])
            parts.append(losses_of(labels[:, first : first + rows], logits))
        return torch.cat(parts, dim=1)

    with _replaced(layer, "forward", hand_on), _replaced(model, "compute_language_model_loss", in_chunks):
        yield


def output_weight(model: "GPTModel") -> "Tensor":
    """The output matrix [v, h] of the last stage, the embedding's where they are tied."""
    tied = model.share_embeddings_and_output_weights
    weight: Tensor = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return weight


@contextlib.contextmanager
def _replaced(module: "Module", name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The module with `function` in its method's place."""
    own = vars(module)
    before = own.get(name)
    own[name] = function
    try:
        yield
    finally:
        del own[name]
        if before is not None:
            own[name] = before
