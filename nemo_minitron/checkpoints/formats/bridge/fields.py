"""Fields of Megatron's models, as run_config.yaml and Megatron-LM's arguments state them, to and from Architecture."""

from typing import Any

from nemo_minitron.architecture import SAME_IN_MEGATRON, Architecture, RopeScaling, vocab_multiple
from nemo_minitron.checkpoints import untrusted
from nemo_minitron.checkpoints.formats.bridge.classes import (
    ACTIVATIONS,
    DENSE,
    GPT_PROVIDER,
    PROVIDERS,
    WRITTEN_ACTIVATIONS,
)
from nemo_minitron.checkpoints.tokenizer import Tokenizer
from nemo_minitron.errors import CheckpointError

DTYPES = ("bfloat16", "float16", "float32")
FLAGS = (
    "layernorm_zero_centered_gamma", "gated_linear_unit", "add_bias_linear", "add_qkv_bias", "qk_layernorm",
    "share_embeddings_and_output_weights", "rope_scaling",
)  # fmt: skip
#: What Megatron Core scales the rotary frequencies by; the factor alone is a field.
SCALING = RopeScaling()


def read_architecture(
    family: str | None, values: dict[str, Any], rows: int, tokenizer: Tokenizer | None, source: str
) -> Architecture:
    """The architecture that a model's fields state.

    Args:
        family: None: the one that the fields amount to.
        rows: of the embedding.
        source: where they stand, for messages.

    Raises:
        CheckpointError: it is no dense model that is known here, or a field is missing or none.
    """
    refused = [
        f"{name} = {untrusted.shown(values[name])}"
        for name, known in DENSE.items()
        if values.get(name) is not None and values[name] not in known
    ]
    if refused:
        raise CheckpointError(
            f"{source} describes a model of a kind that is not known here ({', '.join(refused)}); known are dense "
            "models with rotary positions"
        )
    missing = [name for name in (*SAME_IN_MEGATRON, "activation_func", "position_embedding_type") if name not in values]
    if missing:
        raise CheckpointError(f"{source} does not state {', '.join(missing)}, which Megatron always writes")
    wrong = [name for name in FLAGS if type(values.get(name, False)) is not bool]
    if wrong:
        raise CheckpointError(f"{source}: {wrong[0]} = {untrusted.shown(values[wrong[0]])} is neither true nor false")
    fields = {name: values[name] for name in SAME_IN_MEGATRON}
    fields |= {
        "vocab_size": rows,
        "activation": _activation(values["activation_func"], source),
        "rope_scaling": _scaling(values, source),
        "sliding_window": _window(values.get("window_size"), source),
    }
    if fields["add_bias_linear"]:
        fields["add_qkv_bias"] = False  # one bias says it all
    architecture = untrusted.architecture(family or untrusted.family_of(fields), fields, source)
    return architecture.with_sizes(vocab_padding=_padding(values, rows, tokenizer) or None)


def _activation(value: Any, source: str) -> str:
    """The name of a function: as text, or as the `_target_` that stands for it."""
    named = value.get("_target_") if isinstance(value, dict) else value
    known = ACTIVATIONS.get(named.rpartition(".")[2]) if isinstance(named, str) else None
    if known is None:
        raise CheckpointError(
            f"{source}: activation_func {untrusted.shown(named)} is not known here; known are {', '.join(ACTIVATIONS)}"
        )
    return known


def _scaling(values: dict[str, Any], source: str) -> RopeScaling | None:
    if not values.get("rope_scaling"):
        return None
    try:
        return RopeScaling(factor=float(values.get("rope_scaling_factor", SCALING.factor)))
    except (TypeError, ValueError, OverflowError):
        shown = untrusted.shown(values["rope_scaling_factor"])
        raise CheckpointError(f"{source}: rope_scaling_factor = {shown} is not a number") from None


def _window(value: Any, source: str) -> int | None:
    """Megatron counts the tokens before the one that attends, Architecture that one too."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(size) is int for size in value):
        raise CheckpointError(f"{source}: window_size = {untrusted.shown(value)} is not a pair of sizes")
    return value[0] + 1 if value[0] >= 0 else None


def _padding(values: dict[str, Any], rows: int, tokenizer: Tokenizer | None) -> int:
    """Rows of the embedding without a token: beyond the stated vocabulary, or else beyond the tokenizer's."""
    stated = values.get("vocab_size")
    if type(stated) is int and 0 < stated <= rows:
        return rows - stated
    ranks = values.get("tensor_model_parallel_size", 1)
    return untrusted.vocab_padding(rows, tokenizer, values.get("make_vocab_size_divisible_by", 128), ranks)


def check(architecture: Architecture, dtype: str) -> None:
    """Raises CheckpointError where Megatron's fields cannot say this."""
    if dtype not in DTYPES:
        raise CheckpointError(f"a Megatron-Bridge checkpoint holds weights of {', '.join(DTYPES)}, not of {dtype}")
    scaling = architecture.rope_scaling
    if scaling is not None and scaling != RopeScaling(factor=scaling.factor):
        raise CheckpointError(
            f"Megatron scales rotary frequencies with low_freq_factor {SCALING.low_freq_factor:g}, high_freq_factor "
            f"{SCALING.high_freq_factor:g} and original_length {SCALING.original_length} only, as Llama 3.1 does; this "
            f"model has {scaling.low_freq_factor:g}, {scaling.high_freq_factor:g} and {scaling.original_length}: it "
            "cannot be written as a Megatron-Bridge checkpoint"
        )


def write_model(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """`model` of run_config.yaml: Bridge's provider and the fields that it is made with.

    Raises:
        CheckpointError: Megatron's fields cannot say this.
    """
    check(architecture, dtype)
    a = architecture
    scaling, padded = a.rope_scaling, a.vocab_padding > 0
    return {
        "_target_": PROVIDERS.get(a.family, GPT_PROVIDER),
        **{name: getattr(a, name) for name in SAME_IN_MEGATRON},
        "activation_func": _named(WRITTEN_ACTIVATIONS[a.activation]),
        "position_embedding_type": "rope",
        "rope_scaling": scaling is not None,
        "rope_scaling_factor": scaling.factor if scaling is not None else 1.0,
        "window_size": [a.sliding_window - 1, 0] if a.sliding_window is not None else None,
        "vocab_size": a.vocab_size - a.vocab_padding,
        "should_pad_vocab": padded,
        "make_vocab_size_divisible_by": vocab_multiple(a),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": _named(f"torch.{dtype}"),
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }


def _named(name: str) -> dict[str, Any]:
    """A function or dtype, as Bridge's files name it."""
    return {"_target_": name, "_call_": False}
