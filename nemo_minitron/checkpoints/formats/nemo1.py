"""NeMo-1 checkpoints: a `.nemo` archive, or the same files in a folder, with model_config.yaml and the weights.

Weights are a Megatron distributed checkpoint (zarr or torch_dist) in model_weights/, or one file model_weights.ckpt.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.architecture import Architecture, RopeScaling
from nemo_minitron.checkpoints import generation
from nemo_minitron.checkpoints import names as canonical
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints import untrusted as described
from nemo_minitron.checkpoints.files import Files
from nemo_minitron.checkpoints.storage import torch_dist
from nemo_minitron.checkpoints.storage import zarr as zarr_store
from nemo_minitron.checkpoints.storage.tar import ArchiveWriter
from nemo_minitron.checkpoints.storage.torch_zip import StoredTensor, read_torch_file
from nemo_minitron.checkpoints.tensors import Chunked, Lazy
from nemo_minitron.errors import CheckpointError

CONFIG, WEIGHTS, SINGLE = "model_config.yaml", "model_weights", "model_weights.ckpt"
PREFIX = "model."
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


def root_of(files: Files) -> Files:
    """The files with model_config.yaml at their root; raises CheckpointError unless there is just one."""
    found = [name for name in files.names() if name.rpartition("/")[2] == CONFIG]
    if len(found) != 1:
        raise CheckpointError(f"{files.where} has {len(found)} files called {CONFIG}, a NeMo-1 checkpoint has one")
    folder = found[0].rpartition("/")[0]
    return files.below(folder) if folder else files


def read_yaml(files: Files) -> dict[str, Any]:
    """model_config.yaml, by a loader that makes plain values only."""
    loaded = described.plain_yaml(files.text(CONFIG), f"{files.where}/{CONFIG}")
    config = loaded.get("model", loaded)
    if not isinstance(config, dict):
        raise CheckpointError(f"{files.where}/{CONFIG} is not a mapping")
    return config


def read(files: Files) -> tuple[Architecture, tokenizers.Tokenizer | None, dict[str, Any], dict[str, Lazy]]:
    """Architecture, tokenizer, generation settings and canonical tensors; reads no weights.

    Raises:
        CheckpointError: the configuration is incomplete, or the weights are missing, damaged or of another model.
    """
    files = root_of(files)
    config = read_yaml(files)
    tensors = canonical.canonical(_stored(files), files.where)
    if canonical.EMBEDDING not in tensors or len(tensors[canonical.EMBEDDING].shape) != 2:
        raise CheckpointError(f"{files.where} has no embedding matrix")
    tokenizer = _tokenizer(files, config)
    rows = tensors[canonical.EMBEDDING].shape[0]
    source = f"{files.where}/{CONFIG}"
    architecture = _architecture(config, rows, source)
    padding = _padding(config, rows, tokenizer)
    return architecture.with_sizes(vocab_padding=padding or None), tokenizer, generation.read(files), tensors


def layout(files: Files) -> str:
    """How the weights lie: ``torch_dist``, ``zarr`` or ``ckpt``."""
    names = files.names()
    if any(name.endswith(f"/{zarr_store.ARRAY}") for name in names):
        return "zarr"
    return "torch_dist" if any(name.endswith(torch_dist.METADATA) for name in names) else "ckpt"


def _stored(files: Files) -> dict[str, Chunked]:
    weights = files.below(WEIGHTS)
    if "metadata.json" in weights:
        try:
            backend = json.loads(weights.text("metadata.json"))["sharded_backend"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CheckpointError(f"{weights.where}/metadata.json is damaged") from None
        if backend == "zarr":
            return zarr_store.tensors(weights)
        if backend == "torch_dist":
            return torch_dist.tensors(weights)
        raise CheckpointError(f"{weights.where}: weights in {described.shown(backend)}; known are zarr and torch_dist")
    if torch_dist.METADATA in weights:
        return torch_dist.tensors(weights)
    return _single(files)


def _single(files: Files) -> dict[str, Chunked]:
    """Weights of model_weights.ckpt, by key."""
    found = [name for name in files.names() if name.rpartition("/")[2] == SINGLE]
    if not found:
        raise CheckpointError(f"{files.where} has neither {WEIGHTS}/ with metadata.json nor {SINGLE}")
    if len(found) > 1:
        raise CheckpointError(
            f"{files.where} was saved in {len(found)} parts, one a rank ({', '.join(found[:3])}...); these are not put "
            "together here: convert it to one rank or to a distributed checkpoint in NeMo first"
        )
    source = f"{files.where}/{found[0]}"
    state = read_torch_file(files[found[0]], source)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{source} holds no state dict")
    if any(isinstance(key, str) and "language_model.encoder.layers" in key for key in state):
        raise CheckpointError(
            f"{source} has the keys of NeMo's own layers, from before Megatron core (mcore_gpt: false); convert it "
            "with the NeMo 24.07 container's convert_gpt_nemo_to_mcore.py first"
        )
    return {
        key: value.lazy(key) for key, value in state.items() if isinstance(key, str) and isinstance(value, StoredTensor)
    }


def _architecture(config: dict[str, Any], vocab_size: int, source: str) -> Architecture:
    if config.get("mcore_gpt") is False:
        raise CheckpointError(f"{source}: mcore_gpt is false; convert the model to Megatron core in NeMo 24.07 first")
    position = config.get("position_embedding_type", "learned_absolute")
    if position != "rope":
        raise CheckpointError(f"{source}: position_embedding_type {described.shown(position)}; known is rope")
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
        "share_embeddings_and_output_weights": bool(config.get("share_embeddings_and_output_weights", True)),
        "rotary_base": config.get("rotary_base", 10000.0),
        "rotary_percent": config.get("rotary_percentage", 1.0),
        "rope_scaling": _scaling(config, source),
        "init_method_std": config.get("init_method_std", 0.02),
        "sliding_window": _window(config),
    }
    return described.architecture(_family(fields, config), fields, source)


def _choice(config: dict[str, Any], name: str, default: str, known: Mapping[str, Any], source: str) -> Any:
    value = config.get(name) or default
    if not isinstance(value, str) or value not in known:
        known_names = ", ".join(known)
        raise CheckpointError(f"{source}: {name} {described.shown(value)} is not known here; known are {known_names}")
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
    """The family that a configuration, which does not name it, amounts to."""
    said = config.get("family")
    if said in ("llama", "mistral", "nemotron", "qwen2", "gpt"):
        return said
    if fields["normalization"] == "LayerNorm" and fields["activation"] == "squared_relu":
        return "nemotron" if fields["layernorm_zero_centered_gamma"] else "gpt"
    if fields["normalization"] != "RMSNorm" or not fields["gated_linear_unit"] or fields["activation"] != "silu":
        return "gpt"
    if fields["add_qkv_bias"]:
        return "qwen2"
    tokenizer = config.get("tokenizer") if isinstance(config.get("tokenizer"), dict) else {}
    named = f"{tokenizer.get('type', '')} {config.get('name', '')}".lower()
    return "mistral" if "mistral" in named or fields["sliding_window"] else "llama"


def _tokenizer(files: Files, config: dict[str, Any]) -> tokenizers.Tokenizer | None:
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


def _padding(config: dict[str, Any], rows: int, tokenizer: tokenizers.Tokenizer | None) -> int:
    """Rows of the embedding without a token: stated, or what the tokenizer leaves over by Megatron's rule."""
    stated = config.get("vocab_padding")
    if type(stated) is int and 0 <= stated < rows:
        return stated
    if config.get("override_vocab_size"):
        return 0
    multiple, ranks = config.get("make_vocab_size_divisible_by", 128), config.get("tensor_model_parallel_size", 1)
    return described.vocab_padding(rows, tokenizer, multiple, ranks)


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


