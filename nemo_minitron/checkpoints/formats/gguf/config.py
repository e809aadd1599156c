"""What the metadata of a GGUF say of a model, and the metadata of one."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture, RopeScaling
from nemo_minitron.checkpoints import untrusted
from nemo_minitron.checkpoints.formats.gguf.families import (
    ARCHITECTURES,
    LAYERS,
    NOT_YET,
    OUTER,
    GgufArchitecture,
    architecture_of,
)
from nemo_minitron.checkpoints.formats.gguf.header import FileTensor
from nemo_minitron.checkpoints.names import EMBEDDING, OUTPUT
from nemo_minitron.checkpoints.untrusted import shown
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

ARCHITECTURE = "general.architecture"
#: The factors by which each rotary frequency is divided [d / 2], as llama.cpp keeps Llama 3.1's scaling.
ROPE_FACTORS = "rope_freqs.weight"
#: Field of Architecture -> key, behind the architecture's name.
SIZES = {
    "num_layers": "block_count", "hidden_size": "embedding_length", "ffn_hidden_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_query_groups": "attention.head_count_kv",
    "kv_channels": "attention.key_length", "seq_length": "context_length",
}  # fmt: skip
VALUE_SIZE, ROTATED, ROPE_BASE = "attention.value_length", "rope.dimension_count", "rope.freq_base"
SCALING, WINDOW = "rope.scaling", "attention.sliding_window"
#: What Llama 3.1, 3.2 and 3.3 scale with; a GGUF of llama.cpp's converter does not say it.
LOW, HIGH, ORIGINAL = 1.0, 4.0, 8192
#: Largest relative difference between stored factors and those of the scaling that they are taken for.
CLOSE = 1e-5


def read_architecture(
    metadata: Mapping[str, Any], tensors: Mapping[str, FileTensor], factors: "np.ndarray | None", source: Any
) -> Architecture:
    """The architecture that metadata and the tensors' shapes describe.

    Args:
        factors: the tensor ROPE_FACTORS, where there is one.

    Raises:
        CheckpointError: a size is missing or contradicts another or the tensors, or the model does something that is
            not read.
    """
    name, entry = entry_of(metadata, source)

    def value(key: str) -> Any:
        return metadata.get(f"{name}.{key}")

    embedding = tensors.get(OUTER[EMBEDDING])
    head, rotated = _head_sizes(value)
    fields = {
        **{ours: value(theirs) for ours, theirs in SIZES.items()},
        "vocab_size": embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else None,
        "layernorm_epsilon": shortest(value(entry.norm_eps)),
        "rotary_base": shortest(10000.0 if value(ROPE_BASE) is None else value(ROPE_BASE)),
        "rotary_percent": rotated / head if entry.partial_rotary and head and rotated else 1.0,
        "add_bias_linear": entry.biases and f"{LAYERS}0.ffn_down.bias" in tensors,
        "share_embeddings_and_output_weights": OUTER[OUTPUT] not in tensors,
        "rope_scaling": _scaling(name, metadata, factors, head, source),
        **entry.fixed,
    }
    made = untrusted.architecture(entry.family, fields, source)
    _check_sizes(made, name, value, tensors, source)
    window = value(WINDOW)
    if window is not None and not (type(window) is int and window >= made.seq_length):
        raise CheckpointError(f"{source}: {name}.{WINDOW} = {shown(window)} is not something a {name} model here does")
    return made


def entry_of(metadata: Mapping[str, Any], source: Any) -> tuple[str, GgufArchitecture]:
    """The architecture's name, and its entry in the table."""
    name = metadata.get(ARCHITECTURE)
    if isinstance(name, str) and name in NOT_YET:
        raise CheckpointError(
            f"{source}: {NOT_YET[name]}: not yet; of the family {name} nothing is read, read from GGUF are "
            f"{', '.join(ARCHITECTURES)}"
        )
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{source} holds a model of the family {shown(name)}; read from GGUF are {', '.join(ARCHITECTURES)}"
        )
    return name, ARCHITECTURES[name]


