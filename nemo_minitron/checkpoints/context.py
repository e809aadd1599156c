"""Writes context/ of a NeMo-2 checkpoint without NeMo: io.json, from which NeMo rebuilds the model, and model.yaml.

io.json is Fiddle's JSON form of a TrainerContext: objects with the class that they are made by and its arguments.
Only classes of NeMo, Megatron and torch are named, so that a plain NeMo loads it.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.nemo2 import CLASSES, MODEL_YAML, PADDING, ROPE_SCALING, SAME_NAME

VERSION = "0.0.1"
GPT = "nemo.collections.llm.gpt.model"
#: Family -> module of its classes.
MODULES = {name: f"{GPT}.{'base' if name == 'gpt' else name}" for name in CLASSES}
ACTIVATIONS = {
    "silu": ("torch.nn.functional", "silu"),
    "gelu": ("torch.nn.functional", "gelu"),
    "squared_relu": ("megatron.core.activations", "squared_relu"),
}
TOKENIZERS = {
    "huggingface": ("nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer"),
    "sentencepiece": ("nemo.collections.common.tokenizers.sentencepiece_tokenizer", "SentencePieceTokenizer"),
}
TRAINER = ("nemo.lightning.pytorch.trainer", "Trainer")
TRAINER_CONTEXT = ("nemo.lightning.io.pl", "TrainerContext")
FIDDLE = "fiddle._src.config"
#: NeMo builds the rows that it is told; the multiple says what they divide by.
VOCAB_MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class TokenizerRef:
    """A tokenizer as the context names it.

    Attributes:
        kind: ``huggingface`` or ``sentencepiece``.
        name: its folder or file inside the context, or its hub name.
    """

    kind: str
    name: str


@dataclasses.dataclass(frozen=True)
class Name:
    """A class, function or dtype, named and never called here."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A class and the arguments that NeMo shall build it with."""

    target: Name
    arguments: dict[str, Any]


def write_context(folder: Path, architecture: Architecture, *, tokenizer: TokenizerRef | None, dtype: str) -> None:
    """Writes `folder`/io.json and `folder`/model.yaml.

    Args:
        folder: context/; the tokenizer's files are there already.
        dtype: of the weights (``bfloat16``).
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = model_of(architecture, tokenizer, dtype)
    trainer = Call(Name(*TRAINER), {"accelerator": "cpu", "logger": False})
    extra = {PADDING: architecture.vocab_padding} if architecture.vocab_padding else {}
    context = Call(Name(*TRAINER_CONTEXT), {"model": model, "trainer": trainer, "extra": extra})
    (folder / "io.json").write_text(json.dumps(_Graph().dump(context), indent=2) + "\n", encoding="utf-8")
    (folder / MODEL_YAML).write_text(yaml.safe_dump(_plain(model), sort_keys=False), encoding="utf-8")


def model_of(architecture: Architecture, tokenizer: TokenizerRef | None, dtype: str) -> Call:
    """NeMo's model: its class, its config, its tokenizer."""
    module = MODULES[architecture.family]
    model_class, config_class = CLASSES[architecture.family]
    if architecture.rope_scaling is not None:
        module, config_class = MODULES["llama"], "Llama31Config"
    config = Call(Name(module, config_class), config_fields(architecture, dtype))
    arguments: dict[str, Any] = {"config": config}
    if tokenizer is not None:
        names = {"huggingface": "pretrained_model_name", "sentencepiece": "model_path"}
        settings: dict[str, Any] = {names[tokenizer.kind]: tokenizer.name}
        settings |= {"use_fast": True} if tokenizer.kind == "huggingface" else {}
        arguments["tokenizer"] = Call(Name(*TOKENIZERS[tokenizer.kind]), settings)
    return Call(Name(MODULES[architecture.family], model_class), arguments)


