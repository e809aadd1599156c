"""How far what was written is from what it was made from, layer by layer, and whether rounding explains it.

A linear layer computes W x. What was written computes (q s) (p x'), where q are the stored numbers, s their scales, p
the scale of the input, and x' = r x where the export folded a scale into the norm before the layer. So W is to be
compared with q s p r, and q s with W / (p r), which is what was rounded:

    |q s - W / (p r)| <= half a step of the format at q + what roundings to bf16 on the way add

FP8 (e4m3, 3 bits of mantissa, smallest step 2^-9): half a step is s max(2^-4 |q|, 2^-10). Integers: s / 2.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.checkpoints.formats.huggingface.mapping import export_tensors
from nemo_minitron.checkpoints.formats.huggingface.quantized import FP8, GROUP
from nemo_minitron.config import QuantizeConfig
from nemo_minitron.errors import EngineError
from nemo_minitron.quantization import dequantize
from nemo_minitron.quantization.dequantize import Linear, Plain

if TYPE_CHECKING:
    import torch

#: Largest relative error of rounding to bf16 (8 bits of mantissa).
BF16 = 2.0**-9
#: Roundings to bf16 between the source's weight and what is quantised: of the source, of the scale of the input, of its
#: product with the weight, of the mean of the scales of layers that share an input, of the quotient; and one to spare.
ROUNDINGS = 6
#: Values that are compared at once.
CHUNK = 1 << 23


@dataclasses.dataclass(kw_only=True)
class Report:
    """What a comparison found.

    Attributes:
        linears: per layer: relative error, |written - source| / |source| (Frobenius), and `step`, the largest distance
            in units of what rounding explains.
        plain: tensors that were written without quantisation, and equal the source rounded to bf16.
    """

    linears: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    plain: int = 0
    squares: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])

    @property
    def error(self) -> float:
        """Relative error over all quantised layers together."""
        return math.sqrt(self.squares[0] / self.squares[1]) if self.squares[1] else 0.0

    @property
    def worst_step(self) -> float:
        return max((entry["step"] for entry in self.linears), default=0.0)

    def table(self) -> str:
        """Relative error by kind of layer, as text."""
        parts = dict.fromkeys(entry["part"] for entry in self.linears)
        lines = [("linear layer", "mean error", "largest", "in layer")]
        for part in parts:
            entries = [entry for entry in self.linears if entry["part"] == part]
            worst = max(entries, key=lambda entry: entry["error"])
            mean = sum(entry["error"] for entry in entries) / len(entries)
            lines.append((part, f"{mean:.2%}", f"{worst['error']:.2%}", str(worst["layer"])))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))])
            for line in lines
        )


def compare(source: Checkpoint, folder: Path, config: QuantizeConfig) -> Report:
    """Reads back what was written to `folder` and compares all of it with the source.

    Raises:
        EngineError: something is missing, or further from the source than rounding explains.
    """
    expected, report = export_tensors(source.tensors, source.architecture), Report()
    if config.export == "trtllm":
        dequantize.check_engine_config(folder, source.architecture, config.tp_size, config.pp_size)
        ranks = dequantize.Ranks(a=source.architecture, tp=config.tp_size, pp=config.pp_size, expected=expected)
        for _, linears, plain in dequantize.from_tensorrt_llm(folder, config.qformat, GROUP, ranks):
            _compare(linears, plain, False, report, config.qformat)
    elif config.qformat == "bf16":
        _compare([], dequantize.from_plain(folder, expected), False, report, config.qformat)
    else:
        linears, plain = dequantize.from_huggingface(folder, expected)
        _compare(linears, plain, source.architecture.layernorm_zero_centered_gamma, report, config.qformat)
    return report


def _compare(linears: list[Linear], plain: Mapping[str, Plain], minus_one: bool, report: Report, qformat: str) -> None:
    """Compares the tensors of a file. `minus_one`: norms are stored with 1 taken off."""
    folded = _folded_norms(linears, plain, minus_one)
    for name, tensor in plain.items():
        if name.rsplit(".", 1)[0] in folded:
            continue
        if not _equal(tensor):
            raise EngineError(f"{tensor.name} is not the source's, rounded to bf16: the {qformat} export went wrong")
        report.plain += 1
    for linear in linears:
        error = measure(linear, *folded.get(linear.norm or "", (None, 0.0)))
        if not error["step"] <= 1.0:
            raise EngineError(
                f"{linear.name} came out of the {qformat} export {error['step']:.3g} times as far from the source as "
                f"rounding explains (relative error {error['error']:.2%}): nothing was kept; please report it with "
                "`minitron inspect` of the source"
            )
        report.squares[0] += error.pop("squared_error")
        report.squares[1] += error.pop("squared_source")
        report.linears.append({"name": linear.name, "layer": linear.layer, "part": linear.part, **error})


def _equal(tensor: Plain) -> bool:
    """Whether it is the source's, rounded to bf16, bit for bit."""
    import torch

    target, stored = tensor.target().to(torch.bfloat16), tensor.stored.read()
    if tensor.part_of_rows is not None:
        first = tensor.part_of_rows * stored.shape[0]
        part = target[first : first + stored.shape[0]]
        if stored[part.shape[0] :].count_nonzero():
            return False
        target, stored = part, stored[: part.shape[0]]
    return stored.dtype == torch.bfloat16 and torch.equal(stored, target)


