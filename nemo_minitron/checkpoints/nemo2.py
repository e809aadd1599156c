"""NeMo-2 checkpoints: a directory with context/ (io.json, model.yaml, tokenizer) and weights/ (torch_dist).

io.json is read as plain JSON and model.yaml with a safe loader: no class that they name is imported, none is run.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.architecture import Architecture, RopeScaling
from nemo_minitron.checkpoints import torch_dist
from nemo_minitron.errors import CheckpointError

CONTEXT, WEIGHTS = "context", "weights"
EMBEDDING = "module.embedding.word_embeddings.weight"

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


def architecture(path: Path) -> Architecture:
    """Family and sizes of the checkpoint at `path`, from its context and the metadata of its weights.

    Raises:
        CheckpointError: the context is missing or unreadable, the family is not a dense one that is known here, or
            the weights' metadata is missing or damaged.
    """
    class_name, values = _model_config(path)
    family = next((family for prefix, family in FAMILY_OF_CLASS if class_name.startswith(prefix)), None)
    if family is None:
        known = ", ".join(prefix for prefix, _ in FAMILY_OF_CLASS)
        raise CheckpointError(f"{path}/context names the config class {class_name}; known are those of {known}")
    fields = dict(DEFAULTS[family])
    fields |= {name: values[name] for name in SAME_NAME if values.get(name) is not None}
    if values.get("activation"):
        fields["activation"] = values["activation"]
    scaling = {ours: values[theirs] for theirs, ours in ROPE_SCALING.items() if values.get(theirs) is not None}
    if scaling or class_name.startswith(("Llama31", "Llama32")):
        defaults = {"factor": 32.0} if class_name.startswith("Llama32") else {}
        fields["rope_scaling"] = RopeScaling(**{**defaults, **scaling})
    stored = torch_dist.tensors(path / WEIGHTS)
    if EMBEDDING not in stored:
        raise CheckpointError(f"{path}/weights has no tensor {EMBEDDING}: it is not a dense GPT checkpoint of NeMo")
    fields["vocab_size"] = stored[EMBEDDING].shape[0]
    missing = [
        name for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads") if name not in fields
    ]
    if missing:
        raise CheckpointError(f"{path}/context does not state {', '.join(missing)}, and model.yaml is missing")
    return Architecture(family=family, **fields)


def tokenizer(path: Path) -> str | None:
    """The tokenizer's directory inside the checkpoint, or the hub name that stands for it, or None."""
    objects, root = _context(path)
    node = _follow(objects, root, "model", "tokenizer")
    name = _arguments(objects, node).get("pretrained_model_name") if node else None
    if not isinstance(name, str):
        return None
    inside = (path / CONTEXT / name).resolve()
    if inside.is_dir() and inside.is_relative_to((path / CONTEXT).resolve()):
        return str(inside)
    return name


def _context(path: Path) -> tuple[dict[str, Any], str]:
    file = path / CONTEXT / "io.json"
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
        return loaded["objects"], loaded["root"]["key"]
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: {path} is not a whole NeMo-2 checkpoint") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a NeMo-2 context ({type(error).__name__}: {error})") from None


def _arguments(objects: dict[str, Any], key: str) -> dict[str, Any]:
    """Arguments of the object `key`: leaves as values, references as {"ref": key}, classes as {"name": ...}."""
    found = {}
    for label, node in objects.get(key, {}).get("items", []):
        name = label.removeprefix("Attr(name='").removesuffix("')")
        kind = node.get("type") if isinstance(node, dict) else None
        if kind == "leaf":
            found[name] = node.get("value")
        elif kind == "ref":
            found[name] = {"ref": node["key"]}
        elif kind == "pyref":
            found[name] = {"name": node["name"]}
    return found


def _follow(objects: dict[str, Any], key: str, *names: str) -> str | None:
    for name in names:
        value = _arguments(objects, key).get(name)
        if not isinstance(value, dict) or "ref" not in value:
            return None
        key = value["ref"]
    return key


def _class_name(objects: dict[str, Any], key: str) -> str:
    metadata = objects[key].get("metadata") or {}
    return _arguments(objects, metadata.get("key", "")).get("fn_or_cls", {}).get("name", "")


def _model_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Name of the config class and its values: those of model.yaml, overridden by what io.json passes."""
    objects, root = _context(path)
    node = _follow(objects, root, "model", "config")
    if node is None:
        raise CheckpointError(f"{path}/context/io.json holds no model config")
    values = _yaml_config(path / CONTEXT / "model.yaml")
    passed = _arguments(objects, node)
    values |= {name: value for name, value in passed.items() if not isinstance(value, dict)}
    function = passed.get("activation_func")
    if isinstance(function, dict) and "name" in function:
        values["activation"] = function["name"]
    return _class_name(objects, node), values


def _yaml_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))["config"]
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a NeMo-2 model.yaml ({type(error).__name__})") from None
    function = config.get("activation_func")
    if isinstance(function, dict):
        config["activation"] = str(function.get("_target_", "")).rpartition(".")[2]
    return config


def nemo_config(architecture: Architecture, **engine: Any) -> Any:
    """NeMo's config object (a dataclass of nemo.collections.llm) for `architecture`; imports NeMo.

    Args:
        engine: further fields that say how to run and not what to run (fusions, initialization...).
    """
    import torch.nn.functional as functional
    from megatron.core.activations import squared_relu
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model import llama

    activations = {"silu": functional.silu, "gelu": functional.gelu, "squared_relu": squared_relu}
    fields = {name: getattr(architecture, name) for name in SAME_NAME}
    fields |= {
        "vocab_size": architecture.vocab_size,
        "activation_func": activations[architecture.activation],
        "position_embedding_type": "rope",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    class_name = CLASSES[architecture.family][1]
    if architecture.family == "mistral":
        fields |= {"window_size": None, "cp_comm_type": None}
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
    tokenizer = AutoTokenizer(tokenizer_dir, use_fast=True) if tokenizer_dir else None
    return getattr(llm, CLASSES[architecture.family][0])(config, tokenizer=tokenizer)


def write_context(path: Path, architecture: Architecture, tokenizer_dir: str | None) -> None:
    """Writes context/ so that plain NeMo loads the checkpoint; imports NeMo."""
    from nemo import lightning as nl
    from nemo.lightning.io.pl import TrainerContext

    model = nemo_model(architecture, tokenizer_dir)
    context = TrainerContext(model=model, trainer=nl.Trainer(logger=False, accelerator="cpu"), extra={})
    context.io_dump(path / CONTEXT, yaml_attrs=["model"])
