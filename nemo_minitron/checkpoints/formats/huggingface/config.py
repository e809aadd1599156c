"""config.json: read, whichever version of transformers wrote it, and written in words that all of them read."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemo_minitron.architecture import Architecture, RopeScaling
from nemo_minitron.checkpoints import not_yet, untrusted
from nemo_minitron.checkpoints.files import Files, read_json
from nemo_minitron.checkpoints.formats.huggingface.families import FAMILIES, NOT_YET, Family
from nemo_minitron.checkpoints.tokenizer import SPECIAL_TOKENS
from nemo_minitron.checkpoints.untrusted import shown
from nemo_minitron.errors import CheckpointError

CONFIG = "config.json"
#: Field of Architecture -> key of config.json.
SIZES = {
    "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads", "vocab_size": "vocab_size", "seq_length": "max_position_embeddings",
}  # fmt: skip
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu2": "squared_relu", "gelu": "gelu"}
#: Where Nemotron's configurations keep the share of each head that is rotated.
ROTARY_SHARES = ("partial_rotary_factor", "rope_percent", "rope_percentage")
#: Keys of rope_scaling and rope_parameters that say how the frequencies are scaled.
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
FULL = "full_attention"


def load(files: Files) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        CheckpointError: it is missing or no mapping, or is that of a TensorRT-LLM checkpoint.
    """
    config = read_json(files, CONFIG)
    if "mapping" in config and "architecture" in config:
        raise CheckpointError(
            f"{files.where} is a TensorRT-LLM checkpoint of {shown(config['architecture'])} (config.json, "
            "rank*.safetensors): trtllm-build reads it; nothing here does, give the model that it was made from"
        )
    return config


def special_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """The special tokens that it names, unchecked."""
    return {key: config[key] for key in SPECIAL_TOKENS if config.get(key) is not None}


def family_of(config: dict[str, Any], source: str | Path) -> str:
    """The family of a config.json."""
    kind = config.get("model_type")
    if config.get("block_configs"):
        raise CheckpointError(f"{source}: {not_yet.HETEROGENEOUS} (block_configs of config.json)")
    for name, family in FAMILIES.items():
        if family.model_type == kind:
            return name
    known = ", ".join(family.model_type for family in FAMILIES.values())
    if isinstance(kind, str) and kind in NOT_YET:
        raise CheckpointError(f"{source}: {NOT_YET[kind]} (model_type {kind}; known here are {known})")
    raise CheckpointError(f"{source} is of model_type {shown(kind)}; known here are {known}")


def read_config(config: dict[str, Any], source: str | Path) -> Architecture:
    """The architecture that a config.json describes, whichever version of transformers wrote it.

    Raises:
        CheckpointError: a size is missing or no number, two keys contradict each other, or the model does something
            that Megatron's GPT model cannot.
    """
    name = family_of(config, source)
    family = FAMILIES[name]
    values = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    for key in ("sliding_window", "num_key_value_heads"):  # null: no window, as many as heads
        if config.get(key, 0) is None:
            values.pop(key, None)
    sizes = {ours: values.get(theirs) for ours, theirs in SIZES.items()}
    if not isinstance(values["hidden_act"], str) or values["hidden_act"] not in ACTIVATIONS:
        raise CheckpointError(f"{source}: hidden_act {shown(values['hidden_act'])} is not known here")
    fields = {
        **family.fixed,
        **sizes,
        "num_query_groups": values.get("num_key_value_heads"),
        "kv_channels": _stated({key: values.get(key) for key in ("head_dim", "kv_channels")}, source),
        "activation": ACTIVATIONS[values["hidden_act"]],
        "layernorm_epsilon": _number(values, family.norm_eps, source),
        "share_embeddings_and_output_weights": bool(values.get("tie_word_embeddings", False)),
        "init_method_std": _number({"initializer_range": 0.02, **values}, "initializer_range", source),
        "add_bias_linear": _biases(values, source),
        "sliding_window": _window(family, values, source),
        **_rope(family, config, source),
    }
    if fields["rotary_percent"] != 1.0 and not family.partial_rotary:
        raise CheckpointError(f"{source}: partial_rotary_factor is known of Nemotron only")
    return untrusted.architecture(name, fields, source)


