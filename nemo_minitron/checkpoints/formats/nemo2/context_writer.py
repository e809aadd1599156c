"""Writes context/ of a NeMo-2 checkpoint without NeMo: io.json, from which NeMo rebuilds the model, and model.yaml.

io.json is fiddle's JSON of a TrainerContext, as NeMo's io_dump writes it: which classes to call with which arguments;
what is left out is a class's own default. Only NeMo and torch are named, so that plain NeMo loads it. model.yaml says
the same of the model, for people and for tools that do not load NeMo.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.architecture import SAME_IN_MEGATRON, Architecture, vocab_multiple
from nemo_minitron.checkpoints.formats.nemo2.classes import CLASSES, MODEL_YAML, PADDING, ROPE_SCALING
from nemo_minitron.checkpoints.tokenizer import HUGGINGFACE, SENTENCEPIECE
from nemo_minitron.errors import CheckpointError

IO_JSON = "io.json"
#: Version of fiddle's JSON.
VERSION = "0.0.1"
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class TokenizerRef:
    """A tokenizer as the context names it.

    Attributes:
        kind: ``huggingface`` or ``sentencepiece``.
        name: its folder or file inside the context, or its name on the hub.
    """

    kind: str
    name: str


@dataclasses.dataclass(frozen=True)
class Name:
    """A class, function or constant that NeMo looks up when it loads."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A class, and the arguments that NeMo calls it with when it loads."""

    target: Name
    arguments: dict[str, Any]


MODELS = "nemo.collections.llm.gpt.model"
#: Family -> module of its classes.
MODULES = {family: f"{MODELS}.{'base' if family == 'gpt' else family}" for family in CLASSES}
#: NeMo's own squared ReLU, which its Nemotron checkpoints name: Megatron has one of its own in recent versions only.
ACTIVATIONS = {
    "silu": Name("torch.nn.functional", "silu"),
    "gelu": Name("torch.nn.functional", "gelu"),
    "squared_relu": Name("nemo.collections.llm.fn.activation", "squared_relu"),
}
#: Families whose config classes turn the fusion of the rotary embedding on, which they refuse to be built with where
#: Transformer Engine is not installed. NeMo's constant says whether it is, there where the checkpoint is loaded.
FUSED_ROPE = ("llama", "nemotron")
HAVE_TRANSFORMER_ENGINE = Name(f"{MODELS}.base", "HAVE_TE")
TOKENIZERS = "nemo.collections.common.tokenizers"
AUTO_TOKENIZER = Name(f"{TOKENIZERS}.huggingface.auto_tokenizer", "AutoTokenizer")
SENTENCEPIECE_TOKENIZER = Name(f"{TOKENIZERS}.sentencepiece_tokenizer", "SentencePieceTokenizer")
#: What NeMo wraps a name in that is no path: it takes any other for one inside the context.
NO_PATH = Name("nemo.lightning.io.artifact.file", "DirOrStringArtifact")
TRAINER = Call(Name("nemo.lightning.pytorch.trainer", "Trainer"), {"accelerator": "cpu", "logger": False})
TRAINER_CONTEXT = Name("nemo.lightning.io.pl", "TrainerContext")


def write_context(folder: Path, architecture: Architecture, *, tokenizer: TokenizerRef | None, dtype: str) -> None:
    """Writes `folder`/io.json and `folder`/model.yaml.

    Args:
        folder: context/ of the checkpoint; the tokenizer's files are in it already.
        dtype: of the weights, by torch's name (``bfloat16``).

    Raises:
        CheckpointError: NeMo's classes cannot say this, or the tokenizer's file is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = model_of(folder, architecture, tokenizer, dtype)
    extra = {PADDING: architecture.vocab_padding} if architecture.vocab_padding else {}
    context = Call(TRAINER_CONTEXT, {"model": model, "trainer": TRAINER, "extra": extra})
    (folder / IO_JSON).write_text(json.dumps(_Serialization().document(context), indent=1) + "\n", encoding="utf-8")
    (folder / MODEL_YAML).write_text(yaml.safe_dump(_plain(model), sort_keys=False), encoding="utf-8")


def model_of(folder: Path, architecture: Architecture, tokenizer: TokenizerRef | None, dtype: str) -> Call:
    """NeMo's model: its class, its config and its tokenizer."""
    module = MODULES[architecture.family]
    model_class, config_class = CLASSES[architecture.family]
    if architecture.rope_scaling is not None:
        if architecture.family != "llama":
            raise CheckpointError(
                f"NeMo's {config_class} has no scaled rotary embedding as Llama 3.1 has it: "
                f"a {architecture.family} model with rope_scaling cannot be written as a NeMo-2 checkpoint"
            )
        config_class = "Llama31Config"
    arguments = {"config": Call(Name(module, config_class), config_fields(architecture, dtype))}
    if tokenizer is not None:
        arguments["tokenizer"] = _tokenizer(folder, tokenizer)
    return Call(Name(module, model_class), arguments)


