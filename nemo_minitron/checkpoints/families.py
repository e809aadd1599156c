"""Families of models on the Hugging Face side: one table of names and one mapping of configurations each.

A canonical tensor is one Hugging Face tensor, or several: linear_qkv has query, key and value interleaved by group, and
a gated linear_fc1 has its gate above.
"""

import dataclasses
from typing import Any

from nemo_minitron.architecture import Architecture, RopeScaling
from nemo_minitron.checkpoints import described
from nemo_minitron.checkpoints.described import shown
from nemo_minitron.errors import CheckpointError

#: Canonical name inside a layer -> Hugging Face names inside a layer. Biases and norm biases follow their weights.
LLAMA_LAYER: dict[str, tuple[str, ...]] = {
    "self_attention.linear_qkv.layer_norm_": ("input_layernorm.",),
    "self_attention.linear_qkv.": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    "self_attention.linear_proj.": ("self_attn.o_proj.",),
    "mlp.linear_fc1.layer_norm_": ("post_attention_layernorm.",),
    "mlp.linear_fc1.": ("mlp.gate_proj.", "mlp.up_proj."),
    "mlp.linear_fc2.": ("mlp.down_proj.",),
}
NEMOTRON_LAYER = {**LLAMA_LAYER, "mlp.linear_fc1.": ("mlp.up_proj.",)}
OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.final_layernorm.bias": "model.norm.bias",
    "output_layer.weight": "lm_head.weight",
}
#: Field of Architecture -> key of config.json.
SIZES = {
    "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads", "vocab_size": "vocab_size", "seq_length": "max_position_embeddings",
}  # fmt: skip
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu2": "squared_relu", "gelu": "gelu"}


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
    """

    model_type: str
    architecture: str
    layer: dict[str, tuple[str, ...]]
    norm_eps: str
    defaults: dict[str, Any]
    fixed: dict[str, Any]


GATED = {"normalization": "RMSNorm", "gated_linear_unit": True}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        layer=LLAMA_LAYER,
        norm_eps="rms_norm_eps",
        defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        fixed=GATED,
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
    ),
    "qwen2": Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        layer=LLAMA_LAYER,
        norm_eps="rms_norm_eps",
        defaults={
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "max_position_embeddings": 32768,
        },
        fixed={**GATED, "add_qkv_bias": True},
    ),
}  # fmt: skip


def layer_names(family: Family, name: str) -> tuple[str, ...]:
    """Hugging Face names inside a layer of the canonical `name` inside a layer, such as ``mlp.linear_fc1.weight``."""
    stem = max((stem for stem in family.layer if name.startswith(stem)), key=len)
    return tuple(f"{theirs}{name[len(stem) :]}" for theirs in family.layer[stem])


def family_of(config: dict[str, Any], source: Any) -> str:
    """The family of a config.json."""
    kind = config.get("model_type")
    for name, family in FAMILIES.items():
        if family.model_type == kind:
            return name
    known = ", ".join(family.model_type for family in FAMILIES.values())
    raise CheckpointError(f"{source} is of model_type {shown(kind)}; known here are {known}")


def read_config(config: dict[str, Any], source: Any) -> Architecture:
    """The architecture that a config.json describes.

    Raises:
        CheckpointError: a size is missing or no number, or the model does something that Megatron's GPT model cannot.
    """
    name = family_of(config, source)
    family = FAMILIES[name]
    values = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    if config.get("sliding_window", 0) is None:
        values.pop("sliding_window", None)
    sizes = {ours: values.get(theirs) for ours, theirs in SIZES.items()}
    if not isinstance(values["hidden_act"], str) or values["hidden_act"] not in ACTIVATIONS:
        raise CheckpointError(f"{source}: hidden_act {shown(values['hidden_act'])} is not known here")
    fields = {
        **family.fixed,
        **sizes,
        "num_query_groups": values.get("num_key_value_heads"),
        "kv_channels": values.get("head_dim") or values.get("kv_channels"),
        "activation": ACTIVATIONS[values["hidden_act"]],
        "layernorm_epsilon": _number(values, family.norm_eps, source),
        "share_embeddings_and_output_weights": bool(values.get("tie_word_embeddings", False)),
        "init_method_std": _number({"initializer_range": 0.02, **values}, "initializer_range", source),
        "add_bias_linear": _biases(values, source),
        "sliding_window": _window(name, values, source),
        **_rope(values, source),
    }
    if fields["rotary_percent"] != 1.0 and name != "nemotron":
        raise CheckpointError(f"{source}: partial_rotary_factor is known of Nemotron only")
    return described.architecture(name, fields, source)


def _number(values: dict[str, Any], name: str, source: Any) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise CheckpointError(f"{source}: {name} = {shown(value)} is not a number")
    return float(value)


def _biases(values: dict[str, Any], source: Any) -> bool:
    attention, mlp = bool(values.get("attention_bias")), bool(values.get("mlp_bias"))
    if attention != mlp:
        raise CheckpointError(
            f"{source}: attention_bias={attention} with mlp_bias={mlp}; Megatron has biases in both or neither"
        )
    return attention


def _window(family: str, values: dict[str, Any], source: Any) -> int | None:
    if family != "mistral" and not values.get("use_sliding_window"):
        return None
    if family != "mistral":
        raise CheckpointError(
            f"{source}: use_sliding_window on some layers only is not something Megatron's model does"
        )
    return values.get("sliding_window")


def _rope(values: dict[str, Any], source: Any) -> dict[str, Any]:
    """Rotary fields; `rope_parameters` is where transformers 5 keeps them."""
    parameters = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise CheckpointError(f"{source}: rope_scaling is not a mapping")
    merged = {"rope_theta": 10000.0, **values, **parameters}
    share = {"partial_rotary_factor": 1.0, **merged}
    if "rope_percent" in values and "partial_rotary_factor" not in merged:
        share["partial_rotary_factor"] = values["rope_percent"]
    fields: dict[str, Any] = {
        "rotary_base": _number(merged, "rope_theta", source),
        "rotary_percent": _number(share, "partial_rotary_factor", source),
    }
    scaling = {**parameters, **scaling}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "llama3":
        fields["rope_scaling"] = RopeScaling(
            factor=_number(scaling, "factor", source),
            low_freq_factor=_number(scaling, "low_freq_factor", source),
            high_freq_factor=_number(scaling, "high_freq_factor", source),
            original_length=int(_number(scaling, "original_max_position_embeddings", source)),
        )
    elif kind != "default":
        raise CheckpointError(f"{source}: rope_scaling of type {shown(kind)} is not known here; known is llama3")
    return fields


def write_config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """config.json of a model; raises CheckpointError where transformers has no class for it."""
    a, family = architecture, FAMILIES.get(architecture.family)
    problems = _not_expressible(a, family)
    if problems:
        raise CheckpointError(f"{a.describe()} cannot be written for Hugging Face: {'; '.join(problems)}")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": a.vocab_size - a.vocab_padding,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.kv_channels,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == a.activation),
        "max_position_embeddings": a.seq_length,
        "initializer_range": a.init_method_std,
        family.norm_eps: a.layernorm_epsilon,
        "tie_word_embeddings": a.share_embeddings_and_output_weights,
        "rope_theta": a.rotary_base,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if a.rope_scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": a.rope_scaling.factor,
            "low_freq_factor": a.rope_scaling.low_freq_factor,
            "high_freq_factor": a.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": a.rope_scaling.original_length,
        }
    if a.family in ("llama", "nemotron"):
        config |= {"attention_bias": a.add_bias_linear, "mlp_bias": a.add_bias_linear}
    if a.family == "nemotron":
        config["partial_rotary_factor"] = a.rotary_percent
    if a.family == "mistral":
        config["sliding_window"] = a.sliding_window
    if a.family == "qwen2":
        config["use_sliding_window"] = False
    return config


def _not_expressible(a: Architecture, family: Family | None) -> list[str]:
    """What transformers' class of the family does not have."""
    if family is None:
        return [f"family {a.family} has no class there; known are {', '.join(FAMILIES)}"]
    found = [
        f"{name} is {getattr(a, name)}, {family.architecture} has {value}"
        for name, value in {"add_qkv_bias": False, **family.fixed}.items()
        if getattr(a, name) != value
    ]
    if a.add_bias_linear and a.family not in ("llama", "nemotron"):
        found.append(f"{family.architecture} has no biases in its linear layers")
    if a.rotary_percent != 1.0 and a.family != "nemotron":
        found.append(f"{family.architecture} has no partial rotary embedding")
    if a.rope_scaling is not None and a.family == "nemotron":
        found.append(f"{family.architecture} has no rope scaling")
    if a.sliding_window is not None and a.family != "mistral":
        found.append(f"{family.architecture} has no sliding window here")
    if a.activation not in ACTIVATIONS.values():
        found.append(f"activation {a.activation} is not known there")
    return found
