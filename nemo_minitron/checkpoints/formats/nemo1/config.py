"""model_config.yaml of a NeMo-1 checkpoint, read as untrusted text and written so that NeMo 1 takes it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from nemo_minitron.architecture import FAMILIES, Architecture, RopeScaling
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints import untrusted
from nemo_minitron.checkpoints.files import Files
from nemo_minitron.errors import CheckpointError

CONFIG = "model_config.yaml"
TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
TOKENIZER_FOLDER = "tokenizer"
ARTIFACT = "nemo:"
#: NeMo-1's activation -> (function, gated).
ACTIVATIONS = {
    "gelu": ("gelu", False), "geglu": ("gelu", True), "fast-geglu": ("gelu", True), "swiglu": ("silu", True),
    "fast-swiglu": ("silu", True), "squared-relu": ("squared_relu", False), "silu": ("silu", False),
}  # fmt: skip
WRITTEN_ACTIVATIONS = {
    ("gelu", False): "gelu", ("gelu", True): "fast-geglu", ("silu", True): "fast-swiglu", ("silu", False): "silu",
    ("squared_relu", False): "squared-relu",
}  # fmt: skip
#: NeMo-1's normalization -> (Megatron's, zero-centred gamma).
NORMS = {"rmsnorm": ("RMSNorm", False), "layernorm1p": ("LayerNorm", True), "layernorm": ("LayerNorm", False)}
#: Llama 3.1's scaling, which `scale_positional_embedding` stands for.
LLAMA31 = RopeScaling()
PRECISIONS = {"bfloat16": "bf16", "float16": "16", "float32": "32"}


def read_yaml(files: Files) -> dict[str, Any]:
    """model_config.yaml, by a loader that makes plain values only."""
    loaded = untrusted.plain_yaml(files.text(CONFIG), f"{files.where}/{CONFIG}")
    config = loaded.get("model", loaded)
    if not isinstance(config, dict):
        raise CheckpointError(f"{files.where}/{CONFIG} is not a mapping")
    return config


def read_architecture(config: dict[str, Any], vocab_size: int, source: str) -> Architecture:
    if config.get("mcore_gpt") is False:
        raise CheckpointError(f"{source}: mcore_gpt is false; convert the model to Megatron core in NeMo 24.07 first")
    position = config.get("position_embedding_type", "learned_absolute")
    if position != "rope":
        raise CheckpointError(f"{source}: position_embedding_type {untrusted.shown(position)}; known is rope")
    normalization, zero_centered = _choice(config, "normalization", "layernorm", NORMS, source)
    activation, gated = _choice(config, "activation", "gelu", ACTIVATIONS, source)
    bias = bool(config.get("bias", True))
    fields = {
        "num_layers": config.get("num_layers"),
        "hidden_size": config.get("hidden_size"),
        "ffn_hidden_size": config.get("ffn_hidden_size"),
        "num_attention_heads": config.get("num_attention_heads"),
        "num_query_groups": config.get("num_query_groups"),
        "kv_channels": config.get("kv_channels"),
        "vocab_size": vocab_size,
        "seq_length": config.get("encoder_seq_length") or config.get("max_position_embeddings") or 4096,
        "normalization": normalization,
        "layernorm_epsilon": config.get("layernorm_epsilon", 1e-5),
        "layernorm_zero_centered_gamma": zero_centered,
        "activation": activation,
        "gated_linear_unit": gated,
        "add_bias_linear": bias,
        "add_qkv_bias": bool(config.get("qkv_bias", False)) and not bias,
        "qk_layernorm": bool(config.get("qk_layernorm", False)),
        "share_embeddings_and_output_weights": bool(config.get("share_embeddings_and_output_weights", True)),
        "rotary_base": config.get("rotary_base", 10000.0),
        "rotary_percent": config.get("rotary_percentage", 1.0),
        "rope_scaling": _scaling(config, source),
        "init_method_std": config.get("init_method_std", 0.02),
        "sliding_window": _window(config),
    }
    return untrusted.architecture(_family(fields, config), fields, source)


def _choice(config: dict[str, Any], name: str, default: str, known: Mapping[str, Any], source: str) -> Any:
    value = config.get(name) or default
    if not isinstance(value, str) or value not in known:
        known_names = ", ".join(known)
        raise CheckpointError(f"{source}: {name} {untrusted.shown(value)} is not known here; known are {known_names}")
    return known[value]


def _scaling(config: dict[str, Any], source: str) -> RopeScaling | None:
    """Llama 3.1's scaling; `seq_len_interpolation_factor`, which converters wrote beside it, says nothing then."""
    given = config.get("rope_scaling")
    if isinstance(given, dict):
        try:
            return RopeScaling(**given)
        except TypeError as error:
            raise CheckpointError(f"{source}: rope_scaling: {error}") from None
    if config.get("scale_positional_embedding"):
        return LLAMA31
    if config.get("seq_len_interpolation_factor") not in (None, 1, 1.0):
        raise CheckpointError(
            f"{source}: seq_len_interpolation_factor (linear position interpolation) is not known here"
        )
    return None


