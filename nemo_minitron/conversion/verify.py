"""A conversion checks itself: what was written is opened again and compared with what it was made from."""

import importlib.util
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.checkpoints.formats.base import TRANSFORMERS, MegatronFormat
from nemo_minitron.checkpoints.formats.huggingface.families import FAMILIES
from nemo_minitron.checkpoints.names import EMBEDDING, OUTPUT
from nemo_minitron.checkpoints.tensors import Lazy, Resized, same_bits, same_numbers
from nemo_minitron.checkpoints.transformers_model import load_model, quiet_loading
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    import torch

STRENGTH = ("none", "tensors", "logits")
#: Tensors that are compared bit for bit, beside the norms, which are all.
SAMPLE = 12
TOKENS = (2, 24)
#: Largest difference of logits, relative to the largest logit: both sides compute in fp32 from the same bits.
TOLERANCE = 1e-4
#: Share of the available memory that a model in fp32 may take for its logits to be computed.
MEMORY_SHARE = 0.6


def fits_in_memory(checkpoint: Checkpoint) -> bool:
    """Whether the model can run here in fp32, one side at a time."""
    available = _available_memory()
    return available is None or 4 * checkpoint.architecture.parameters() < MEMORY_SHARE * available


def _available_memory() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def resolve(verify: str, source: Checkpoint) -> str:
    """What verify=auto means for this checkpoint on this machine."""
    if verify != "auto":
        return verify
    if source.quantization is not None:
        return "tensors"
    engines = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "megatron"))
    return "logits" if engines and fits_in_memory(source) and source.architecture.family in FAMILIES else "tensors"


def compare_tensors(expected: Mapping[str, Lazy], result: Checkpoint, seed: int) -> dict[str, Any]:
    """Compares all norms and a sample of the rest bit for bit; every shape and name was checked when it was opened.

    Args:
        expected: what was to be written, as the result's format holds it.

    Raises:
        CheckpointError: a tensor differs.
    """
    names = [name for name in expected if len(expected[name].shape) == 1]
    rest = [name for name in expected if len(expected[name].shape) > 1]
    names += random.Random(seed).sample(rest, min(SAMPLE, len(rest)))
    compared = 0
    for name in names:
        wanted, written = expected[name], result.tensors[name]
        if name in (EMBEDDING, OUTPUT) and wanted.shape[0] > written.shape[0]:
            wanted = Resized(wanted, written.shape[0])
        same = same_bits if result.kind.keeps_precision else same_numbers
        if not same(wanted, written):
            raise CheckpointError(f"{result.path}: {name} is not what was to be written; the conversion went wrong")
        compared += wanted.nbytes
    return {"tensors_compared": len(names), "bytes_compared": compared}


def compare_logits(source: Checkpoint, result: Checkpoint, seed: int, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Runs both models in fp32 on random tokens; Hugging Face by transformers, NeMo by Megatron.

    Raises:
        CheckpointError: the logits differ by more than rounding.
    """
    import torch

    tokens = min(c.architecture.vocab_size - c.architecture.vocab_padding for c in (source, result))
    batch = torch.randint(0, tokens, TOKENS, generator=torch.Generator().manual_seed(seed))  # [b, s]
    expected, computed = (logits(checkpoint, batch, seed)[..., :tokens] for checkpoint in (source, result))  # [b, s, v]
    scale = float(expected.abs().max()) or 1.0
    difference = float((expected - computed).abs().max()) / scale
    if not difference <= tolerance:
        raise CheckpointError(
            f"{result.path} does not compute what {source.path} does: logits differ by {difference:.2g} of the "
            f"largest, {tolerance:.0e} is rounding; please report it with `minitron inspect` of both"
        )
    return {"logits_relative_difference": difference}


def logits(checkpoint: Checkpoint, tokens: "torch.Tensor", seed: int = 0) -> "torch.Tensor":
    """The model's logits in fp32 [b, s, v], by the engine of the checkpoint's own side."""
    if checkpoint.kind.engine == TRANSFORMERS:
        return _by_transformers(checkpoint, tokens)
    return _by_megatron(checkpoint, tokens, seed)


def _by_transformers(checkpoint: Checkpoint, tokens: "torch.Tensor") -> "torch.Tensor":
    import torch

    with quiet_loading(), torch.no_grad():
        return load_model(checkpoint, torch.float32)(tokens).logits.float()


def _by_megatron(checkpoint: Checkpoint, tokens: "torch.Tensor", seed: int) -> "torch.Tensor":
    import tempfile
    from pathlib import Path

    import torch

    from nemo_minitron.megatron.forward import load_model, parallel_ranks
    from nemo_minitron.megatron.layout import Layout
    from nemo_minitron.megatron.session import engine
    from nemo_minitron.megatron.weights import load_strictly

    layout = Layout(cuda=False, bf16=False)
    with (
        tempfile.TemporaryDirectory(prefix="minitron-") as folder,
        engine(seed, Path(folder) / "log", cuda=layout.cuda),
        parallel_ranks(layout, max(seed, 1)),
    ):
        strictly = isinstance(checkpoint.kind, MegatronFormat)
        model = load_model(checkpoint.architecture, layout, None if strictly else checkpoint, local_spec=True)
        if strictly:
            load_strictly(model, checkpoint)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            return model(input_ids=tokens, position_ids=positions, attention_mask=None).float()
