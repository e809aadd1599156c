"""`minitron inspect`: what a checkpoint is, and what a user may stumble over, without reading its weights."""

import dataclasses
import json
from collections import Counter
from typing import Any

from nemo_minitron.architecture import human
from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.formats.base import Quantization
from nemo_minitron.checkpoints.precision import FLOATS, count_not_finite
from nemo_minitron.checkpoints.tensors import BLOCK, Lazy
from nemo_minitron.config import InspectConfig

#: Tensor-parallel sizes that people use; what they do not divide is worth a word.
RANKS = 8


def inspect(config: InspectConfig) -> None:
    """Prints a description of `config.source`, as text or JSON.

    Raises:
        CheckpointError: it is missing, damaged or of no known format.
    """
    checkpoint = open_checkpoint(config.source, quantized=True)
    described = describe(checkpoint, values=config.values)
    print(json.dumps(described, indent=2) if config.json else render(described))


def describe(checkpoint: Checkpoint, *, values: bool = False) -> dict[str, Any]:
    """The description as a plain dict.

    Args:
        values: read all weights and count what is not finite.
    """
    a = checkpoint.architecture
    precisions = checkpoint.stored_precisions or Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    description: dict[str, Any] = {
        "path": str(checkpoint.path),
        "format": checkpoint.kind.title,
        "weights": checkpoint.layout,
        "family": a.family,
        "parameters": a.parameters(),
        "parameters_without_embeddings": a.non_embedding_parameters(),
        "precision": dict(Counter(precisions).most_common()),
        "quantization": dataclasses.asdict(checkpoint.quantization) if checkpoint.quantization else None,
        "bytes": checkpoint.size,
        "tokenizer": checkpoint.tokenizer_files.describe() if checkpoint.tokenizer_files else None,
        "architecture": a.to_dict(),
        "warnings": warnings(checkpoint),
    }
    if values:
        description["not_finite"] = not_finite(checkpoint)
        description["warnings"] += [
            f"{name} has {count} values that are NaN or Inf" for name, count in description["not_finite"].items()
        ]
    return description


def warnings(checkpoint: Checkpoint) -> list[str]:
    """What a user may stumble over."""
    a, remarks = checkpoint.architecture, []
    if checkpoint.quantization is not None:
        remarks.append(
            f"the weights are quantised ({checkpoint.quantization.describe()}): {checkpoint.kind.quantized_remark}"
        )
    tokenizer = checkpoint.tokenizer_files
    if a.num_attention_heads * a.kv_channels != a.hidden_size:
        remarks.append(
            f"heads {a.num_attention_heads} x head size {a.kv_channels} = {a.num_attention_heads * a.kv_channels}, not "
            f"the hidden size {a.hidden_size}: pruned in width, or made so; readers must take the head size as it is"
        )
    if a.family == "llama" and a.hidden_size % a.num_attention_heads:
        remarks.append(
            f"the hidden size {a.hidden_size} is no multiple of the {a.num_attention_heads} heads: transformers 4 runs "
            "it, transformers 5 refuses such a Llama"
        )
    if len({tensor.dtype for tensor in checkpoint.tensors.values()}) > 1:
        remarks.append("tensors have different precisions")
    if a.vocab_padding:
        remarks.append(f"{a.vocab_padding} of {a.vocab_size} rows of the vocabulary are padding")
    if a.vocab_size % RANKS:
        remarks.append(f"the vocabulary's {a.vocab_size} rows do not divide over {RANKS} tensor-parallel ranks")
    if tokenizer is None:
        remarks.append("there is no tokenizer; tokenizer=DIR puts one in (minitron convert)")
    elif not tokenizer.files:
        remarks.append(f"the tokenizer is only named ({tokenizer.name}); tokenizer=DIR puts its files in")
    elif (tokens := tokenizer.size()) is not None and tokens > a.vocab_size:
        remarks.append(f"the tokenizer has {tokens} tokens, the embedding only {a.vocab_size} rows")
    remarks += checkpoint.remarks
    if a.sliding_window is not None:
        remarks.append(f"attention reaches {a.sliding_window} tokens back only (sliding window)")
    return remarks


