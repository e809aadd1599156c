"""NeMo-2 checkpoints: a directory with context/ (io.json, model.yaml, tokenizer) and weights/ (torch_dist).

io.json is read as plain JSON and model.yaml with a safe loader: no class that they name is imported, none is run.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture, RopeScaling
from nemo_minitron.checkpoints import generation
from nemo_minitron.checkpoints import names as canonical
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints import untrusted as described
from nemo_minitron.checkpoints.files import Files
from nemo_minitron.checkpoints.storage import torch_dist
from nemo_minitron.checkpoints.storage import zarr as zarr_store
from nemo_minitron.checkpoints.tensors import Chunked, Lazy
from nemo_minitron.errors import CheckpointError

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
    ("GPTConfig", "gpt"),
)
#: Family -> (model class, config class) of nemo.collections.llm.
CLASSES = {
    "llama": ("LlamaModel", "LlamaConfig"),
    "mistral": ("MistralModel", "MistralConfig7B"),
    "nemotron": ("NemotronModel", "NemotronConfig"),
    "qwen2": ("Qwen2Model", "Qwen2Config"),
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
SAME_NAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "seq_length", "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "gated_linear_unit",
    "add_bias_linear", "add_qkv_bias", "share_embeddings_and_output_weights", "rotary_base", "rotary_percent",
    "init_method_std",
)  # fmt: skip


def is_nemo2(path: Path) -> bool:
    """Whether `path` is laid out as a NeMo-2 checkpoint."""
    return (path / CONTEXT).is_dir() and (path / WEIGHTS).is_dir()


def read(files: Files) -> tuple[Architecture, tokenizers.Tokenizer | None, dict[str, Any], dict[str, Lazy]]:
    """Architecture, tokenizer, generation settings and canonical tensors; reads no weights.

    Raises:
        CheckpointError: the context is missing or unreadable, the family is not a dense one that is known here, or the
            weights are missing, damaged or of another model.
    """
    context, source = files.below(CONTEXT), f"{files.where}/{CONTEXT}"
    class_name, values = _model_config(context)
    family = next((family for prefix, family in FAMILY_OF_CLASS if class_name.startswith(prefix)), None)
    if family is None:
        known = ", ".join(prefix for prefix, _ in FAMILY_OF_CLASS)
        raise CheckpointError(f"{source} names the config class {class_name}; known are those of {known}")
    tensors = canonical.canonical(_stored(files.below(WEIGHTS)), files.where / WEIGHTS)
    embedding = tensors.get(canonical.EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{files.where / WEIGHTS} has no embedding matrix")
    fields = _fields(family, class_name, values) | {"vocab_size": embedding.shape[0]}
    architecture = described.architecture(family, fields, source)
    tokenizer = _tokenizer(context)
    padding = _padding(context, values, architecture.vocab_size, tokenizer)
    return (
        architecture.with_sizes(vocab_padding=padding or None),
        tokenizer,
        generation.read(context, GENERATION),
        tensors,
    )


def _fields(family: str, class_name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Fields of Architecture, as the context states them or as the config class has them by default."""
    fields = dict(DEFAULTS[family])
    fields |= {name: values[name] for name in SAME_NAME if values.get(name) is not None}
    if isinstance(values.get("activation"), str):
        fields["activation"] = values["activation"]
    scaling = {ours: values[theirs] for theirs, ours in ROPE_SCALING.items() if values.get(theirs) is not None}
    if scaling or class_name.startswith(("Llama31", "Llama32")):
        defaults = {"factor": 32.0} if class_name.startswith("Llama32") else {}
        fields["rope_scaling"] = RopeScaling(**{**defaults, **scaling})
    window = values.get("window_size", [4096, 0] if class_name == "MistralConfig7B" else None)
    if isinstance(window, list | tuple) and window and window[0] != -1:
        fields["sliding_window"] = window[0]
    return fields


