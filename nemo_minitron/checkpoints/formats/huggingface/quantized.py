"""Hugging Face directories that ModelOpt quantised: told by their configuration, read as the tensors they stand for.

What a linear layer's tensors mean (o output rows, i input columns, g group size), as ModelOpt 0.43 writes them:

========================  =====================  ====================  ==============================================
quant_algo                weight                 weight_scale s        value of row r, column c
========================  =====================  ====================  ==============================================
``FP8``                   float8_e4m3fn [o, i]   []                    q[r, c] * s
``W8A8_SQ_PER_CHANNEL``   int8 [o, i]            [o]                   q[r, c] * s[r] * p[c]
``W4A16_AWQ``             uint8 [o / 2, i]       [o, i / g]            q[r, c] * s[r, c / g] * p[c]
========================  =====================  ====================  ==============================================

Of W4A16_AWQ a byte holds two signed 4-bit numbers: of row 2k in its lower half and of row 2k + 1 in its upper. p is
``pre_quant_scale`` [i], which multiplies the layer's input; where it is not stored, it is 1, or was folded into the
norm before the layer, which is then a different norm from the one that the model was trained with. ``input_scale`` and
the scales of the KV cache round activations: they belong to the server and are left out here, so that what is read has
the rounding of the weights in it and not that of the activations.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.formats.base import Quantization
from nemo_minitron.checkpoints.tensors import BLOCK, Lazy, Runs, bytes_of, in_blocks
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FP8, INT8_SQ, INT4_AWQ = "FP8", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ"
#: quant_algo -> dtype of the stored weights.
STORED = {FP8: "float8_e4m3fn", INT8_SQ: "int8", INT4_AWQ: "uint8"}
CONFIG_KEY, SIDE_FILE = "quantization_config", "hf_quant_config.json"
GROUP = 128
WEIGHT, SCALE, PRE_SCALE = ".weight", ".weight_scale", ".pre_quant_scale"
#: Of activations: not part of the weights.
ACTIVATIONS = (".input_scale", ".k_scale", ".v_scale", ".output_scale")
PLAIN = ("bfloat16", "float16", "float32")


def recognise(config: Mapping[str, Any], beside: Mapping[str, Any] | None, source: str | Path) -> Quantization | None:
    """The quantisation that config.json, or hf_quant_config.json beside it, states; None for plain weights.

    Raises:
        CheckpointError: the weights are quantised in a way that is not known here.
    """
    stated = config.get(CONFIG_KEY)
    side = beside.get("quantization") if isinstance(beside, Mapping) else None
    if stated in (None, {}) and side is None:
        return None
    stated, side = (entry if isinstance(entry, Mapping) else {} for entry in (stated, side))
    method = stated.get("quant_method", "modelopt" if side else "unnamed")
    algorithm = stated.get("quant_algo") or side.get("quant_algo")
    if method != "modelopt" or not isinstance(algorithm, str) or algorithm not in STORED:
        what = f"{method}, {algorithm}" if isinstance(algorithm, str) else str(method)
        raise CheckpointError(
            f"{source}: the weights are quantised ({what[:80]}); known here are ModelOpt's {', '.join(STORED)}; "
            "give the model in bf16, fp16 or fp32"
        )
    group = side.get("group_size", GROUP) if algorithm == INT4_AWQ else None
    if group is not None and (type(group) is not int or group < 1):
        raise CheckpointError(f"{source}: group_size of the quantised weights is no size")
    cache, maker = side.get("kv_cache_quant_algo"), (beside or stated).get("producer")
    return Quantization(
        algorithm=algorithm,
        group_size=group,
        kv_cache=cache[:40] if isinstance(cache, str) else None,
        producer=_producer(maker),
    )


def _producer(stated: Any) -> str:
    """Who quantised it, with the version where that is stated."""
    if isinstance(stated, Mapping) and all(isinstance(stated.get(key), str) for key in ("name", "version")):
        return f"{stated['name']} {stated['version']}"[:80]
    return "modelopt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """The stored tensors of one quantised linear layer.

    Attributes:
        weight: the quantised numbers.
        scale: see the head of this file.
        before: pre_quant_scale, or None.
    """

    algorithm: str
    weight: Runs
    scale: Runs
    before: Runs | None
    group_size: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return (2 * rows if self.algorithm == INT4_AWQ else rows), columns

    def problem(self) -> str | None:
        """What is wrong with the shapes and dtypes, or None."""
        if len(self.weight.shape) != 2 or self.weight.dtype != STORED[self.algorithm]:
            return (
                f"its weight is {self.weight.dtype} {self.weight.shape}, {self.algorithm} has {STORED[self.algorithm]}"
            )
        rows, columns = self.shape
        expected: dict[str, tuple[tuple[int, ...], ...]] = {FP8: ((), (1,)), INT8_SQ: ((rows,), (rows, 1))}
        if self.algorithm == INT4_AWQ:
            group = self.group_size or GROUP
            if columns % group:
                return (
                    f"its {columns} columns do not divide into groups of {group}; ModelOpt packs such a "
                    "layer with scales that do not belong to its columns"
                )
            expected[INT4_AWQ] = ((rows, columns // group),)
        if self.scale.shape not in expected[self.algorithm] or self.scale.dtype not in PLAIN:
            return f"its scale is {self.scale.dtype} {self.scale.shape}, not {expected[self.algorithm][0]}"
        if self.before is not None and (self.before.shape != (columns,) or self.before.dtype not in PLAIN):
            return f"its pre_quant_scale is {self.before.shape}, not {(columns,)}"
        return None

    def read_rows(self, first: int, last: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """Numbers q and scales of rows first..last, both fp32 [rows, i]; the scales without pre_quant_scale."""
        if self.algorithm == INT4_AWQ:
            from_byte, to_byte = first // 2, -(-last // 2)
            numbers = unpack_int4(self.weight.rows(from_byte, to_byte).read())[first - 2 * from_byte :][: last - first]
            scales = self.scale.rows(first, last).read().float().repeat_interleave(self.group_size or GROUP, dim=1)
        else:
            numbers = self.weight.rows(first, last).read().float()
            if self.algorithm == FP8:
                scales = dataclasses.replace(self.scale, shape=(1, 1)).read().float().expand_as(numbers)
            else:
                scales = self.scale.rows(first, last).read().float().reshape(-1, 1).expand_as(numbers)
        return numbers, scales

    def read_before(self) -> "torch.Tensor | None":
        """pre_quant_scale in fp32 [i], or None."""
        return None if self.before is None else self.before.read().float()


def unpack_int4(packed: "torch.Tensor") -> "torch.Tensor":
    """Signed 4-bit numbers in fp32 [o, i] from bytes [o / 2, i]: a byte's lower half is the upper of its two rows."""
    import torch

    halves = torch.stack((packed & 0x0F, packed.view(torch.uint8) >> 4), dim=1).to(torch.int8)  # [o / 2, 2, i]
    return torch.where(halves > 7, halves - 16, halves).float().reshape(-1, packed.shape[1])


