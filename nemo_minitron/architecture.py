"""Architecture: the family and sizes of a dense GPT-like model, its parameter counts and its legal pruning grid.

Legend: l layers, h hidden, f FFN, n attention heads, g query groups, d head size, v vocabulary rows.
"""

import dataclasses
import math
import typing
from collections.abc import Sequence
from typing import Any, Protocol

from nemo_minitron.config import Config, all_problems, at_least, one_of
from nemo_minitron.errors import ConfigError

FAMILIES = ("llama", "mistral", "nemotron", "qwen2", "qwen3", "gpt")
PRUNABLE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
#: Fields that have the same name in the configurations of Megatron's models, NeMo's and Bridge's.
SAME_IN_MEGATRON = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "seq_length", "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "gated_linear_unit",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "share_embeddings_and_output_weights", "rotary_base",
    "rotary_percent", "init_method_std",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling(Config):
    """Llama 3.1's scaling of the rotary frequencies (NeMo's names: scale_factor, old_context_len...)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture(Config):
    """Sizes and kinds of a dense decoder-only transformer, in Megatron's terms.

    `kv_channels` is the size of one head and is kept when the width is pruned, so it is stated and never computed
    from hidden_size / num_attention_heads once it is known. `vocab_size` counts the rows of the embedding matrix,
    padding included; the last `vocab_padding` of them belong to no token. `sliding_window` is how many tokens back a
    token attends (Mistral 7B v0.1); None: all of them. `qk_layernorm`: each head's query and key are normalised before
    they are rotated, with gains of head size that all heads share (Qwen 3).
    """

    family: str = "llama"
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int = None  # type: ignore[assignment]  # as many as heads, put in below
    kv_channels: int = None  # type: ignore[assignment]  # hidden size over heads, put in below
    vocab_size: int
    seq_length: int = 4096
    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    activation: str = "silu"
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    share_embeddings_and_output_weights: bool = False
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: RopeScaling | None = None
    init_method_std: float = 0.02
    vocab_padding: int = 0
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if self.num_query_groups is None:
            object.__setattr__(self, "num_query_groups", self.num_attention_heads)
        if self.kv_channels is None and self.num_attention_heads:
            object.__setattr__(self, "kv_channels", self.hidden_size // self.num_attention_heads)

    def problems(self) -> list[str]:
        problems = one_of("family", self.family, FAMILIES)
        problems += one_of("normalization", self.normalization, ("RMSNorm", "LayerNorm"))
        problems += one_of("activation", self.activation, ("silu", "gelu", "squared_relu"))
        sizes = {name: getattr(self, name) for name in (*PRUNABLE, "vocab_size", "seq_length", "kv_channels")}
        problems += at_least(1, **sizes, sliding_window=self.sliding_window)
        if not 0 <= self.vocab_padding < self.vocab_size:
            problems.append(
                f"vocab_padding {self.vocab_padding} must be at least 0 and below vocab_size {self.vocab_size}"
            )
        if not problems and self.num_attention_heads % self.num_query_groups:
            problems.append(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_query_groups {self.num_query_groups}"
            )
        return problems

    def embedding_parameters(self) -> int:
        """Parameters of the embedding and the output layer: v*h, twice unless tied."""
        return self.vocab_size * self.hidden_size * (1 if self.share_embeddings_and_output_weights else 2)

    def layer_parameters(self) -> int:
        """Parameters of one transformer layer, norms and biases included."""
        h, f = self.hidden_size, self.ffn_hidden_size
        query, qkv = self.num_attention_heads * self.kv_channels, self.qkv_rows()
        fc1 = f * (2 if self.gated_linear_unit else 1)
        weights = qkv * h + h * query + fc1 * h + h * f + self.norm_parameters()
        biases = (qkv if self.add_bias_linear or self.add_qkv_bias else 0) + (
            h + fc1 + h if self.add_bias_linear else 0
        )
        return weights + biases

    def norm_parameters(self) -> int:
        """Parameters of a layer's norms: 2 h, and 2 d where queries and keys have one; twice with biases."""
        channels = 2 * self.hidden_size + (2 * self.kv_channels if self.qk_layernorm else 0)
        return channels * (2 if self.normalization == "LayerNorm" else 1)

    def qkv_rows(self) -> int:
        """Rows of the fused query-key-value projection: (n + 2g) * d."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    def parameters(self) -> int:
        """All parameters."""
        final_norm = self.hidden_size * (2 if self.normalization == "LayerNorm" else 1)
        return self.embedding_parameters() + self.num_layers * self.layer_parameters() + final_norm

    def non_embedding_parameters(self) -> int:
        """Parameters without embedding and output layer, as the Minitron papers count them."""
        return self.parameters() - self.embedding_parameters()

    def with_sizes(self, **sizes: int | None) -> "Architecture":
        """This architecture with the sizes that are given (not None) replaced; the head size stays."""
        given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
        return dataclasses.replace(self, **given)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Architecture":
        values = dict(values)
        if isinstance(values.get("rope_scaling"), dict):
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return cls(**values)

    @classmethod
    def from_settings(cls, fields: dict[str, Any], source: str) -> "Architecture":
        """The architecture that the setting model.architecture states; raises ConfigError with all its problems.

        Args:
            source: what was being read, for the message.
        """
        wrong = _wrong_kinds(cls, fields, "model.architecture.")
        if wrong:
            raise ConfigError(wrong, source)
        try:
            architecture = cls.from_dict(fields)
        except TypeError as error:
            reason = str(error).removeprefix("Architecture.__init__() ")
            raise ConfigError(f"model.architecture: {reason}", source) from None
        problems = all_problems(architecture, "model.architecture.")
        if problems:
            raise ConfigError(problems, source)
        return architecture

    def describe(self) -> str:
        """One line: sizes and parameter counts."""
        return (
            f"{self.family}, {self.num_layers} layers, hidden {self.hidden_size}, FFN {self.ffn_hidden_size}, "
            f"heads {self.num_attention_heads}/{self.num_query_groups} of {self.kv_channels}, "
            f"vocabulary {self.vocab_size}: {human(self.parameters())} parameters "
            f"({human(self.non_embedding_parameters())} without embeddings)"
        )


#: What a field of that type takes, in words.
KINDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text",
    RopeScaling: "a mapping {factor:...}", type(None): "null",
}  # fmt: skip


def _wrong_kinds(schema: type[Any], fields: dict[str, Any], prefix: str) -> list[str]:
    """A problem for each field whose value is of another kind than the schema's; unknown fields are left alone."""
    problems = []
    optional = {field.name for field in dataclasses.fields(schema) if field.default is None}
    for name, hint in typing.get_type_hints(schema).items():
        if name not in fields:
            continue
        value, kinds = fields[name], {*(typing.get_args(hint) or (hint,))}
        kinds |= {type(None)} if name in optional else set()
        if RopeScaling in kinds and isinstance(value, dict):
            problems += _wrong_kinds(RopeScaling, value, f"{prefix}{name}.")
        elif type(value) not in (kinds | {int} if float in kinds else kinds):
            words = " or ".join(text for kind, text in KINDS.items() if kind in kinds)
            problems.append(f"{prefix}{name} = {value!r} is not {words}")
    return problems