def _padding(context: Files, values: dict[str, Any], rows: int, tokenizer: tokenizers.Tokenizer | None) -> int:
    """Rows of the embedding without a token: what a conversion noted, or what is beyond the stated vocabulary, or
    beyond the tokenizer's where none is stated."""
    objects, root = _context(context)
    noted = _arguments(objects, _follow(objects, root, "extra")).get(PADDING)
    if type(noted) is int and 0 <= noted < rows:
        return noted
    stated = values.get("vocab_size")
    if type(stated) is int and 0 < stated <= rows:
        return rows - stated if values.get("should_pad_vocab") else 0
    ranks = values.get("tensor_model_parallel_size", 1)
    return described.vocab_padding(rows, tokenizer, values.get("make_vocab_size_divisible_by", 128), ranks)


def _stored(weights: Files) -> dict[str, Chunked]:
    """Tensors by Megatron's keys; NeMo 2 writes torch_dist, early releases could write zarr."""
    backend = "torch_dist"
    if torch_dist.METADATA not in weights and "metadata.json" in weights:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            backend = json.loads(weights.text("metadata.json"))["sharded_backend"]
    return zarr_store.tensors(weights) if backend == "zarr" else torch_dist.tensors(weights)


def _tokenizer(context: Files) -> tokenizers.Tokenizer | None:
    """The tokenizer's files inside the context, or the hub name that stands for them, or None."""
    objects, root = _context(context)
    node = _follow(objects, root, "model", "tokenizer")
    arguments = _arguments(objects, node) if node else {}
    model, name = arguments.get("model_path"), arguments.get("pretrained_model_name")
    if isinstance(model, str) and model in context:
        return tokenizers.Tokenizer(kind=tokenizers.SENTENCEPIECE, files={tokenizers.MODEL: context[model]})
    if isinstance(name, dict):  # NeMo wraps a name that is no path
        name = _arguments(objects, name.get("ref")).get("attr")
    if not isinstance(name, str):
        return None
    inside = context.below(name.strip("/"))
    if inside.names():
        return tokenizers.in_folder(inside)
    return tokenizers.Tokenizer(name=name) if tokenizers.HUB_NAME.fullmatch(name) else None


def _context(context: Files) -> tuple[dict[str, Any], str]:
    source = f"{context.where}/io.json"
    if "io.json" not in context:
        raise CheckpointError(f"{source} is missing: {context.where.parent} is not a whole NeMo-2 checkpoint")
    try:
        loaded = json.loads(context.text("io.json"))
        objects, root = loaded["objects"], loaded["root"]["key"]
        if not isinstance(objects, dict) or not all(isinstance(node, dict) for node in objects.values()):
            raise TypeError("objects")
        return objects, root
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{source} is not a NeMo-2 context ({type(error).__name__}: {error})") from None


def _arguments(objects: dict[str, Any], key: Any) -> dict[str, Any]:
    """Arguments of the object `key`: leaves as values, lists of leaves as lists, other references as {"ref": key},
    classes and functions as {"name": ...}. Nothing that is named is looked up."""
    found = {}
    for label, node in _items(objects, key):
        name = label.removeprefix("Attr(name='").removeprefix("Key(key='").removesuffix("')")
        kind = node.get("type") if isinstance(node, dict) else None
        if kind == "leaf":
            found[name] = node.get("value")
        elif kind == "ref":
            values = _sequence(objects, node.get("key"))
            found[name] = {"ref": node.get("key")} if values is None else values
        elif kind == "pyref":
            found[name] = {"name": str(node.get("name"))}
    return found


def _items(objects: dict[str, Any], key: Any) -> list[tuple[str, Any]]:
    items = objects.get(key, {}).get("items") if isinstance(key, str) else None
    pairs = items if isinstance(items, list) else []
    return [tuple(pair) for pair in pairs if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)]


def _sequence(objects: dict[str, Any], key: Any) -> list[Any] | None:
    """A list or tuple of plain values."""
    kind = objects.get(key, {}).get("type") if isinstance(key, str) else None
    if not isinstance(kind, dict) or kind.get("name") not in ("list", "tuple"):
        return None
    nodes = [node for _, node in _items(objects, key)]
    return [node.get("value") if isinstance(node, dict) else node for node in nodes]