def _stated(values: Mapping[str, Any], source: str | Path) -> Any:
    """What one or more keys state, None where none does; raises CheckpointError where they contradict each other."""
    stated = {key: value for key, value in values.items() if value is not None}
    first = next(iter(stated.values()), None)
    if any(value != first for value in stated.values()):
        said = " and ".join(f"{key} = {shown(value)}" for key, value in stated.items())
        raise CheckpointError(f"{source}: {said} contradict each other; leave the one that holds")
    return first


def _number(values: dict[str, Any], name: str, source: str | Path) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise CheckpointError(f"{source}: {name} = {shown(value)} is not a number")
    return float(value)


def _biases(values: dict[str, Any], source: str | Path) -> bool:
    attention, mlp = bool(values.get("attention_bias")), bool(values.get("mlp_bias"))
    if attention != mlp:
        raise CheckpointError(
            f"{source}: attention_bias={attention} with mlp_bias={mlp}; Megatron has biases in both or neither"
        )
    return attention


def _window(family: Family, values: dict[str, Any], source: str | Path) -> int | None:
    """Mistral has the window in every layer; Qwen in those that layer_types names, or from max_window_layers on."""
    if family.window:
        return values.get("sliding_window")
    if not values.get("use_sliding_window") or values.get("sliding_window") is None:
        return None
    layers, full = values.get("num_hidden_layers"), values.get("max_window_layers")
    if isinstance(kinds := values.get("layer_types"), list):
        if all(kind == FULL for kind in kinds):
            return None
    elif type(layers) is int and type(full) is int and full >= layers:
        return None
    raise CheckpointError(f"{source}: use_sliding_window on some layers only is not something Megatron's model does")