def human(count: float) -> str:
    """A parameter count as people write it: 8.03B, 4.51B, 3.22M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(int(count))


#: Size -> its divisor's least and greatest value where none is given: the least is what tensor cores divide by, the
#: greatest is ModelOpt 0.43's own (get_mcore_minitron_config).
DIVISORS = {"hidden_size": (8, 256), "ffn_hidden_size": (16, 512)}
#: A size has at least so many steps. With 12 the published models keep ModelOpt's divisors, and on every known model,
#: SmolLM2-135M, Llama 3.2 1B and Qwen2.5 0.5B the shape nearest to a share of the parameters above 20 % is off by no
#: more than 5 points; with 8, by 6.
STEPS = 12


def natural_divisor(name: str, size: int) -> int:
    """The divisor of the grid of the size `name`: the largest power of two with at least STEPS steps up to `size`."""
    least, divisor = DIVISORS[name]
    while divisor > least and size < STEPS * divisor:
        divisor //= 2
    return divisor


class Divisors(Protocol):
    """Settings that say which sizes a cut may have; none: natural_divisor."""

    hidden_size_divisor: int | None
    ffn_hidden_size_divisor: int | None
    num_layers_divisor: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningGrid:
    """Sizes that ModelOpt's mcore_minitron can prune a model to: multiples of a divisor, up to the model's own.

    Divisors of widths that are not given follow the model's size (natural_divisor); that of layers is ModelOpt 0.43's.
    ModelOpt silently ignores a target off the grid for one dimension, so targets are checked here before anything is
    loaded.
    """

    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_layers: int = 2

    @classmethod
    def of(cls, settings: "Divisors") -> "PruningGrid":
        """The grid that settings of a cut ask for."""
        return cls(
            hidden_size=settings.hidden_size_divisor,
            ffn_hidden_size=settings.ffn_hidden_size_divisor,
            num_layers=settings.num_layers_divisor,
        )

    def choices(self, architecture: Architecture, name: str) -> list[int]:
        """Legal values of the size `name`, ascending, the model's own last."""
        own, step = getattr(architecture, name), self.step(architecture, name)
        return [*range(step, own, step), own]

    def step(self, architecture: Architecture, name: str) -> int:
        """What the size `name` must be a multiple of."""
        if name == "num_attention_heads":
            return architecture.num_query_groups
        return getattr(self, name) or natural_divisor(name, getattr(architecture, name))

    def problems(self, architecture: Architecture, targets: dict[str, int | None]) -> list[str]:
        """One message for each target that is not on the grid, with the equation that failed and the nearest values."""
        problems = []
        for name, target in targets.items():
            if target is None:
                continue
            own = getattr(architecture, name)
            choices = self.choices(architecture, name)
            if target > own:
                problems.append(f"{name} {target} is above the teacher's {own}: pruning only makes a model smaller")
            elif target not in choices:
                step = self.step(architecture, name)
                below = [value for value in choices if value < target][-1:]
                above = [value for value in choices if value > target][:1]
                nearest = " and ".join(str(value) for value in below + above)
                rule = "multiples of the teacher's query groups, " if name == "num_attention_heads" else "multiples of "
                remainder = f" ({target} mod {step} = {target % step})" if target > 0 else ""
                problems.append(
                    f"{name} {target} is not on the pruning grid: {rule}{step} up to {own}{remainder}; "
                    f"nearest {nearest}"
                )
        return problems