def _window(config: dict[str, Any]) -> int | None:
    window = config.get("window_size")
    return window[0] if isinstance(window, list) and window and type(window[0]) is int and window[0] > 0 else None


def _family(fields: dict[str, Any], config: dict[str, Any]) -> str:
    """The family: as this package names it, or what the fields amount to and names of NeMo 1 hint at."""
    said = config.get("family")
    if said in FAMILIES:
        return said
    family = untrusted.family_of(fields)
    stated = config.get("tokenizer")
    tokenizer = stated if isinstance(stated, dict) else {}
    named = f"{tokenizer.get('type', '')} {config.get('name', '')}".lower()
    return "mistral" if family == "llama" and "mistral" in named else family


def read_tokenizer(files: Files, config: dict[str, Any]) -> tokenizers.Tokenizer | None:
    """The tokenizer's files in the archive, or its name on the hub."""
    settings = config.get("tokenizer")
    if not isinstance(settings, dict):
        return None
    hub = settings.get("type")
    name = hub if isinstance(hub, str) and not hub.startswith(ARTIFACT) and tokenizers.HUB_NAME.fullmatch(hub) else None
    if settings.get("library") == "huggingface":
        return tokenizers.in_folder(files.below(TOKENIZER_FOLDER), name)
    model = settings.get("model") or settings.get("tokenizer_model")
    if isinstance(model, str) and model.removeprefix(ARTIFACT) in files:
        return tokenizers.Tokenizer(
            kind=tokenizers.SENTENCEPIECE, files={tokenizers.MODEL: files[model.removeprefix(ARTIFACT)]}
        )
    return None


def read_padding(config: dict[str, Any], rows: int, tokenizer: tokenizers.Tokenizer | None) -> int:
    """Rows of the embedding without a token: stated, or what the tokenizer leaves over by Megatron's rule."""
    stated = config.get("vocab_padding")
    if type(stated) is int and 0 <= stated < rows:
        return stated
    if config.get("override_vocab_size"):
        return 0
    multiple, ranks = config.get("make_vocab_size_divisible_by", 128), config.get("tensor_model_parallel_size", 1)
    return untrusted.vocab_padding(rows, tokenizer, multiple, ranks)


def write_yaml(a: Architecture, dtype: str, tokenizer: tokenizers.Tokenizer | None, weights: str) -> str:
    """model_config.yaml of a model."""
    if (a.activation, a.gated_linear_unit) not in WRITTEN_ACTIVATIONS:
        raise CheckpointError(f"activation {a.activation}, gated {a.gated_linear_unit}, has no name in NeMo 1")
    norm = next(name for name, kind in NORMS.items() if kind == (a.normalization, a.layernorm_zero_centered_gamma))
    config: dict[str, Any] = {
        "target": TARGET,
        "name": f"megatron_{a.family}",
        "family": a.family,
        "mcore_gpt": True,
        "transformer_engine": True,
        "megatron_amp_O2": True,
        "precision": PRECISIONS.get(dtype, dtype),
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.kv_channels,
        "encoder_seq_length": a.seq_length,
        "max_position_embeddings": a.seq_length,
        "activation": WRITTEN_ACTIVATIONS[a.activation, a.gated_linear_unit],
        "normalization": norm,
        "layernorm_epsilon": a.layernorm_epsilon,
        "position_embedding_type": "rope",
        "rotary_percentage": a.rotary_percent,
        "rotary_base": a.rotary_base,
        "scale_positional_embedding": a.rope_scaling is not None,
        "share_embeddings_and_output_weights": a.share_embeddings_and_output_weights,
        "bias": a.add_bias_linear,
        "qkv_bias": a.add_qkv_bias,
        "init_method_std": a.init_method_std,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "make_vocab_size_divisible_by": 128,
        "override_vocab_size": a.vocab_size,
        "vocab_padding": a.vocab_padding,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "dist_ckpt_format": weights,
        "tokenizer": _tokenizer_settings(tokenizer),
    }
    if a.rope_scaling is not None and a.rope_scaling != LLAMA31:
        config["rope_scaling"] = dataclasses.asdict(a.rope_scaling)
    if a.qk_layernorm:
        config["qk_layernorm"] = True
    if a.sliding_window is not None:
        config["window_size"] = [a.sliding_window, 0]
    return yaml.safe_dump(config, sort_keys=False)


def _tokenizer_settings(tokenizer: tokenizers.Tokenizer | None) -> dict[str, Any]:
    if tokenizer is not None and tokenizer.kind == tokenizers.SENTENCEPIECE:
        model = f"{ARTIFACT}{tokenizers.MODEL}"
        return {"library": "sentencepiece", "type": None, "model": model, "vocab_file": None, "merge_file": None,
                "tokenizer_model": model, "sentencepiece_legacy": False}  # fmt: skip
    name = tokenizer.name if tokenizer is not None else None
    kind = name or (f"{ARTIFACT}{TOKENIZER_FOLDER}" if tokenizer is not None else None)
    return {"library": "huggingface", "type": kind, "model": None, "vocab_file": None, "merge_file": None,
            "use_fast": True}  # fmt: skip