@dataclasses.dataclass(frozen=True)
class Dequantized(Lazy):
    """Rows first..last of a quantised linear layer as plain numbers, made some rows at a time."""

    packed: Packed
    dtype: str
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.last - self.first, self.packed.shape[1]

    def rows(self, first: int, last: int) -> "Dequantized":
        """Rows first..last of these, the last one not included."""
        return Dequantized(self.packed, self.dtype, self.first + first, self.first + last)

    def blocks(self, buffer: memoryview, check: bool = True) -> Iterator[memoryview]:
        import torch

        before = self.packed.read_before()
        step = max(1, min(BLOCK, len(buffer)) // (4 * self.packed.shape[1]))
        for start in range(self.first, self.last, step):
            numbers, scales = self.packed.read_rows(start, min(start + step, self.last))
            values = numbers * scales if before is None else numbers * scales * before
            plain = values.to(getattr(torch, self.dtype)).contiguous()
            yield from in_blocks(bytes_of(plain), len(buffer))


def packed_layers(stored: Mapping[str, Runs], quantization: Quantization, where: Path | str) -> dict[str, Packed]:
    """Name of each quantised linear layer -> its tensors, checked.

    Raises:
        CheckpointError: a tensor is missing or of another shape than the format has.
    """
    layers = {}
    for name in stored:
        if not name.endswith(SCALE):
            continue
        layer = name.removesuffix(SCALE)
        weight = stored.get(f"{layer}{WEIGHT}")
        if weight is None:
            raise CheckpointError(f"{where} has {name}, but no {layer}{WEIGHT}")
        layers[layer] = Packed(
            algorithm=quantization.algorithm,
            weight=weight,
            scale=stored[name],
            before=stored.get(f"{layer}{PRE_SCALE}"),
            group_size=quantization.group_size,
        )
        problem = layers[layer].problem()
        if problem:
            raise CheckpointError(f"{where}: {layer} is not what {quantization.algorithm} stores: {problem}")
    return layers


def dequantized(
    stored: Mapping[str, Runs], quantization: Quantization, where: Path | str, dtype: str | None = None
) -> dict[str, Lazy]:
    """Every tensor by its name, those of quantised layers as the plain numbers that they stand for.

    Args:
        dtype: of the layers that were quantised; None: that of the tensors that were not.

    Raises:
        CheckpointError: a quantised tensor has no scale, or shapes do not fit.
    """
    layers = packed_layers(stored, quantization, where)
    dtype = dtype or next((tensor.dtype for tensor in stored.values() if tensor.dtype == "bfloat16"), None)
    dtype = dtype or next((tensor.dtype for tensor in stored.values() if tensor.dtype == "float16"), "float32")
    plain: dict[str, Lazy] = {}
    for name, tensor in stored.items():
        layer = name.removesuffix(WEIGHT)
        if name.endswith((SCALE, PRE_SCALE, *ACTIVATIONS)):
            continue
        if name.endswith(WEIGHT) and layer in layers:
            plain[name] = Dequantized(layers[layer], dtype, 0, layers[layer].shape[0])
        elif tensor.dtype not in PLAIN:
            raise CheckpointError(f"{where}: {name} is {tensor.dtype} and has no scale beside it; copy it again")
        else:
            plain[name] = tensor
    return plain
