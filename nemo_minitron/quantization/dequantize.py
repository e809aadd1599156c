"""What was written, read again from disk: each linear layer as numbers and scales, beside the source's rows for it.

Legend: o output rows, i input columns of a linear layer; h hidden, n heads, g query groups, d head size.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.file_bytes import whole
from nemo_minitron.checkpoints.formats.huggingface import quantized
from nemo_minitron.checkpoints.formats.huggingface.directory import stored_quantized, stored_tensors
from nemo_minitron.checkpoints.formats.huggingface.quantized import Packed
from nemo_minitron.checkpoints.storage import safetensors as safetensors_file
from nemo_minitron.checkpoints.tensors import Lazy, Runs
from nemo_minitron.errors import EngineError

if TYPE_CHECKING:
    import torch

#: Norm in a Hugging Face layer -> the linear layers that read it.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
EMBEDDING, HEAD = "transformer.vocab_embedding.weight", "lm_head.weight"
ALGORITHMS = {"fp8": quantized.FP8, "int8_sq": quantized.INT8_SQ, "int4_awq": quantized.INT4_AWQ}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A quantised linear layer, or a rank's part of one.

    Attributes:
        name: what it is called, for messages.
        layer: number of the transformer layer.
        part: what it is inside a layer (`mlp.down_proj`).
        packed: what was written.
        target: the source's numbers for it [o, i], read when asked for.
        norm: the norm whose output it reads, where the export may have folded scales into it.
    """

    name: str
    layer: int
    part: str
    packed: Packed
    target: "Callable[[], torch.Tensor]"
    norm: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """A tensor that was written without quantisation, and the source's numbers for it, before rounding to bf16.

    Attributes:
        part_of_rows: the tensor is this rank's part of the target's rows, with rows of zeros below the last.
    """

    name: str
    stored: Lazy
    target: "Callable[[], torch.Tensor]"
    part_of_rows: int | None = None


def from_huggingface(folder: Path, expected: Mapping[str, Lazy]) -> tuple[list[Linear], dict[str, Plain]]:
    """Linear layers and other tensors of a quantised Hugging Face directory.

    Args:
        expected: Hugging Face name -> tensor of the source.

    Raises:
        EngineError: tensors are missing or left over.
    """
    stored, quantization = stored_quantized(folder)
    layers = quantized.packed_layers(stored, quantization, folder)
    plain = quantized.dequantized(stored, quantization, folder)
    if plain.keys() != expected.keys():
        odd = sorted(plain.keys() ^ expected.keys())
        raise EngineError(f"{folder}: the export does not hold the model's tensors; missing or left over: {odd[:6]}")
    linears = []
    for name, packed in layers.items():
        number, part = name.removeprefix("model.layers.").split(".", 1)
        norm = next((f"model.layers.{number}.{norm}" for norm, parts in READERS.items() if part in parts), None)
        target = expected[f"{name}.weight"]
        linears.append(Linear(name=name, layer=int(number), part=part, packed=packed, target=target.read, norm=norm))
    others = {
        name: Plain(name=name, stored=tensor, target=expected[name].read)
        for name, tensor in plain.items()
        if name.removesuffix(".weight") not in layers
    }
    return linears, others


