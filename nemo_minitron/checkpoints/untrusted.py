"""An Architecture from what a configuration file says, checked as the untrusted text that it is."""

import sys
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.tokenizer import Tokenizer
from nemo_minitron.errors import CheckpointError

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size", "seq_length")
OPTIONAL_SIZES = ("num_query_groups", "kv_channels", "sliding_window")
NUMBERS = ("layernorm_epsilon", "rotary_base", "rotary_percent", "init_method_std")
LARGEST = 1 << 31
#: Bounds of NUMBERS, where they are others than 0 and what is finite: below a base of 1 no frequency falls.
LEAST, MOST = {"rotary_base": 1.0}, {"rotary_percent": 1.0}


YAML_LIMIT = 4 << 20


class _PlainLoader(yaml.SafeLoader):
    """Plain values only, and no merge keys, with which a small text can stand for a huge one."""

    def flatten_mapping(self, node: Any) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merge keys have no place in a checkpoint's configuration")


def plain_yaml(text: str, source: str | Path) -> dict[str, Any]:
    """A mapping in YAML; raises CheckpointError where it is none, or holds tags that ask for objects."""
    if len(text) > YAML_LIMIT:
        raise CheckpointError(f"{source} has {len(text)} characters, too many for what it is")
    try:
        loaded = yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{source} is not plain YAML: {reason}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{source} is not a mapping")
    return loaded


def shown(value: Any) -> str:
    """A value for a message: never more than a line of it."""
    return repr(value)[:80] if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"


def architecture(family: str, fields: dict[str, Any], source: str | Path) -> Architecture:
    """The architecture; raises CheckpointError where a size or number is none, or they contradict each other."""
    problems = [f"it does not state {name}" for name in SIZES if fields.get(name) is None]
    for name in (*SIZES, *OPTIONAL_SIZES):
        value = fields.get(name)
        if value is not None and (type(value) is not int or not 0 < value < LARGEST):
            problems.append(f"{name} = {shown(value)} is not a size")
    for name in NUMBERS:
        if name not in fields:
            continue
        try:
            fields = fields | {name: float(fields[name])}
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{name} = {shown(fields[name])} is not a number")
            continue
        if not fields[name] >= LEAST.get(name, 0.0) or not fields[name] <= MOST.get(name, sys.float_info.max):
            problems.append(f"{name} = {shown(fields[name])} is not a number that a model can have")
    if not problems:
        if fields.get("kv_channels") is None and fields["hidden_size"] < fields["num_attention_heads"]:
            problems.append("num_attention_heads is above hidden_size")
        else:
            made = Architecture(family=family, **fields)
            problems = made.problems()
    if problems:
        raise CheckpointError(f"{source}: {'; '.join(problems)}")
    return made


def family_of(fields: dict[str, Any]) -> str:
    """The family that fields of Architecture amount to, where nothing names it."""
    if fields["normalization"] == "LayerNorm" and fields["activation"] == "squared_relu":
        return "nemotron" if fields["layernorm_zero_centered_gamma"] else "gpt"
    if fields["normalization"] != "RMSNorm" or not fields["gated_linear_unit"] or fields["activation"] != "silu":
        return "gpt"
    if fields["qk_layernorm"]:
        return "gpt" if fields["add_qkv_bias"] else "qwen3"
    if fields["add_qkv_bias"]:
        return "qwen2"
    return "mistral" if fields["sliding_window"] else "llama"


def vocab_padding(rows: int, tokenizer: Tokenizer | None, divisible_by: Any, tensor_parallel: Any) -> int:
    """Rows of the embedding without a token, where they are what Megatron adds to the tokenizer's own; else 0.

    Args:
        divisible_by: Megatron's make_vocab_size_divisible_by; the vocabulary is padded to a multiple of it times
            tensor_parallel.
    """
    tokens = tokenizer.size() if tokenizer else None
    if tokens is None or not all(type(number) is int and number > 0 for number in (divisible_by, tensor_parallel)):
        return 0
    step = divisible_by * tensor_parallel
    return rows - tokens if 0 < tokens < rows and -(-tokens // step) * step == rows else 0
