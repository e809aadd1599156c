"""The table of GGUF's architectures: which families they are, what holds for all models of one, and tensors' names.

A canonical tensor is one of GGUF's, or several, as on the Hugging Face side.
"""

import dataclasses
from typing import Any

#: Canonical name inside a layer -> GGUF's names inside a layer. Biases and norm biases follow their weights.
LAYER: dict[str, tuple[str, ...]] = {
    "self_attention.linear_qkv.layer_norm_": ("attn_norm.",),
    "self_attention.linear_qkv.": ("attn_q.", "attn_k.", "attn_v."),
    "self_attention.q_layernorm.": ("attn_q_norm.",),
    "self_attention.k_layernorm.": ("attn_k_norm.",),
    "self_attention.linear_proj.": ("attn_output.",),
    "mlp.linear_fc1.layer_norm_": ("ffn_norm.",),
    "mlp.linear_fc1.": ("ffn_gate.", "ffn_up."),
    "mlp.linear_fc2.": ("ffn_down.",),
}
UNGATED = {**LAYER, "mlp.linear_fc1.": ("ffn_up.",)}
OUTER = {
    "embedding.word_embeddings.weight": "token_embd.weight",
    "decoder.final_layernorm.weight": "output_norm.weight",
    "decoder.final_layernorm.bias": "output_norm.bias",
    "output_layer.weight": "output.weight",
}
LAYERS = "blk."
#: Parts whose rows llama.cpp's converter puts in another order for Llama: the halves of each head take turns.
IN_TURNS = ("attn_q.", "attn_k.")
#: Ends of the names of norms' gains.
GAINS = ("norm.weight",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """What an architecture of GGUF is here.

    Attributes:
        family: what it is read as.
        also: families that are written as it too, as it computes what they do.
        layer: names inside a layer.
        norm_eps: the key of the norm's epsilon, behind the architecture's name.
        fixed: fields of Architecture that hold for all of it.
        in_turns: whether the halves of each query's and key's head take turns.
        biases: whether linear layers may have biases.
        partial_rotary: whether a share of each head may be rotated.
        rope_factors: whether the rotary frequencies may be scaled as in Llama 3.1.
        free_heads: whether heads x head size may be another than the hidden size; where not, llama.cpp takes the hidden
            size for the shapes of query and output, and does not load the file.
    """

    family: str
    also: tuple[str, ...] = ()
    layer: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: LAYER)
    norm_eps: str = "attention.layer_norm_rms_epsilon"
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    in_turns: bool = False
    biases: bool = False
    partial_rotary: bool = False
    rope_factors: bool = False
    free_heads: bool = False


GATED = {"normalization": "RMSNorm", "gated_linear_unit": True, "activation": "silu"}
#: By the name in general.architecture.
ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture(
        family="llama", also=("mistral",), fixed=GATED, in_turns=True, biases=True, rope_factors=True, free_heads=True
    ),
    "qwen2": GgufArchitecture(family="qwen2", fixed={**GATED, "add_qkv_bias": True}),
    "qwen3": GgufArchitecture(family="qwen3", fixed={**GATED, "qk_layernorm": True}, free_heads=True),
    "nemotron": GgufArchitecture(
        family="nemotron",
        layer=UNGATED,
        norm_eps="attention.layer_norm_epsilon",
        fixed={
            "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True, "gated_linear_unit": False,
            "activation": "squared_relu",
        },
        biases=True,
        partial_rotary=True,
    ),
}  # fmt: skip

#: Architectures that are known and not read yet.
NOT_YET = {"qwen3moe": "Qwen3-MoE"}


def architecture_of(family: str) -> str | None:
    """The name in general.architecture that a family is written as, or None."""
    return next((name for name, entry in ARCHITECTURES.items() if family in (entry.family, *entry.also)), None)