def padded_vocab_size(vocab_size: int, divisible_by: int = 128, tensor_parallel: int = 1) -> int:
    """Rows of the embedding: ceil(v / (m * TP)) * m * TP, Megatron's padding."""
    multiple = divisible_by * tensor_parallel
    return math.ceil(vocab_size / multiple) * multiple


#: Megatron's multiples of a vocabulary, the usual one first, then those of tensor parallel ranks, then smaller ones.
MULTIPLES = (*(128 << shift for shift in range(8)), *(64 >> shift for shift in range(7)))


def vocab_multiple(architecture: Architecture) -> int:
    """The m with ceil(tokens / m) * m rows, which Megatron pads a vocabulary by that is stated without its padding."""
    rows, tokens = architecture.vocab_size, architecture.vocab_size - architecture.vocab_padding
    return next((m for m in MULTIPLES if -(-tokens // m) * m == rows), rows)


def parse_layers(layers: Any) -> list[int]:
    """Layer numbers (1-based) from a list of numbers and ranges: ``[1, "16-31"]`` or ``"16-31"``.

    Raises:
        ValueError: an entry is neither a number nor a range, or a range runs backwards.
    """
    if layers is None:
        return []
    entries = layers if isinstance(layers, list | tuple) else [layers]
    numbers: list[int] = []
    for part in (part for entry in entries for part in str(entry).strip("[] ").split(",")):
        first, dash, last = part.strip().partition("-")
        try:
            start = int(first)
            stop = int(last) if dash else start
        except ValueError:
            raise ValueError(f"{part.strip()!r} is neither a layer number nor a range such as 16-31") from None
        if stop < start:
            raise ValueError(f"the range {part.strip()} runs backwards: write {stop}-{start}")
        numbers += range(start, stop + 1)
    return numbers


def runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Contiguous runs of layers (1-based) as (first, one past the last), 0-based."""
    contiguous: list[tuple[int, int]] = []
    for layer in sorted(layer - 1 for layer in layers):
        if contiguous and contiguous[-1][1] == layer:
            contiguous[-1] = (contiguous[-1][0], layer + 1)
        else:
            contiguous.append((layer, layer + 1))
    return contiguous


def layer_problems(layers: list[int], num_layers: int) -> list[str]:
    """What is wrong with dropping `layers` (1-based) from a model of `num_layers`."""
    problems = []
    outside = sorted({layer for layer in layers if not 1 <= layer <= num_layers})
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if outside:
        problems.append(f"drop_layers {outside} out of range: the teacher's layers are 1 to {num_layers} (1-based)")
    if twice:
        problems.append(f"drop_layers {twice} dropped twice")
    if not problems and len(set(layers)) >= num_layers:
        problems.append(f"drop_layers would drop all {num_layers} layers; at least one must stay")
    return problems