def _follow(objects: dict[str, Any], key: Any, *names: str) -> Any:
    for name in names:
        value = _arguments(objects, key).get(name)
        if not isinstance(value, dict) or "ref" not in value:
            return None
        key = value["ref"]
    return key


def _class_name(objects: dict[str, Any], key: Any) -> str:
    metadata = objects.get(key, {}).get("metadata")
    kind = _arguments(objects, metadata.get("key")).get("fn_or_cls") if isinstance(metadata, dict) else None
    return kind.get("name", "") if isinstance(kind, dict) else ""


def _model_config(context: Files) -> tuple[str, dict[str, Any]]:
    """Name of the config class and its values: those of model.yaml, overridden by what io.json passes."""
    objects, root = _context(context)
    node = _follow(objects, root, "model", "config")
    if node is None:
        raise CheckpointError(f"{context.where}/io.json holds no model config")
    values = _yaml_config(context)
    passed = _arguments(objects, node)
    values |= {name: value for name, value in passed.items() if not isinstance(value, dict)}
    function = passed.get("activation_func")
    if isinstance(function, dict) and "name" in function:
        values["activation"] = function["name"]
    return _class_name(objects, node), values


def _yaml_config(context: Files) -> dict[str, Any]:
    if MODEL_YAML not in context:
        return {}
    config = described.plain_yaml(context.text(MODEL_YAML), f"{context.where}/{MODEL_YAML}").get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{context.where}/{MODEL_YAML} is not a NeMo-2 model.yaml: it has no config")
    function = config.get("activation_func")
    if isinstance(function, dict):
        config["activation"] = str(function.get("_target_", "")).rpartition(".")[2]
    return config


def activation_functions() -> dict[str, Any]:
    """Name in Architecture -> the function that Megatron's configs hold; imports Megatron."""
    import torch.nn.functional as functional
    from megatron.core.activations import squared_relu

    return {"silu": functional.silu, "gelu": functional.gelu, "squared_relu": squared_relu}


def nemo_config(architecture: Architecture, **engine: Any) -> Any:
    """NeMo's config object (a dataclass of nemo.collections.llm) for `architecture`; imports NeMo.

    Args:
        engine: further fields that say how to run and not what to run (fusions, initialization...).
    """
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model import llama

    fields = {name: getattr(architecture, name) for name in SAME_NAME}
    fields |= {
        "vocab_size": architecture.vocab_size,
        "activation_func": activation_functions()[architecture.activation],
        "position_embedding_type": "rope",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    class_name = CLASSES[architecture.family][1]
    if architecture.family == "mistral":
        window = [architecture.sliding_window, 0] if architecture.sliding_window else None
        fields |= {"window_size": window, "cp_comm_type": "a2a" if window else None}
    if architecture.rope_scaling is not None:
        class_name = "Llama31Config"
        fields |= {theirs: getattr(architecture.rope_scaling, ours) for theirs, ours in ROPE_SCALING.items()}
    # Llama31Config without sizes is not among llm's own names.
    kind = getattr(llm, class_name, None) or getattr(llama, class_name)
    return kind(**fields, **engine)


def nemo_model(architecture: Architecture, tokenizer_dir: str | None = None) -> Any:
    """NeMo's model object for `architecture`, without weights, as plain NeMo would load it; imports NeMo.

    Where Transformer Engine is not installed, the one fusion that NeMo's configs refuse without it is left off.
    """
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.gpt.model.base import HAVE_TE

    config = nemo_config(architecture, **({} if HAVE_TE else {"apply_rope_fusion": False}))
    tokenizer = AutoTokenizer(tokenizers.loadable(tokenizer_dir), use_fast=True) if tokenizer_dir else None
    return getattr(llm, CLASSES[architecture.family][0])(config, tokenizer=tokenizer)
