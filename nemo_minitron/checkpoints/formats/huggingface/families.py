"""Families of models on the Hugging Face side: one table of them, with the names of their tensors.

A canonical tensor is one Hugging Face tensor, or several: linear_qkv has query, key and value interleaved by group, and
a gated linear_fc1 has its gate above.
"""

import dataclasses
from typing import Any

from nemo_minitron.checkpoints import not_yet

#: Canonical name inside a layer -> Hugging Face names inside a layer. Biases and norm biases follow their weights.
LLAMA_LAYER: dict[str, tuple[str, ...]] = {
    "self_attention.linear_qkv.layer_norm_": ("input_layernorm.",),
    "self_attention.linear_qkv.": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    "self_attention.linear_proj.": ("self_attn.o_proj.",),
    "mlp.linear_fc1.layer_norm_": ("post_attention_layernorm.",),
    "mlp.linear_fc1.": ("mlp.gate_proj.", "mlp.up_proj."),
    "mlp.linear_fc2.": ("mlp.down_proj.",),
}
QWEN3_LAYER = {
    **LLAMA_LAYER,
    "self_attention.q_layernorm.": ("self_attn.q_norm.",),
    "self_attention.k_layernorm.": ("self_attn.k_norm.",),
}
NEMOTRON_LAYER = {**LLAMA_LAYER, "mlp.linear_fc1.": ("mlp.up_proj.",)}
OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.final_layernorm.bias": "model.norm.bias",
    "output_layer.weight": "lm_head.weight",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a family is called and how its configuration reads.

    Attributes:
        model_type: `model_type` of config.json.
        architecture: the class in `architectures`.
        layer: names inside a layer.
        norm_eps: the key of the norm's epsilon.
        defaults: what transformers takes where config.json says nothing (by config.json's names).
        fixed: fields of Architecture that hold for the whole family.
        written: what its config.json says beside what all families' do.
        biases: whether linear layers may have biases (`attention_bias`, `mlp_bias`).
        partial_rotary: whether a share of each head may be rotated.
        rope_scaling: whether the rotary frequencies may be scaled as in Llama 3.1.
        window: whether all layers may have a sliding window.
    """

    model_type: str
    architecture: str
    layer: dict[str, tuple[str, ...]]
    norm_eps: str
    defaults: dict[str, Any]
    fixed: dict[str, Any]
    written: dict[str, Any] = dataclasses.field(default_factory=dict)
    biases: bool = False
    partial_rotary: bool = False
    rope_scaling: bool = True
    window: bool = False


GATED = {"normalization": "RMSNorm", "gated_linear_unit": True}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        layer=LLAMA_LAYER,
        norm_eps="rms_norm_eps",
        defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        fixed=GATED,
        biases=True,
    ),
    "mistral": Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        layer=LLAMA_LAYER,
        norm_eps="rms_norm_eps",
        defaults={
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096,
            "max_position_embeddings": 131072,
        },
        fixed=GATED,
        window=True,
    ),
    "nemotron": Family(
        model_type="nemotron",
        architecture="NemotronForCausalLM",
        layer=NEMOTRON_LAYER,
        norm_eps="norm_eps",
        defaults={
            "hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5, "initializer_range": 0.0134,
            "max_position_embeddings": 4096,
        },
        fixed={"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True, "gated_linear_unit": False},
        biases=True,
        partial_rotary=True,
        rope_scaling=False,
    ),
    "qwen2": Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        layer=LLAMA_LAYER,
        norm_eps="rms_norm_eps",
        defaults={
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "max_position_embeddings": 32768,
            "sliding_window": 4096, "max_window_layers": 28,
        },
        fixed={**GATED, "add_qkv_bias": True},
        written={"use_sliding_window": False},
    ),
    "qwen3": Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        layer=QWEN3_LAYER,
        norm_eps="rms_norm_eps",
        defaults={
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128,
            "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
        },
        fixed={**GATED, "qk_layernorm": True},
        written={"attention_bias": False, "use_sliding_window": False},
    ),
}  # fmt: skip
#: model_type of what is not read yet -> what is said of it.
NOT_YET = {
    "qwen3_moe": not_yet.QWEN3_MOE,
    "nemotron-nas": not_yet.HETEROGENEOUS,
    "phi3": not_yet.PHI3,
}