def not_finite(checkpoint: Checkpoint) -> dict[str, int]:
    """Name -> how many values are NaN or Inf, for tensors that have some; reads all weights."""
    counts = {name: _count(tensor) for name, tensor in checkpoint.tensors.items() if tensor.dtype in FLOATS}
    return {name: count for name, count in counts.items() if count}


def _count(tensor: Lazy) -> int:
    return sum(count_not_finite(block, tensor.dtype) for block in tensor.blocks(memoryview(bytearray(BLOCK))))


def render(described: dict[str, Any]) -> str:
    """The description as text."""
    a = described["architecture"]
    groups = f" in {a['num_query_groups']} query groups" if a["num_query_groups"] != a["num_attention_heads"] else ""
    lines = [
        ("format", f"{described['format']}, weights in {described['weights']}"),
        ("family", described["family"]),
        ("layers", a["num_layers"]),
        ("hidden size", a["hidden_size"]),
        ("FFN size", f"{a['ffn_hidden_size']}, {_activation(a)}"),
        ("attention heads", f"{a['num_attention_heads']}{groups}, head size {a['kv_channels']}"),
        ("vocabulary", _vocabulary(a)),
        ("norm", f"{_norm(a)}, epsilon {a['layernorm_epsilon']:g}"),
        ("positions", _positions(a)),
        ("sequence length", a["seq_length"]),
        ("biases", "all linear layers" if a["add_bias_linear"] else "qkv" if a["add_qkv_bias"] else "none"),
        ("parameters", f"{human(described['parameters'])} ({described['parameters']:,})"),
        ("without embeddings", f"{human(described['parameters_without_embeddings'])}"),
        ("precision", ", ".join(f"{name} ({count} tensors)" for name, count in described["precision"].items())),
        ("bytes", f"{described['bytes']:,} ({described['bytes'] / 1e9:.2f} GB)"),
        ("tokenizer", described["tokenizer"] or "none"),
    ]
    if described["quantization"]:
        lines.insert(1, ("quantised", Quantization(**described["quantization"]).describe()))
    if "not_finite" in described:
        lines.append(("values", "NaN or Inf, see below" if described["not_finite"] else "all finite"))
    text = [described["path"], *(f"  {name:<19}{value}" for name, value in lines)]
    if described["warnings"]:
        text += ["  worth knowing", *(f"    - {warning}" for warning in described["warnings"])]
    return "\n".join(text)


def _activation(a: dict[str, Any]) -> str:
    return f"{'gated ' if a['gated_linear_unit'] else ''}{a['activation'].replace('_', ' ')}"


def _norm(a: dict[str, Any]) -> str:
    heads = ", of each query and key too" if a["qk_layernorm"] else ""
    return a["normalization"] + (" with gamma stored minus 1" if a["layernorm_zero_centered_gamma"] else "") + heads


def _vocabulary(a: dict[str, Any]) -> str:
    tied = "tied with the output layer" if a["share_embeddings_and_output_weights"] else "output layer of its own"
    padding = f", {a['vocab_padding']} of them padding" if a["vocab_padding"] else ""
    return f"{a['vocab_size']} rows{padding}, {tied}"


def _positions(a: dict[str, Any]) -> str:
    share = "" if a["rotary_percent"] == 1.0 else f" on {a['rotary_percent']:.0%} of each head"
    scaling = a["rope_scaling"]
    scaled = f", scaled as in Llama 3.1 (factor {scaling['factor']:g})" if scaling else ""
    window = f", window {a['sliding_window']}" if a["sliding_window"] else ""
    return f"rotary, base {a['rotary_base']:g}{share}{scaled}{window}"