def config_fields(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """Arguments of NeMo's config class; raises CheckpointError for a dtype that it has no settings for."""
    if dtype not in DTYPES:
        raise CheckpointError(f"a NeMo-2 checkpoint holds weights of {', '.join(DTYPES)}, not of {dtype}")
    fields = {name: getattr(architecture, name) for name in SAME_IN_MEGATRON}
    fields |= {
        "activation_func": ACTIVATIONS[architecture.activation],
        "position_embedding_type": "rope",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # NeMo builds just as many rows as it is told, and pads where it is told none.
        "vocab_size": architecture.vocab_size,
        "make_vocab_size_divisible_by": vocab_multiple(architecture),
        "fp16": dtype == "float16",
        "bf16": dtype == "bfloat16",
        "params_dtype": Name("torch", dtype),
    }
    if architecture.family in FUSED_ROPE:
        fields["apply_rope_fusion"] = HAVE_TRANSFORMER_ENGINE
    if architecture.rope_scaling is not None:
        fields |= {theirs: getattr(architecture.rope_scaling, ours) for theirs, ours in ROPE_SCALING.items()}
    return fields | _window(architecture)


def _window(architecture: Architecture) -> dict[str, Any]:
    """The sliding window, as NeMo's importer of Mistral states it; Mistral's class has one unless it is told."""
    if architecture.sliding_window is not None:
        return {"window_size": [architecture.sliding_window, 0], "cp_comm_type": "a2a"}
    return {"window_size": None, "cp_comm_type": None} if architecture.family == "mistral" else {}


def _tokenizer(folder: Path, tokenizer: TokenizerRef) -> Call:
    """NeMo's tokenizer; it makes the paths of files absolute when it loads."""
    name: Any = tokenizer.name
    inside = (folder / name).exists()
    if tokenizer.kind == SENTENCEPIECE:
        if not inside:
            raise CheckpointError(f"{folder} has no {name}: a SentencePiece tokenizer is its file")
        return Call(SENTENCEPIECE_TOKENIZER, {"model_path": name})
    if tokenizer.kind != HUGGINGFACE:
        raise CheckpointError(f"a NeMo-2 checkpoint has no tokenizer of the kind {tokenizer.kind}")
    name = name if inside else Call(NO_PATH, {"attr": name, "skip": True})
    return Call(AUTO_TOKENIZER, {"pretrained_model_name": name, "use_fast": True})


def _plain(value: Any) -> Any:
    """A value as NeMo's model.yaml shows it; a name on the hub as the name that it is."""
    if isinstance(value, Name):
        return {"_target_": f"{value.module}.{value.name}", "_call_": False}
    if not isinstance(value, Call):
        return value
    if value.target == NO_PATH:
        return value.arguments["attr"]
    arguments = {name: _plain(argument) for name, argument in value.arguments.items()}
    return {"_target_": f"{value.target.module}.{value.target.name}", **arguments}


FIDDLE = "fiddle._src.config"
CONFIG, METADATA = Name(FIDDLE, "Config"), Name(FIDDLE, "BuildableTraverserMetadata")
LIST, TUPLE, DICT = (Name("builtins", kind) for kind in ("list", "tuple", "dict"))


class _Serialization:
    """Values as fiddle's serialization writes them: objects by key, each after those that it refers to.

    Every value has its path from the root: NeMo's load_context finds a subpath by it.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.counts: collections.Counter[str] = collections.Counter()

    def document(self, root: Call) -> dict[str, Any]:
        reference = self._value(root, "<root>")
        return {
            "root": reference,
            "objects": self.objects,
            "refcounts": dict.fromkeys(self.objects, 1),
            "version": VERSION,
        }

    def _value(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Name):
            return {**_pyref(value), "paths": [path]}
        if isinstance(value, Call):
            items = [
                [f"Attr(name={name!r})", self._value(child, f"{path}.{name}")]
                for name, child in value.arguments.items()
            ]
            return self._object(value.target.name, CONFIG, items, self._metadata(value), path)
        if isinstance(value, dict):
            items = [[f"Key(key={key!r})", self._value(child, f"{path}[{key!r}]")] for key, child in value.items()]
            return self._object("dict", DICT, items, self._names(value), path)
        if isinstance(value, list):
            items = [[f"Index(index={n})", self._value(child, f"{path}[{n}]")] for n, child in enumerate(value)]
            return self._object("list", LIST, items, None, path)
        return {"type": "leaf", "value": value, "paths": [path]}

    def _metadata(self, call: Call) -> dict[str, Any]:
        """What a Config calls, and the names of its arguments; tags and history are empty."""
        items = [
            ["Attr(name='fn_or_cls')", _pyref(call.target)],
            ["Attr(name='argument_names')", self._names(call.arguments)],
            ["Attr(name='argument_tags')", self._object("dict", DICT, [], self._names(()))],
            ["Attr(name='argument_history')", self._object("dict", DICT, [], self._names(()))],
        ]
        return self._object(METADATA.name, METADATA, items, _pyref(METADATA))

    def _names(self, names: Iterable[str]) -> dict[str, Any]:
        """A tuple of names; an empty one has no key."""
        items = [[f"Index(index={n})", name] for n, name in enumerate(names)]
        if not items:
            return {"type": _pyref(TUPLE), "items": [], "metadata": None}
        return self._object("tuple", TUPLE, items, None)

    def _object(
        self, kind: str, python_type: Name, items: list[Any], metadata: dict[str, Any] | None, path: str | None = None
    ) -> dict[str, Any]:
        """Keeps an object; returns the reference to it."""
        stem = re.sub(r"(?<=[^_A-Z])(?=[A-Z])", "_", kind).lower()
        self.counts[stem] += 1
        key = f"{stem}_{self.counts[stem]}"
        self.objects[key] = {"type": _pyref(python_type), "items": items, "metadata": metadata}
        if path is not None:
            self.objects[key]["paths"] = [path]
        return {"type": "ref", "key": key}


def _pyref(name: Name) -> dict[str, str]:
    return {"type": "pyref", "module": name.module, "name": name.name}
