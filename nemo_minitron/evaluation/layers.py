"""How long the parts of a model take: one layer of random weights of each width, timed where it stands."""

import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_minitron.architecture import Architecture

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module
    from transformers import DynamicCache

#: Tokens that decode makes in a round.
DECODED = 8


class PartTimes(NamedTuple):
    """Seconds of the parts of one forward pass.

    Attributes:
        attention, mlp: of one layer.
        norms: what else one layer does.
        outer: all outside the layers: embedding, final norm, output layer.
    """

    attention: float
    mlp: float
    norms: float
    outer: float

    def total(self, layers: int) -> float:
        """Of a model of so many layers."""
        return layers * (self.attention + self.mlp + self.norms) + self.outer


def time_parts(
    shape: Architecture, *, device: str, dtype: "torch.dtype", batch: int, length: int, rounds: int, seed: int
) -> dict[str, PartTimes]:
    """`prefill`: of a prompt of `length` tokens; `decode`: of one token behind it. Medians over rounds.

    The model has one layer of the shape's sizes and random weights: times do not depend on what they are.

    Args:
        batch: sequences at once.
    """
    import torch
    from transformers import DynamicCache

    from nemo_minitron.checkpoints.transformers_model import model_class, model_config

    torch.manual_seed(seed)
    one = shape.with_sizes(num_layers=1)
    model = model_class(one.family)(model_config(one, str(dtype).removeprefix("torch.")))
    model = model.to(device=device, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = one.vocab_size - one.vocab_padding
    prompt = torch.randint(0, tokens, (batch, length), generator=generator).to(device)
    watches = Watches(model, cuda=device != "cpu")
    taken: dict[str, list[PartTimes]] = {"prefill": [], "decode": []}
    with torch.inference_mode():
        for number in range(rounds + 1):
            cache = DynamicCache()
            prefill = watches.of(model, prompt, cache)
            decode = _median([watches.of(model, prompt[:, :1], cache) for _ in range(DECODED)])
            if number:  # the first is not counted
                taken["prefill"].append(prefill)
                taken["decode"].append(decode)
    return {what: _median(parts) for what, parts in taken.items()}


def _median(parts: list[PartTimes]) -> PartTimes:
    return PartTimes(*(statistics.median(values) for values in zip(*parts)))


class Watches:
    """Hooks that take the time of a one-layer model's attention, MLP and layer."""

    def __init__(self, model: "Module", *, cuda: bool):
        self.cuda, self.seconds = cuda, dict[str, float]()
        layer: Any = model.get_submodule("model.layers.0")
        for name, module in (("layer", layer), ("attention", layer.self_attn), ("mlp", layer.mlp)):
            self._watch(name, module)

    def _watch(self, name: str, module: "Module") -> None:
        def before(*_: Any) -> None:
            self.seconds[name] = self.now()

        def after(*_: Any) -> None:
            self.seconds[name] = self.now() - self.seconds[name]

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def of(self, model: "Module", tokens: "Tensor", cache: "DynamicCache") -> PartTimes:
        """The times of the parts of a forward pass over `tokens` behind those in the cache."""
        started = self.now()
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        whole, layer = self.now() - started, self.seconds["layer"]
        attention, mlp = self.seconds["attention"], self.seconds["mlp"]
        return PartTimes(attention, mlp, layer - attention - mlp, whole - layer)

    def now(self) -> float:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()
