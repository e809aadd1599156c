"""Sizes of published models, by name: for a plan without a checkpoint, and for models from random weights."""

from typing import Any

from nemo_minitron.architecture import Architecture, RopeScaling
from nemo_minitron.errors import ConfigError

_LLAMA31: dict[str, Any] = {
    "family": "llama", "num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128, "vocab_size": 128256,
    "seq_length": 8192, "rotary_base": 500000.0, "rope_scaling": RopeScaling(),
}  # fmt: skip
#: Llama 3.2's small models: embeddings tied, rotary frequencies scaled by 32.
_LLAMA32: dict[str, Any] = {
    **_LLAMA31,
    "share_embeddings_and_output_weights": True,
    "rope_scaling": RopeScaling(factor=32.0),
}
_NEMOTRON: dict[str, Any] = {
    "family": "nemotron", "num_query_groups": 8, "kv_channels": 128, "vocab_size": 256000, "seq_length": 4096,
    "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True, "activation": "squared_relu",
    "gated_linear_unit": False, "rotary_percent": 0.5,
}  # fmt: skip
_MISTRAL_NEMO: dict[str, Any] = {
    "family": "mistral", "num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128, "vocab_size": 131072,
    "seq_length": 8192, "rotary_base": 1000000.0,
}  # fmt: skip
#: Heads are of 128 channels whatever the hidden size is; embeddings are tied up to 4B.
_QWEN3: dict[str, Any] = {
    "family": "qwen3", "num_query_groups": 8, "kv_channels": 128, "vocab_size": 151936, "seq_length": 4096,
    "layernorm_epsilon": 1e-6, "rotary_base": 1000000.0, "qk_layernorm": True,
}  # fmt: skip
_QWEN3_TIED: dict[str, Any] = {**_QWEN3, "share_embeddings_and_output_weights": True}

#: arXiv 2407.14679 (Nemotron-4, Minitron), arXiv 2408.11796 (the others), Meta's model card (Llama 3.1 70B), and the
#: config.json of meta-llama/Llama-3.2-1B, meta-llama/Llama-3.2-3B, HuggingFaceTB/SmolLM2-135M-Instruct and
#: Qwen/Qwen3-0.6B, -1.7B, -4B, -8B, -14B and -32B. qwen3_6b is a shape for a student of Qwen3-8B.
KNOWN: dict[str, Architecture] = {
    "llama31_8b": Architecture(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, **_LLAMA31),
    "llama31_70b": Architecture(
        num_layers=80, hidden_size=8192, ffn_hidden_size=28672, **{**_LLAMA31, "num_attention_heads": 64}
    ),
    "llama31_minitron_4b_width": Architecture(num_layers=32, hidden_size=3072, ffn_hidden_size=9216, **_LLAMA31),
    "llama31_minitron_4b_depth": Architecture(num_layers=16, hidden_size=4096, ffn_hidden_size=14336, **_LLAMA31),
    "llama32_1b": Architecture(
        num_layers=16, hidden_size=2048, ffn_hidden_size=8192, **{**_LLAMA32, "kv_channels": 64}
    ),
    "llama32_3b": Architecture(
        num_layers=28, hidden_size=3072, ffn_hidden_size=8192, **{**_LLAMA32, "num_attention_heads": 24}
    ),
    "nemotron4_15b": Architecture(
        num_layers=32, hidden_size=6144, ffn_hidden_size=24576, num_attention_heads=48, **_NEMOTRON
    ),
    "minitron_8b": Architecture(
        num_layers=32, hidden_size=4096, ffn_hidden_size=16384, num_attention_heads=48, **_NEMOTRON
    ),
    "minitron_4b": Architecture(
        num_layers=32, hidden_size=3072, ffn_hidden_size=9216, num_attention_heads=24, **_NEMOTRON
    ),
    "mistral_nemo_12b": Architecture(num_layers=40, hidden_size=5120, ffn_hidden_size=14336, **_MISTRAL_NEMO),
    "mn_minitron_8b": Architecture(num_layers=40, hidden_size=4096, ffn_hidden_size=11520, **_MISTRAL_NEMO),
    "smollm2_135m": Architecture(
        family="llama", num_layers=30, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9,
        num_query_groups=3, kv_channels=64, vocab_size=49152, seq_length=8192, rotary_base=100000.0,
        share_embeddings_and_output_weights=True,
    ),
    "qwen3_0.6b": Architecture(
        num_layers=28, hidden_size=1024, ffn_hidden_size=3072, num_attention_heads=16, **_QWEN3_TIED
    ),
    "qwen3_1.7b": Architecture(
        num_layers=28, hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=16, **_QWEN3_TIED
    ),
    "qwen3_4b": Architecture(
        num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_attention_heads=32, **_QWEN3_TIED
    ),
    "qwen3_6b": Architecture(
        num_layers=30, hidden_size=3584, ffn_hidden_size=11776, num_attention_heads=32, **_QWEN3
    ),
    "qwen3_8b": Architecture(
        num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32, **_QWEN3
    ),
    "qwen3_14b": Architecture(
        num_layers=40, hidden_size=5120, ffn_hidden_size=17408, num_attention_heads=40, **_QWEN3
    ),
    "qwen3_32b": Architecture(
        num_layers=64, hidden_size=5120, ffn_hidden_size=25600, num_attention_heads=64, **_QWEN3
    ),
    "tiny": Architecture(
        num_layers=6, hidden_size=192, ffn_hidden_size=576, num_attention_heads=6, num_query_groups=2, kv_channels=32,
        vocab_size=1536, seq_length=128,
    ),
}  # fmt: skip


def known_model(name: str, problem: str, source: str) -> Architecture:
    """The sizes of the known model `name`.

    Args:
        problem: what to say before the names, where it is not one of them.
        source: what was being read, for the message.

    Raises:
        ConfigError: `name` is not known.
    """
    if not isinstance(name, str) or name not in KNOWN:
        raise ConfigError(f"{problem}: {', '.join(sorted(KNOWN))}", source)
    return KNOWN[name]


def stated_fields(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """The fields of Architecture that the setting model.architecture states.

    Args:
        settings: the fields, or `known`, a known model's name, and the fields that are to differ from it.
        source: what was being read, for the message.

    Raises:
        ConfigError: the model is not known.
    """
    fields = dict(settings)
    if "known" not in fields:
        return fields
    name = fields.pop("known")
    model = known_model(name, f"model.architecture.known = {name} is none of the known models", source)
    return model.to_dict() | fields
