"""context/ of a NeMo-2 checkpoint, read as data: io.json as plain JSON, model.yaml with a safe loader.

No class that they name is imported, none is run.
"""

import json
from typing import Any

from nemo_minitron.architecture import SAME_IN_MEGATRON, RopeScaling
from nemo_minitron.checkpoints import not_yet, untrusted
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints.files import Files
from nemo_minitron.checkpoints.formats.nemo2.classes import (
    DEFAULTS,
    FAMILY_OF_CLASS,
    HETEROGENEOUS,
    MODEL_YAML,
    NOT_YET,
    PADDING,
    ROPE_SCALING,
)
from nemo_minitron.errors import CheckpointError


def read_config(context: Files) -> tuple[str, str, dict[str, Any]]:
    """Family, name of the config class, and the config's values.

    Raises:
        CheckpointError: the context is missing or unreadable, or the family is not a dense one that is known here.
    """
    class_name, values = _model_config(context)
    reason = next((reason for pattern, reason in NOT_YET if pattern.match(class_name)), None)
    if reason is None and values.get("num_moe_experts"):
        reason = not_yet.QWEN3_MOE if class_name.startswith("Qwen3") else "mixture of experts: not yet"
    if reason is None and any(values.get(name) for name in HETEROGENEOUS):
        reason = not_yet.HETEROGENEOUS
    if reason:
        raise CheckpointError(f"{context.where}: {reason} (config class {class_name}; dense models are read)")
    family = next((family for prefix, family in FAMILY_OF_CLASS if class_name.startswith(prefix)), None)
    if family is None:
        known = ", ".join(prefix for prefix, _ in FAMILY_OF_CLASS)
        raise CheckpointError(f"{context.where} names the config class {class_name}; known are those of {known}")
    return family, class_name, values


def read_fields(family: str, class_name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Fields of Architecture, as the context states them or as the config class has them by default."""
    fields = dict(DEFAULTS[family])
    fields |= {name: values[name] for name in SAME_IN_MEGATRON if values.get(name) is not None}
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


def read_padding(context: Files, values: dict[str, Any], rows: int, tokenizer: tokenizers.Tokenizer | None) -> int:
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
    return untrusted.vocab_padding(rows, tokenizer, values.get("make_vocab_size_divisible_by", 128), ranks)


def read_tokenizer(context: Files) -> tokenizers.Tokenizer | None:
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
    arguments = {}
    for label, node in _items(objects, key):
        name = label.removeprefix("Attr(name='").removeprefix("Key(key='").removesuffix("')")
        kind = node.get("type") if isinstance(node, dict) else None
        if kind == "leaf":
            arguments[name] = node.get("value")
        elif kind == "ref":
            values = _sequence(objects, node.get("key"))
            arguments[name] = {"ref": node.get("key")} if values is None else values
        elif kind == "pyref":
            arguments[name] = {"name": str(node.get("name"))}
    return arguments


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
    config = untrusted.plain_yaml(context.text(MODEL_YAML), f"{context.where}/{MODEL_YAML}").get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{context.where}/{MODEL_YAML} is not a NeMo-2 model.yaml: it has no config")
    function = config.get("activation_func")
    if isinstance(function, dict):
        config["activation"] = str(function.get("_target_", "")).rpartition(".")[2]
    return config
