"""What a NeMo-2 checkpoint calls things: its folders, NeMo's classes of each family, the fields of their configs."""

import re
from typing import Any

from nemo_minitron.checkpoints import generation, not_yet

CONTEXT, WEIGHTS = "context", "weights"
MODEL_YAML, GENERATION = "model.yaml", f"artifacts/{generation.FILE}"
PREFIX = "module."
#: Where a conversion notes, in the context's `extra`, how many rows of the vocabulary are padding.
PADDING = "vocab_padding"

#: Prefix of a NeMo config class -> family. The first that fits counts.
FAMILY_OF_CLASS = (
    ("Llama", "llama"),
    ("Mistral", "mistral"),
    ("Nemotron", "nemotron"),
    ("Qwen2", "qwen2"),
    ("Qwen3", "qwen3"),
    ("GPTConfig", "gpt"),
)
#: NeMo's config classes that are no family's here, most of them named like one's -> what is said of them.
NOT_YET = (
    (re.compile(r"Qwen3(MoE|Config\d+B_A)"), not_yet.QWEN3_MOE),
    (re.compile(r"Llama\d*Nemotron(Super|Ultra)"), not_yet.HETEROGENEOUS),
    (re.compile(r"Llama\d*(Bidirectional|Embedding|Reranker)"), not_yet.BOTH_WAYS),
    (re.compile(r"Llama4"), not_yet.LLAMA4),
    (re.compile(r"NemotronH"), not_yet.NEMOTRON_H),
    (re.compile(r"Qwen2\d?VL"), not_yet.QWEN_VL),
    (re.compile(r"Phi3"), not_yet.PHI3),
)
#: Fields of Megatron's HeterogeneousTransformerConfig.
HETEROGENEOUS = ("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json")
#: Family -> (model class, config class) of nemo.collections.llm.
CLASSES = {
    "llama": ("LlamaModel", "LlamaConfig"),
    "mistral": ("MistralModel", "MistralConfig7B"),
    "nemotron": ("NemotronModel", "NemotronConfig"),
    "qwen2": ("Qwen2Model", "Qwen2Config"),
    "qwen3": ("Qwen3Model", "Qwen3Config"),
    "gpt": ("GPTModel", "GPTConfig"),
}
#: What the families' config classes in NeMo 2.7 say where a checkpoint says nothing.
RMS_GATED = {
    "normalization": "RMSNorm", "activation": "silu", "gated_linear_unit": True, "add_bias_linear": False,
    "share_embeddings_and_output_weights": False,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**RMS_GATED, "seq_length": 4096},
    "mistral": {**RMS_GATED, "seq_length": 32768},
    "nemotron": {
        "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True, "activation": "squared_relu",
        "gated_linear_unit": False, "add_bias_linear": False, "rotary_percent": 0.5, "init_method_std": 0.0134,
        "share_embeddings_and_output_weights": False, "seq_length": 4096,
    },
    "qwen2": {**RMS_GATED, "add_qkv_bias": True, "layernorm_epsilon": 1e-6, "rotary_base": 1e6, "seq_length": 4096},
    "qwen3": {
        **RMS_GATED, "qk_layernorm": True, "layernorm_epsilon": 1e-6, "rotary_base": 1e6, "seq_length": 4096,
        "kv_channels": 128, "num_query_groups": 8,
    },
    "gpt": {
        "normalization": "LayerNorm", "activation": "gelu", "gated_linear_unit": False, "add_bias_linear": True,
        "share_embeddings_and_output_weights": True, "seq_length": 1024,
    },
}  # fmt: skip
ROPE_SCALING = {
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_length",
}