def from_plain(folder: Path, expected: Mapping[str, Lazy]) -> dict[str, Plain]:
    """Every tensor of a Hugging Face directory without quantisation; raises EngineError as from_huggingface does."""
    stored = stored_tensors(folder)
    if stored.keys() != expected.keys():
        odd = sorted(stored.keys() ^ expected.keys())
        raise EngineError(f"{folder}: the export does not hold the model's tensors; missing or left over: {odd[:6]}")
    return {name: Plain(name=name, stored=tensor, target=expected[name].read) for name, tensor in stored.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where a TensorRT-LLM checkpoint keeps the parts of the source: rank = pipeline rank x tp + tensor rank.

    Attributes:
        expected: Hugging Face name -> tensor of the source.
    """

    a: Architecture
    tp: int
    pp: int
    expected: Mapping[str, Lazy]

    def _rows(self, name: str, rank: int) -> "torch.Tensor":
        return self.expected[name].read().chunk(self.tp, dim=0)[rank]

    def _columns(self, name: str, rank: int) -> "torch.Tensor":
        return self.expected[name].read().chunk(self.tp, dim=1)[rank]

    def linears(self, layer: int, rank: int) -> "dict[str, Callable[[], torch.Tensor]]":
        """Name inside a layer -> call that returns the rank's part of the source's weight [o, i]."""
        hf = f"model.layers.{layer}."

        def qkv() -> "torch.Tensor":
            import torch

            return torch.cat([self._rows(f"{hf}self_attn.{part}_proj.weight", rank) for part in "qkv"])

        first = "gate_proj" if self.a.gated_linear_unit else "up_proj"
        weights: dict[str, Callable[[], torch.Tensor]] = {
            "attention.qkv": qkv,
            "attention.dense": lambda: self._columns(f"{hf}self_attn.o_proj.weight", rank),
            "mlp.fc": lambda: self._rows(f"{hf}mlp.{first}.weight", rank),
            "mlp.proj": lambda: self._columns(f"{hf}mlp.down_proj.weight", rank),
        }
        if self.a.gated_linear_unit:
            weights["mlp.gate"] = lambda: self._rows(f"{hf}mlp.up_proj.weight", rank)
        return weights

    def norm(self, name: str) -> "torch.Tensor":
        """A norm's weight as TensorRT-LLM applies it: without the 1 taken off."""
        import torch

        values = self.expected[name].read()
        if name.endswith(".weight") and self.a.layernorm_zero_centered_gamma:
            return values.to(torch.bfloat16).float() + 1.0
        return values

    def others(self, stage: int) -> "dict[str, Callable[[], torch.Tensor]]":
        """Name -> call that returns the source's tensor, of what is not quantised on the ranks of a stage."""
        per_stage = self.a.num_layers // self.pp
        kinds = ("weight", "bias") if self.a.normalization == "LayerNorm" else ("weight",)
        tensors: dict[str, Callable[[], torch.Tensor]] = {}
        for local in range(per_stage):
            hf = f"model.layers.{stage * per_stage + local}."
            for ours, theirs in (
                ("input_layernorm", "input_layernorm"),
                ("post_layernorm", "post_attention_layernorm"),
            ):
                for kind in kinds:
                    tensors[f"transformer.layers.{local}.{ours}.{kind}"] = functools.partial(
                        self.norm, f"{hf}{theirs}.{kind}"
                    )
        if stage == 0:
            tensors[EMBEDDING] = self.expected["model.embed_tokens.weight"].read
        if stage == self.pp - 1:
            for kind in kinds:
                tensors[f"transformer.ln_f.{kind}"] = functools.partial(self.norm, f"model.norm.{kind}")
            head = HEAD if HEAD in self.expected else "model.embed_tokens.weight"
            tensors[HEAD] = self.expected[head].read
        return tensors


def from_tensorrt_llm(
    folder: Path, qformat: str, group_size: int, ranks: Ranks
) -> Iterator[tuple[str, list[Linear], dict[str, Plain]]]:
    """Each rank's file: its name, quantised linear layers, and other tensors.

    Raises:
        EngineError: a tensor of the rank is missing.
    """
    per_stage = ranks.a.num_layers // ranks.pp
    for number in range(ranks.tp * ranks.pp):
        stage, rank = divmod(number, ranks.tp)
        file = f"rank{number}.safetensors"
        stored = safetensors_file.read(whole(folder / file))
        linears, others = [], ranks.others(stage)
        for local in range(per_stage):
            for part, target in ranks.linears(stage * per_stage + local, rank).items():
                name = f"transformer.layers.{local}.{part}"
                if qformat == "bf16":
                    others[f"{name}.weight"] = target
                    continue
                packed = _packed(stored, name, qformat, group_size, folder / file)
                layer = stage * per_stage + local
                linears.append(Linear(name=f"{file}: {name}", layer=layer, part=part, packed=packed, target=target))
        missing = sorted(others.keys() - stored.keys())
        if missing:
            raise EngineError(f"{folder / file} lacks {', '.join(missing[:6])}: the export is not whole")
        plain = {
            name: Plain(
                name=f"{file}: {name}",
                stored=stored[name],
                target=target,
                part_of_rows=rank if name in (EMBEDDING, HEAD) else None,
            )
            for name, target in others.items()
        }
        yield file, linears, plain


def _packed(stored: Mapping[str, Runs], name: str, qformat: str, group_size: int, where: Path) -> Packed:
    try:
        weight, scale = stored[f"{name}.weight"], stored[f"{name}.weights_scaling_factor"]
    except KeyError as error:
        raise EngineError(f"{where} lacks {error.args[0]}: the export is not whole") from None
    if qformat == "int4_awq":  # the same bytes, called signed
        weight = dataclasses.replace(weight, dtype="uint8")
    packed = Packed(
        algorithm=ALGORITHMS[qformat],
        weight=weight,
        scale=scale,
        before=stored.get(f"{name}.prequant_scaling_factor"),
        group_size=group_size,
    )
    if problem := packed.problem():
        raise EngineError(f"{where}: {name}: {problem}")
    return packed


def check_engine_config(folder: Path, a: Architecture, tp: int, pp: int) -> None:
    """Compares config.json of a TensorRT-LLM checkpoint with the model.

    Raises:
        EngineError: a size, the mapping or the positions are not the model's.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    expected = {
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_size": a.kv_channels,
        "rotary_base": a.rotary_base,
        "rotary_pct": a.rotary_percent,
    }
    wrong = [
        f"{name} is {config.get(name)}, not {value}" for name, value in expected.items() if config.get(name) != value
    ]
    mapping = {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}
    if {name: config.get("mapping", {}).get(name) for name in mapping} != mapping:
        wrong.append(f"mapping is {config.get('mapping')}, not {mapping}")
    if a.rope_scaling is not None and (config.get("rotary_scaling") or {}).get("factor") != a.rope_scaling.factor:
        wrong.append(f"rotary_scaling is {config.get('rotary_scaling')}, not {a.rope_scaling}")
    if wrong:
        raise EngineError(f"{folder}/config.json is not of this model: {'; '.join(wrong)}")