def _folded_norms(
    linears: list[Linear], plain: Mapping[str, Plain], minus_one: bool
) -> "dict[str, tuple[torch.Tensor, torch.Tensor]]":
    """Norms that are not the source's -> what their output is multiplied by [h], and its relative uncertainty [h].

    Raises:
        EngineError: a norm's bias was not multiplied by the same.
    """
    import torch

    folded = {}
    for norm in {linear.norm for linear in linears if linear.norm}:
        weight = plain[f"{norm}.weight"]
        if _equal(weight):
            continue
        before, after = weight.target().to(torch.bfloat16).float(), weight.stored.read().float()
        one = 1.0 if minus_one else 0.0
        ratio = (after + one) / (before + one)
        uncertain = 2 * BF16 * (1 + after.abs() / (after + one).abs())
        bias = plain.get(f"{norm}.bias")
        if bias is not None:
            expected = bias.target().to(torch.bfloat16).float() * ratio
            away = (bias.stored.read().float() - expected).abs()
            if not bool((away <= (uncertain + 4 * BF16) * expected.abs() + 1e-30)[ratio.isfinite()].all()):
                raise EngineError(f"{norm}: weight and bias were scaled differently: the export went wrong")
        folded[norm] = (ratio, uncertain)
    return folded


def measure(
    linear: Linear, ratio: "torch.Tensor | None" = None, uncertain: "torch.Tensor | float" = 0.0
) -> dict[str, float]:
    """Relative error of a quantised layer, and its largest distance in units of what rounding explains.

    Args:
        ratio: what the layer's input is multiplied by in the norm before it [i].
        uncertain: how well that is known [i], relative.
    """
    import torch

    target, packed = linear.target().float(), linear.packed
    if tuple(target.shape) != packed.shape:
        return {"error": math.inf, "step": math.inf, "squared_error": math.inf, "squared_source": 1.0}
    before = packed.read_before()
    factor = torch.ones(target.shape[1]) if before is None else before
    factor = factor if ratio is None else factor * ratio
    known = factor.isfinite() & (factor > 0)  # a norm of 0 lets nothing through, whatever the weight
    slack = ROUNDINGS * BF16 + uncertain
    sums, worst = [0.0, 0.0], 0.0
    step = max(1, CHUNK // target.shape[1])
    for first in range(0, target.shape[0], step):
        wanted = target[first : first + step]
        numbers, scales = packed.read_rows(first, first + wanted.shape[0])
        values, ideal = numbers * scales, wanted / factor
        half = (numbers.abs() * 2.0**-4).clamp(min=2.0**-10) * scales if packed.algorithm == FP8 else scales / 2
        steps = ((values - ideal).abs() / (half + slack * ideal.abs()))[:, known]
        if not bool(steps.isfinite().all()):
            worst = math.inf
        worst = max(worst, float(steps.max()))
        sums[0] += float(((values * factor - wanted)[:, known].double() ** 2).sum())
        sums[1] += float((wanted[:, known].double() ** 2).sum())
    error = math.sqrt(sums[0] / sums[1]) if sums[1] else (math.inf if sums[0] else 0.0)
    return {"error": error, "step": worst, "squared_error": sums[0], "squared_source": sums[1]}