def _rope(family: Family, config: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Rotary fields. transformers 5 keeps them in `rope_parameters`; transformers 4 has `rope_theta`, `rope_scaling`
    and `partial_rotary_factor`, and passes `rope_parameters` over."""
    newer, older = (_rope_mapping(config, name, source) for name in ("rope_parameters", "rope_scaling"))
    base = _stated({"rope_theta": config.get("rope_theta"), **_key(newer, older, "rope_theta")}, source)
    shares = {name: config.get(name) for name in ROTARY_SHARES} | _key(newer, older, ROTARY_SHARES[0])
    share = _stated(shares, source)
    if share is None:
        share = family.defaults.get(ROTARY_SHARES[0], 1.0)
    fields: dict[str, Any] = {
        "rotary_base": _number({"rope_theta": 10000.0 if base is None else base}, "rope_theta", source),
        "rotary_percent": _number({ROTARY_SHARES[0]: share}, ROTARY_SHARES[0], source),
    }
    kind = _stated(_key(newer, older, "rope_type"), source) or "default"
    if kind == "llama3":
        scaling = {name: _stated(_key(newer, older, name), source) for name in SCALING}
        fields["rope_scaling"] = RopeScaling(
            factor=_number(scaling, "factor", source),
            low_freq_factor=_number(scaling, "low_freq_factor", source),
            high_freq_factor=_number(scaling, "high_freq_factor", source),
            original_length=int(_number(scaling, "original_max_position_embeddings", source)),
        )
    elif kind != "default":
        raise CheckpointError(f"{source}: rope_scaling of type {shown(kind)} is not known here; known is llama3")
    return fields


def _rope_mapping(config: dict[str, Any], name: str, source: str | Path) -> dict[str, Any]:
    """rope_parameters or rope_scaling; `type`, as older ones call it, is rope_type."""
    mapping = config.get(name)
    if mapping is None:
        return {}
    if not isinstance(mapping, dict) or any(isinstance(value, dict) for value in mapping.values()):
        raise CheckpointError(f"{source}: {name} is not a mapping of numbers")
    kind = _stated({f"{name}.{key}": mapping.get(key) for key in ("rope_type", "type")}, source)
    return {**mapping, "rope_type": kind}


def _key(newer: dict[str, Any], older: dict[str, Any], name: str) -> dict[str, Any]:
    """What rope_parameters and rope_scaling state under `name`."""
    return {f"rope_parameters.{name}": newer.get(name), f"rope_scaling.{name}": older.get(name)}


def write_config(
    architecture: Architecture, dtype: str, generation: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """config.json of a model, in the words of transformers 4 and 5 both.

    Args:
        dtype: of the weights (``bfloat16``).
        generation: where the special tokens' ids are taken from. What it does not name is null: transformers would
            take ids of its own for it.

    Raises:
        CheckpointError: transformers has no class for the model.
    """
    a, family = architecture, _expressible(architecture)
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
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        **_rope_keys(a, family),
        **_written_special_tokens(generation, a.vocab_size - a.vocab_padding),
    }
    if family.biases:
        config |= {"attention_bias": a.add_bias_linear, "mlp_bias": a.add_bias_linear}
    if family.window:
        config["sliding_window"] = a.sliding_window
    return config | family.written


def _rope_keys(a: Architecture, family: Family) -> dict[str, Any]:
    """Rotary fields as transformers 4 reads them (the first ones) and as transformers 5 does (rope_parameters)."""
    scaling = None
    if a.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": a.rope_scaling.factor,
            "low_freq_factor": a.rope_scaling.low_freq_factor,
            "high_freq_factor": a.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": a.rope_scaling.original_length,
        }
    share = {"partial_rotary_factor": a.rotary_percent} if family.partial_rotary else {}
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": a.rotary_base, **share}
    return {"rope_theta": a.rotary_base, "rope_scaling": scaling, **share, "rope_parameters": parameters}


def _written_special_tokens(generation: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The special tokens' ids. One for padding beyond the vocabulary is left out: transformers would look it up in the
    embedding."""
    ids = {name: generation.get(name) for name in SPECIAL_TOKENS}
    pad = ids["pad_token_id"]
    return ids | {"pad_token_id": pad if type(pad) is int and -tokens <= pad < tokens else None}


def _expressible(a: Architecture) -> Family:
    """The family of a model; raises CheckpointError where transformers has no class that computes what it does."""
    family = FAMILIES.get(a.family)
    if family is None:
        problems = [f"family {a.family} has no class there; known are {', '.join(FAMILIES)}"]
    else:
        problems = _not_expressible(a, family)
    if family is None or problems:
        raise CheckpointError(f"{a.describe()} cannot be written for Hugging Face: {'; '.join(problems)}")
    return family


def _not_expressible(a: Architecture, family: Family) -> list[str]:
    """What transformers' class of the family does not have."""
    problems = [
        f"{name} is {getattr(a, name)}, {family.architecture} has {value}"
        for name, value in {"add_qkv_bias": False, "qk_layernorm": False, **family.fixed}.items()
        if getattr(a, name) != value
    ]
    if a.add_bias_linear and not family.biases:
        problems.append(f"{family.architecture} has no biases in its linear layers")
    if a.rotary_percent != 1.0 and not family.partial_rotary:
        problems.append(f"{family.architecture} has no partial rotary embedding")
    if a.rope_scaling is not None and not family.rope_scaling:
        problems.append(f"{family.architecture} has no rope scaling")
    if a.sliding_window is not None and not family.window:
        problems.append(f"{family.architecture} has no sliding window here")
    if a.activation not in ACTIVATIONS.values():
        problems.append(f"activation {a.activation} is not known there")
    return problems