def _head_sizes(value: Any) -> tuple[int, int]:
    """Size of a head, and how much of it is rotated, 0 where that cannot be said; checked by their users."""
    key, hidden, heads, rotated = (value(name) for name in (SIZES["kv_channels"], "embedding_length",
                                                           SIZES["num_attention_heads"], ROTATED))  # fmt: skip
    if key is None and all(type(size) is int and size > 0 for size in (hidden, heads)):
        key = hidden // heads
    head = key if type(key) is int and key > 0 else 0
    return head, head if rotated is None else rotated if type(rotated) is int and rotated > 0 else 0


def _check_sizes(a: Architecture, name: str, value: Any, tensors: Mapping[str, FileTensor], source: Any) -> None:
    """Holds what is stated against what is there, before any tensor is read."""
    stored = {key: tensor for key, tensor in tensors.items() if key != ROPE_FACTORS}
    layers = {key.split(".")[1] for key in stored if key.startswith(LAYERS)}
    rotated = round(a.rotary_percent * a.kv_channels)
    pairs = {
        f"{name}.block_count": (a.num_layers, len(layers)),
        f"columns of {OUTER[EMBEDDING]}": (a.hidden_size, stored[OUTER[EMBEDDING]].shape[1]),
        "parameters": (a.parameters(), sum(math.prod(tensor.shape) for tensor in stored.values())),
        f"{name}.{VALUE_SIZE}": (a.kv_channels, _or(value(VALUE_SIZE), a.kv_channels)),
        f"{name}.{ROTATED}": (rotated, _or(value(ROTATED), rotated)),
    }
    wrong = [f"{what}: {said} by its description, {shown(there)} found"
             for what, (said, there) in pairs.items() if said != there]  # fmt: skip
    if wrong:
        raise CheckpointError(f"{source} contradicts itself: {'; '.join(wrong)}")


def _or(value: Any, otherwise: int) -> Any:
    return otherwise if value is None else value