def write(
    path: Path,
    architecture: Architecture,
    tensors: Mapping[str, Lazy],
    tokenizer: tokenizers.Tokenizer | None,
    settings: Mapping[str, Any],
    weights: str = "torch_dist",
) -> None:
    """Writes a `.nemo` archive.

    Args:
        settings: of generation; NeMo passes over the member that keeps them.
        weights: ``torch_dist`` or ``zarr``.
    """
    dtype = next(iter(tensors.values())).dtype
    with path.open("wb") as file:
        archive = ArchiveWriter(file)
        with archive.create(CONFIG) as member:
            member.write(write_yaml(architecture, dtype, tokenizer, weights).encode())
        if settings:
            with archive.create(generation.FILE) as member:
                member.write((json.dumps(dict(settings), indent=2) + "\n").encode())
        if tokenizer is not None:
            folder = "" if tokenizer.kind == tokenizers.SENTENCEPIECE else f"{TOKENIZER_FOLDER}/"
            for name, data in tokenizer.files.items():
                with archive.create(f"{folder}{name}") as member:
                    member.write(data.read())

        def create(name: str) -> Any:
            return archive.create(f"{WEIGHTS}/{name}")

        stacked = canonical.stacked(tensors, architecture.num_layers)
        if weights == "zarr":
            zarr_store.write(create, PREFIX, stacked, architecture.num_layers)
        else:
            torch_dist.write(create, PREFIX, stacked, architecture.num_layers)
        archive.close()