def config_fields(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """Arguments of NeMo's config class."""
    a = architecture
    fields = {name: getattr(a, name) for name in SAME_NAME}
    fields |= {
        "activation_func": Name(*ACTIVATIONS[a.activation]),
        "position_embedding_type": "rope",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": Name("torch", dtype),
        "vocab_size": a.vocab_size,
        "make_vocab_size_divisible_by": next(m for m in VOCAB_MULTIPLES if a.vocab_size % m == 0),
    }
    if a.family == "mistral":
        fields |= {"window_size": [a.sliding_window, 0] if a.sliding_window else None, "cp_comm_type": None}
    if a.rope_scaling is not None:
        fields |= {theirs: getattr(a.rope_scaling, ours) for theirs, ours in ROPE_SCALING.items()}
    if importlib.util.find_spec("transformer_engine") is None:
        # NeMo's configs refuse to be built without Transformer Engine unless this is off.
        fields["apply_rope_fusion"] = False
    return fields


class _Graph:
    """Objects of a Fiddle graph by key, each after those that it refers to."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def dump(self, call: Call) -> dict[str, Any]:
        root = self._node(call, "<root>")
        return {
            "root": root,
            "objects": self.objects,
            "refcounts": dict.fromkeys(self.objects, 1),
            "version": VERSION,
        }

    def _node(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Name):
            return {**_reference(value.module, value.name), "paths": [path]}
        if isinstance(value, Call):
            return {"type": "ref", "key": self._call(value, path)}
        if isinstance(value, dict | list | tuple):
            return {"type": "ref", "key": self._sequence(value, path)}
        return {"type": "leaf", "value": value, "paths": [path]}

    def _add(self, stem: str, node: dict[str, Any]) -> str:
        self.counts[stem] = self.counts.get(stem, 0) + 1
        key = f"{stem}_{self.counts[stem]}"
        self.objects[key] = node
        return key

    def _sequence(self, values: Any, path: str) -> str:
        """A list, a tuple, or a dict of plain values."""
        kind, metadata = type(values).__name__, None
        if isinstance(values, dict):
            items = [(f"Key(key={key!r})", value) for key, value in values.items()]
            metadata = self._names(list(values))
        else:
            items = [(f"Index(index={number})", value) for number, value in enumerate(values)]
        nodes = [[label, self._node(value, f"{path}[{label}]")] for label, value in items]
        return self._add(kind, {"type": _reference("builtins", kind), "items": nodes, "metadata": metadata})

    def _names(self, names: list[str]) -> dict[str, Any]:
        """A tuple of names."""
        items = [[f"Index(index={number})", name] for number, name in enumerate(names)]
        node = {"type": _reference("builtins", "tuple"), "items": items, "metadata": None}
        return {"type": "ref", "key": self._add("tuple", node)}

    def _call(self, call: Call, path: str) -> str:
        items = [
            [f"Attr(name='{name}')", self._node(value, f"{path}.{name}")] for name, value in call.arguments.items()
        ]
        metadata = {
            "type": _reference(FIDDLE, "BuildableTraverserMetadata"),
            "items": [
                ["Attr(name='fn_or_cls')", _reference(call.target.module, call.target.name)],
                ["Attr(name='argument_names')", self._names(list(call.arguments))],
                ["Attr(name='argument_tags')", self._node({}, path)],
                ["Attr(name='argument_history')", self._node({}, path)],
            ],
            "metadata": _reference(FIDDLE, "BuildableTraverserMetadata"),
        }
        node = {
            "type": _reference(FIDDLE, "Config"),
            "items": items,
            "metadata": {"type": "ref", "key": self._add("buildable_traverser_metadata", metadata)},
            "paths": [path],
        }
        return self._add(_snake(call.target.name), node)


def _reference(module: str, name: str) -> dict[str, str]:
    return {"type": "pyref", "module": module, "name": name}


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def _plain(value: Any) -> Any:
    """A call as model.yaml shows it."""
    if isinstance(value, Call):
        arguments = {name: _plain(argument) for name, argument in value.arguments.items()}
        return {"_target_": f"{value.target.module}.{value.target.name}", **arguments}
    if isinstance(value, Name):
        return {"_target_": f"{value.module}.{value.name}", "_call_": False}
    return value