def shortest(value: Any) -> Any:
    """The shortest decimal number that is the same float32: metadata hold 1e-05 as 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) and math.isfinite(np.float32(value)) else value


def _scaling(
    name: str, metadata: Mapping[str, Any], factors: "np.ndarray | None", head: int, source: Any
) -> RopeScaling | None:
    """The scaling of the rotary frequencies, worked out of its factors; raises CheckpointError where it is another."""
    import numpy as np

    stated = metadata.get(f"{name}.{SCALING}.type")
    other = metadata.get(f"{name}.rope.scale_linear", 1.0)
    if stated not in (None, "none") or other != 1.0:
        said = stated if isinstance(stated, str) else "linear"
        raise CheckpointError(_not_read(f"{source} scales its rotary frequencies ({said[:40]})"))
    if factors is None:
        return None
    keys = {"low_freq_factor": LOW, "high_freq_factor": HIGH, "original_context_length": ORIGINAL}
    values = {key: metadata.get(f"{name}.{SCALING}.{key}", default) for key, default in keys.items()}
    sane = all(isinstance(value, int | float) and 0 < value < untrusted.LARGEST for value in values.values())
    if sane and ARCHITECTURES[name].rope_factors and np.isfinite(factors).all() and factors.max(initial=0) > 1:
        low, high, original = (shortest(value) for value in values.values())
        made = RopeScaling(
            factor=shortest(float(factors.max())),
            low_freq_factor=low,
            high_freq_factor=high,
            original_length=int(original),
        )
        base = metadata.get(f"{name}.{ROPE_BASE}", 10000.0)
        if low < high and isinstance(base, float) and base > 0 and 2 * len(factors) == head:
            expected = rope_factors(made, shortest(base), head)
            if np.allclose(factors, expected, rtol=CLOSE, atol=0):
                return made
    raise CheckpointError(_not_read(f"{source} scales its rotary frequencies ({ROPE_FACTORS}), not as Llama 3.1 does"))


def _not_read(what: str) -> str:
    return f"{what}, which is not read from GGUF: take the model in safetensors, hf://org/name"


def rope_factors(scaling: RopeScaling, base: float, head: int) -> "np.ndarray":
    """What each rotary frequency is divided by, float32 [d / 2]: 1 for waves shorter than the original length over
    high_freq_factor, `factor` for those longer than it over low_freq_factor, in between in proportion (Llama 3.1)."""
    import numpy as np

    waves = 2 * math.pi * base ** (np.arange(0, head, 2) / head)  # [d / 2], in tokens
    share = (scaling.original_length / waves - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    share = share.clip(0, 1)
    return (1 / ((1 - share) / scaling.factor + share)).astype(np.float32)


def check(a: Architecture) -> None:
    """Raises CheckpointError where llama.cpp has no architecture that computes what the model does."""
    name = architecture_of(a.family)
    if name is None:
        problems = [f"llama.cpp's table here has no family {a.family}"]
    else:
        problems = _not_expressible(a, name, ARCHITECTURES[name])
    if problems:
        raise CheckpointError(f"{a.describe()} cannot be written as GGUF: {'; '.join(problems)}")


def _not_expressible(a: Architecture, name: str, entry: GgufArchitecture) -> list[str]:
    fixed = {"add_qkv_bias": False, "qk_layernorm": False, "layernorm_zero_centered_gamma": False, **entry.fixed}
    problems = [
        f"{field} is {getattr(a, field)}, llama.cpp's {name} has {value}"
        for field, value in fixed.items()
        if getattr(a, field) != value
    ]
    if a.add_bias_linear and not entry.biases:
        problems.append(f"llama.cpp's {name} has no biases in its linear layers")
    if a.rotary_percent != 1.0 and not entry.partial_rotary:
        problems.append(f"llama.cpp's {name} has no partial rotary embedding")
    if a.rope_scaling is not None and not entry.rope_factors:
        problems.append(f"llama.cpp's {name} has no rope scaling here")
    if a.sliding_window is not None and a.sliding_window < a.seq_length:
        problems.append(
            f"llama.cpp's {name} has no sliding window, and this one's, {a.sliding_window} tokens, is shorter than its "
            f"sequence length {a.seq_length}"
        )
    query = a.num_attention_heads * a.kv_channels
    if query != a.hidden_size and not entry.free_heads:
        problems.append(
            f"llama.cpp loads no {name} whose heads {a.num_attention_heads} x head size {a.kv_channels} = {query} are "
            f"not the hidden size {a.hidden_size}; prune its heads or its hidden size so that they are"
        )
    if entry.in_turns and a.kv_channels % 2:
        problems.append(f"heads of the odd size {a.kv_channels} have no halves")
    return problems


def write_metadata(a: Architecture, called: str) -> dict[str, Any]:
    """Metadata of a model, without its tokenizer.

    Args:
        called: the model's name.
    """
    name = architecture_of(a.family)
    assert name is not None, "check() lets no other family pass"
    entry = ARCHITECTURES[name]
    scaling = a.rope_scaling
    stated = {
        **{theirs: getattr(a, ours) for ours, theirs in SIZES.items()},
        VALUE_SIZE: a.kv_channels,
        ROTATED: round(a.rotary_percent * a.kv_channels),
        ROPE_BASE: float(a.rotary_base),
        entry.norm_eps: float(a.layernorm_epsilon),
        "vocab_size": a.vocab_size - a.vocab_padding,
    }
    if scaling is not None:  # llama.cpp computes with the factors; these say how they were made
        stated |= {
            f"{SCALING}.original_context_length": scaling.original_length,
            f"{SCALING}.low_freq_factor": float(scaling.low_freq_factor),
            f"{SCALING}.high_freq_factor": float(scaling.high_freq_factor),
        }
    general = {ARCHITECTURE: name, "general.type": "model", "general.name": called}
    return general | {f"{name}.{key}": value for key, value in stated.items()}
