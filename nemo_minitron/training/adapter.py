"""An adapter in the layout of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

Megatron's fused layers are several of Hugging Face's: each of those gets A [r, i], and its own rows of B [o, r].
"""

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import write_json
from nemo_minitron.checkpoints.formats.huggingface import mapping as huggingface
from nemo_minitron.checkpoints.formats.parts import part_ranges
from nemo_minitron.config import PeftConfig
from nemo_minitron.megatron.lora import factors, wrapped_layers

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor

ADAPTER = "adapter"
PREFIX = "base_model.model."


def keep_adapter(model: "GPTModel", architecture: Architecture, config: PeftConfig, folder: Path, base: str) -> None:
    """Writes the adapters of a Megatron model, before they are merged, to `folder`; rank 0 does.

    Args:
        base: what adapter_config.json names as the model that it belongs to.
    """
    import torch
    from safetensors.torch import save_file

    if torch.distributed.get_rank() != 0:
        return
    names, tensors, targets = huggingface.hf_names(architecture), {}, set()
    for layer, wrapper in wrapped_layers(model).items():
        down, up, _ = factors(wrapper)
        parts = names[f"{layer}.weight"][0]
        for part, rows in zip(parts, rows_of(architecture, len(parts), up)):
            theirs = part.removesuffix(".weight")
            targets.add(theirs.rpartition(".")[2])
            tensors[f"{PREFIX}{theirs}.lora_A.weight"] = down.cpu().clone()
            tensors[f"{PREFIX}{theirs}.lora_B.weight"] = rows.cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.dim,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", settings)


def rows_of(architecture: Architecture, parts: int, tensor: "Tensor") -> "list[Tensor]":
    """The rows of each of Hugging Face's `parts` layers in a tensor of Megatron's fused one."""
    import torch

    if parts == 1:
        return [tensor]
    ranges = part_ranges(architecture, parts, tensor.shape[0])
    return [torch.cat([tensor[first:last] for first, last in part]) for part in ranges]
