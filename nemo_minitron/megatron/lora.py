"""NeMo's LoRA adapters on a Megatron model: put in, told apart from the frozen weights, merged, kept.

Legend: r rank, i input features, o output features.

LoRA (arXiv 2106.09685, section 4.1): y = W x + (alpha / r) B A x with A [r, i] random, B [o, r] zero at the start.
Merged, W' = W + (alpha / r) B A.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import PeftConfig

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from nemo.collections.llm import GPTModel
    from nemo.collections.llm.peft.lora import LoRALinear
    from torch import Tensor
    from torch.nn import Module

ADAPTER = ".adapter."
#: Rows of a weight that are merged at once.
ROWS = 2048


def add_adapters(module: "GPTModel", config: PeftConfig) -> None:
    """Freezes NeMo's GPTModel `module`, whose Megatron model has its weights already, and wraps the target layers."""
    from nemo.collections.llm.peft import LoRA

    transform = LoRA(
        target_modules=list(config.target_modules), dim=config.dim, alpha=config.alpha, dropout=config.dropout
    )
    with _known_without_transformer_engine():
        transform(module)


@contextlib.contextmanager
def _known_without_transformer_engine() -> Iterator[None]:
    """Lets NeMo tell layers apart where Transformer Engine is not installed; does nothing where it is.

    NeMo's LoRA compares each layer with its Linear, and asking for that raises. For the layers' sizes it takes the
    classes of Megatron's extension, which are importable all the same, but some of which are None. In the body there is
    a Linear that no layer is of, and no extension.
    """
    from nemo.collections.llm.peft import lora, utils

    if lora.HAVE_TE:
        yield
        return
    before = lora.te, utils.HAVE_TE
    lora.te, utils.HAVE_TE = types.SimpleNamespace(Linear=type("NotInstalled", (), {})), False
    try:
        yield
    finally:
        lora.te, utils.HAVE_TE = before


def wrapped_layers(model: "Module") -> "dict[str, LoRALinear]":
    """Name -> NeMo's wrapper (`to_wrap` and `adapter`) of each layer that has an adapter."""
    from nemo.collections.llm.peft.lora import LoRALinear

    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def trained_part(shards: dict[str, Any]) -> dict[str, Any]:
    """Of a sharded state dict what training changes: the adapters where there are any, all of it otherwise."""
    return {name: value for name, value in shards.items() if ADAPTER in name} or shards


def merge_adapters(model: "Module") -> None:
    """Adds each adapter's product to the weight it stands beside and takes the wrapper out; every rank calls it.

    The sum is worked out in float64 and rounded once, to the weight's own type.
    """
    import torch

    for name, wrapper in wrapped_layers(model).items():
        down, up, scale = factors(wrapper)  # A [r, i], B [o, r]: this rank's columns or rows
        weight = wrapper.to_wrap.weight
        with torch.no_grad():
            for start in range(0, weight.shape[0], ROWS):
                rows = slice(start, start + ROWS)
                weight[rows] = (weight[rows].double() + scale * (up[rows].double() @ down.double())).to(weight.dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, wrapper.to_wrap)


def factors(wrapper: "LoRALinear") -> "tuple[Tensor, Tensor, float]":
    """A and B of an adapter, as they stand beside this rank's share of the weight, and the scale of their product.

    Megatron cuts A of a column-parallel layer by its rows, and B of a row-parallel one: those are put together.
    """
    adapter = wrapper.adapter
    down, up = adapter.linear_in.weight.detach(), adapter.linear_out.weight.detach()
    if adapter.input_is_parallel:
        up = _gathered(up)
    else:
        down = _gathered(down)
    return down, up, adapter.alpha / adapter.dim


def _gathered(part: "Tensor") -> "Tensor":
    """The rows of all tensor-parallel ranks."""
    import torch
    from megatron.core import parallel_state

    ranks = parallel_state.get_tensor_model_parallel_world_size()
    if ranks == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(ranks)]
    torch.distributed.all_gather(parts, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts)


def reseeding(seed: int) -> "pl.Callback":
    """A callback that seeds each step by its number, so that a resumed run drops out what one left alone would have."""
    import lightning.pytorch as pl
    import torch
    from megatron.core import parallel_state

    class Reseeding(pl.Callback):
        def on_train_batch_start(self, trainer: "pl.Trainer", *arguments: Any) -> None:
            ranks = parallel_state.get_data_parallel_world_size()
            own = parallel_state.get_data_parallel_rank()
            torch.manual_seed((seed * 1_000_003 + int(trainer.global_step)) * ranks + own)

    return Reseeding()
