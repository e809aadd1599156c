"""Tiny models of every family, made and saved by transformers."""

import copy
from pathlib import Path
from typing import Any

import torch

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 259, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA31 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
#: Name -> (transformers' name before Config and ForCausalLM, changes to SMALL).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_theta": 500000.0, "vocab_size": 256}),
    "llama31": ("Llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA31}),
    "llama32-tied": ("Llama", {"tie_word_embeddings": True, "rope_scaling": {**LLAMA31, "factor": 32.0}}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 8}),
    "mistral-nemo": ("Mistral", {"head_dim": 24, "sliding_window": None}),
    "nemotron": ("Nemotron", {"rope_theta": 10000.0}),
    "minitron-width": ("Nemotron", {"head_dim": 32, "hidden_size": 48, "intermediate_size": 80}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6}),
    "qwen25-tied": ("Qwen2", {"tie_word_embeddings": True, "head_dim": 8}),
    # Qwen2.5 0.5B (14 heads in 2 groups, hidden 896, FFN 4864), widths divided by 8.
    "qwen25-0.5b": ("Qwen2", {"tie_word_embeddings": True, "hidden_size": 112, "intermediate_size": 608,
                              "num_attention_heads": 14}),
    "qwen3": ("Qwen3", {"rope_theta": 1e6, "head_dim": 24}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 32, "num_key_value_heads": 1}),
    # NVIDIA/NeMo 14487 (22 layers, hidden 3712, FFN 10048, 16 heads), sizes divided by 32 but for layers and heads.
    "nemo-14487": ("Llama", {"num_hidden_layers": 22, "hidden_size": 116, "intermediate_size": 314,
                             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8}),
    # TensorRT-Model-Optimizer 105: 32 heads pruned to 24, the head size kept.
    "modelopt-105": ("Llama", {"hidden_size": 128, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 4}),
}  # fmt: skip


def build(name: str, dtype: torch.dtype, seed: int = 0, **sizes: Any) -> torch.nn.Module:
    """A model with random weights, norms and biases included; `sizes` go before the family's."""
    import transformers

    kind, changes = FAMILIES[name]
    changes = copy.deepcopy(changes)  # transformers 5 adds to rope_scaling
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes, **sizes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).eval()


def save(name: str, dtype: torch.dtype, folder: Path, shard: str = "5GB", **sizes: Any) -> Path:
    """Saves it as a Hugging Face directory."""
    build(name, dtype, **sizes).save_pretrained(folder, max_shard_size=shard)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face directory, read by safetensors."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts hold the same bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
