"""Weights between Megatron models and checkpoints."""

import dataclasses
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints.checkpoint import Checkpoint, write_checkpoint
from nemo_minitron.checkpoints.files import folder_files
from nemo_minitron.checkpoints.formats.base import MegatronFormat, Model
from nemo_minitron.checkpoints.formats.nemo2.classes import PREFIX, WEIGHTS
from nemo_minitron.checkpoints.formats.nemo2.directory import Nemo2
from nemo_minitron.checkpoints.formats.table import FORMATS
from nemo_minitron.checkpoints.names import (
    EXTRA_STATE,
    FINAL_NORM,
    LAYERS,
    NOT_WEIGHTS,
    QK_NORMS,
    by_canonical_name,
    checked,
    prefix_of,
)
from nemo_minitron.checkpoints.storage import torch_dist
from nemo_minitron.checkpoints.tensors import Lazy
from nemo_minitron.checkpoints.tokenizer import Tokenizer
from nemo_minitron.config import output_format
from nemo_minitron.errors import CheckpointError
from nemo_minitron.megatron.config import core_model
from nemo_minitron.megatron.lora import trained_part
from nemo_minitron.megatron.session import spread_layers

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig
    from torch import Tensor

NORM_WEIGHTS = ("layernorm.weight", "layer_norm_weight")
#: Norms of the residual stream, by the end of their weights' names in the local spec.
HIDDEN_NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight", "final_layernorm.weight")
BEFORE_CONVERSION = "megatron"
#: How Megatron saves where the result is of a format that it does not write itself.
NATIVE = Nemo2()


class WeightSource(Protocol):
    """What weights are loaded from: a checkpoint, or a part of one.

    Attributes:
        path: what messages call it.
        tensors: by canonical name.
    """

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, Lazy]: ...


def bare(module: Any) -> "GPTModel":
    """The Megatron model inside its wrappers (Lightning module, DDP, half-precision)."""
    from megatron.core.models.gpt import GPTModel

    while not isinstance(module, GPTModel):
        module = module.module
    return module


def build_model(
    config: "TransformerConfig",
    architecture: Architecture,
    checkpoint: WeightSource | None,
    tokenizer: Any = None,
    **stage: Any,
) -> "GPTModel":
    """The GPTModel of NeMo's (or Megatron Core's) `config` on this rank, with the weights of `checkpoint`.

    Args:
        checkpoint: None: random weights.
        tokenizer: NeMo's, which it asks for a vocabulary that the config does not state.
        stage: of NeMo's configure_model, which stage of the pipeline.
    """
    spread_layers(config)
    built_by_nemo = hasattr(config, "configure_model")
    model = config.configure_model(tokenizer, **stage) if built_by_nemo else core_model(config, architecture)
    if checkpoint is not None:
        load_weights(model, architecture, checkpoint)
    return model


def load_weights(model: "GPTModel", architecture: Architecture, checkpoint: WeightSource, only: str = "") -> None:
    """Loads a checkpoint of any format into a Megatron GPTModel; every rank calls it and reads its own shards.

    Args:
        only: load just what begins so, by the names of sharded checkpoints.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories, apply_factory_merges

    shards = {name: value for name, value in model.sharded_state_dict().items() if name.startswith(only)}
    factories, _ = extract_matching_values(
        shards, lambda value: isinstance(value, ShardedTensorFactory), return_lists_as_dicts=True
    )
    apply_factories(shards)
    read = _ShardReader(checkpoint)
    loaded = apply_factory_merges(dict_list_map_inplace(read, shards), factories)
    state = {name: value for name, value in loaded.items() if value is not None}
    if _gamma_is_shifted(model, architecture):
        state |= {name: value.float() + 1.0 for name, value in state.items() if name.endswith(NORM_WEIGHTS)}
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if name.startswith(only) and not name.endswith(EXTRA_STATE)]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: missing {missing}, left over {result.unexpected_keys}"
        )


def load_strictly(model: Any, checkpoint: Checkpoint) -> None:
    """Loads a checkpoint of a MegatronFormat by Megatron's own reader, with its strictest check; nothing of ours is in
    between.

    What is no weight is neither asked for nor missed: an optimizer's state, and extra states, of which there are other
    ones with each layer spec and version of Megatron and Transformer Engine, and which are pickles besides.

    Raises:
        CheckpointError: Megatron misses a tensor, or finds one too many.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    assert isinstance(checkpoint.kind, MegatronFormat)
    weights = str(checkpoint.path / checkpoint.kind.weights)
    try:
        prefix = prefix_of(dist_checkpointing.load_tensors_metadata(weights), weights)
        metadata = dist_checkpointing.load_content_metadata(weights)  # says which keys: stacked layers or each its own
        shards = model.sharded_state_dict(prefix=prefix, metadata=metadata)
        wanted = {name: value for name, value in shards.items() if not name.endswith(EXTRA_STATE)}
        loaded, *differing = dist_checkpointing.load({"state_dict": wanted}, weights, strict="return_all")
    except (CheckpointingException, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"Megatron does not load {weights}: {error}; verify=tensors converts it without running the model"
        ) from error
    left_over, absent = (sorted(key for key in keys if not NOT_WEIGHTS.search(key)) for keys in differing)
    if left_over or absent:
        raise CheckpointError(f"{weights} does not fit the model: missing {absent}, left over {left_over}")
    state = {name.removeprefix(prefix): value for name, value in loaded["state_dict"].items()}
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith(EXTRA_STATE)]
    if missing or result.unexpected_keys:
        raise CheckpointError(f"{weights} does not fit the model: {missing}, left over {result.unexpected_keys}")
    _shift_gamma(model, checkpoint.architecture, 1.0)


def reload(model: "GPTModel", folder: Path) -> None:
    """Puts the weights of a training checkpoint of this very model back into it; every rank calls it."""
    from megatron.core import dist_checkpointing

    wanted = {"state_dict": trained_part(model.sharded_state_dict(prefix=PREFIX))}
    loaded = dist_checkpointing.load(wanted, str(folder / WEIGHTS))["state_dict"]
    state = {name.removeprefix(PREFIX): value for name, value in loaded.items()}
    result = model.load_state_dict(state, strict=False)
    if result.unexpected_keys:
        raise CheckpointError(f"{folder} does not fit the model: left over {result.unexpected_keys}")


class _ShardReader:
    """Reads what a ShardedTensor asks for; the last tensor is kept, since gate and up are asked for one by one."""

    def __init__(self, checkpoint: WeightSource):
        self.checkpoint = checkpoint
        self.name = ""
        self.value: Tensor | None = None

    def __call__(self, shard: Any) -> Any:
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        if not isinstance(shard, ShardedTensor):
            return None
        name, axes = shard.key, shard.prepend_axis_num
        if axes:
            name = f"{LAYERS}{shard.global_offset[0]}.{name.removeprefix(LAYERS)}"
        if name != self.name or self.value is None:
            if name not in self.checkpoint.tensors:
                raise CheckpointError(f"{self.checkpoint.path} has no tensor {name}")
            self.value = None  # before the next one is read
            self.name, self.value = name, self.checkpoint.tensors[name].read()
        return self._cut(self.value, shard, shard.global_offset[axes:], shard.local_shape)

    def _cut(self, value: "Tensor", shard: "ShardedTensor", start: tuple[int, ...], shape: tuple[int, ...]) -> "Tensor":
        import torch

        box = tuple(slice(first, first + size) for first, size in zip(start, shape))
        part = value[box]
        if tuple(part.shape) == tuple(shape):
            return part
        if not shard.allow_shape_mismatch:
            raise CheckpointError(f"{self.checkpoint.path}: {self.name} is {tuple(value.shape)}, too small")
        padded = torch.zeros(shape, dtype=part.dtype)  # the vocabulary's padding differs with tensor parallel
        padded[: part.shape[0]] = part
        return padded


def save_weights(model: Any, architecture: Architecture, path: Path, form: MegatronFormat = NATIVE) -> None:
    """Saves a Megatron GPTModel into the folder of weights of a checkpoint at `path`, with the extra states that
    Megatron asks for with Transformer Engine; every rank calls it. No modelopt_state: a pruned student is an ordinary
    smaller model."""
    from megatron.core import dist_checkpointing

    check_shapes(model, architecture)
    weights = path / form.weights
    weights.mkdir(parents=True, exist_ok=True)
    _shift_gamma(model, architecture, -1.0)
    try:
        shards = _with_extra_states(model.sharded_state_dict(prefix=form.prefix), form.prefix)
        dist_checkpointing.save(shards, str(weights))
    finally:
        _shift_gamma(model, architecture, 1.0)


def _with_extra_states(shards: dict[str, Any], prefix: str) -> dict[str, Any]:
    """This rank's shards, and the extra states that modules of this layer spec do not have, or not in this version."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    projection, norm = "self_attention.linear_proj", f"{prefix}{FINAL_NORM}."
    others = ["self_attention.core_attention"]
    others += [norm for norm in QK_NORMS if any(name.endswith(f"{norm}.weight") for name in shards)]
    added = {
        name.replace(projection, other): dataclasses.replace(value, key=value.key.replace(projection, other), data=None)
        for name, value in shards.items()
        if name.endswith(f"{projection}.{EXTRA_STATE}")
        for other in others
    }
    if f"{norm}weight" in shards:  # the last pipeline stage
        key, replica = f"{norm}{EXTRA_STATE}", shards[f"{norm}weight"].replica_id
        added[key] = ShardedObject(key, None, (1,), (0,), replica)
    return added | shards


def save_checkpoint(
    model: "GPTModel",
    architecture: Architecture,
    partial: Path,
    *,
    output: str | Path,
    to: str | None,
    tokenizer: str | Tokenizer | None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Saves the model in the format that `output` and `to` ask for; every rank calls it.

    Megatron saves its own shards; rank 0 then makes another format of them, if one is wanted.

    Args:
        partial: the folder that will become `output`, or holds the archive that will.
        tokenizer: its directory or hub name, or the tokenizer of another checkpoint.
    """
    import torch

    form = FORMATS[output_format(str(output), to)]
    native = form if isinstance(form, MegatronFormat) else NATIVE
    folder = partial if native is form else partial / BEFORE_CONVERSION
    save_weights(model, architecture, folder, native)
    if torch.distributed.get_rank() == 0:
        files = folder_files(folder / native.weights)
        tensors = checked(by_canonical_name(torch_dist.tensors(files), folder), architecture, folder)
        made = Model(
            architecture=architecture,
            tensors=tensors,
            tokenizer_files=tokenizers.named(tokenizer) if isinstance(tokenizer, str) else tokenizer,
            generation=generation or {},
        )
        if native is form:
            native.write_description(folder, made)
        else:
            place = form.place_in(partial, output)
            write_checkpoint(place, form.name, architecture, tensors, made.tokenizer_files, made.generation)
            shutil.rmtree(folder)
    torch.distributed.barrier()


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Global shape of each weight of a layer, by the end of its name in Megatron's model."""
    a = architecture
    fc1_rows = a.ffn_hidden_size * (2 if a.gated_linear_unit else 1)
    return {
        "word_embeddings.weight": (a.vocab_size, a.hidden_size),
        "output_layer.weight": (a.vocab_size, a.hidden_size),
        "linear_qkv.weight": (a.qkv_rows(), a.hidden_size),
        "linear_proj.weight": (a.hidden_size, a.num_attention_heads * a.kv_channels),
        "linear_fc1.weight": (fc1_rows, a.hidden_size),
        "linear_fc2.weight": (a.hidden_size, a.ffn_hidden_size),
        **dict.fromkeys((f"{norm}.weight" for norm in QK_NORMS), (a.kv_channels,)),
        **dict.fromkeys(HIDDEN_NORMS, (a.hidden_size,)),
    }


def check_shapes(model: "GPTModel", architecture: Architecture) -> None:
    """Checks the number of layers and every weight's shape against `architecture` (global shapes, any layout).

    Raises:
        CheckpointError: naming each tensor that disagrees.
    """
    import torch

    tensor_parallel = model.config.tensor_model_parallel_size
    wrong = []
    for name, parameter in model.named_parameters():
        for ending, shape in expected_shapes(architecture).items():
            if name.endswith(ending):
                elements = parameter.numel() * (
                    tensor_parallel if getattr(parameter, "tensor_model_parallel", False) else 1
                )
                if elements != torch.Size(shape).numel():
                    wrong.append(f"{name} is {tuple(parameter.shape)}, the architecture says {shape}")
    if model.config.num_layers != architecture.num_layers:
        wrong.append(f"{model.config.num_layers} layers, the architecture says {architecture.num_layers}")
    if wrong:
        raise CheckpointError("the weights disagree with the architecture: " + "; ".join(wrong))


def _gamma_is_shifted(model: "GPTModel", architecture: Architecture) -> bool:
    """Checkpoints of zero-centred LayerNorms hold gamma - 1; Megatron's local norm wants gamma itself."""
    return architecture.layernorm_zero_centered_gamma and not model.config.layernorm_zero_centered_gamma


def _shift_gamma(model: "GPTModel", architecture: Architecture, by: float) -> None:
    """Adds `by` to the gains of a model whose checkpoints hold others."""
    import torch

    if not _gamma_is_shifted(model, architecture):
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(NORM_WEIGHTS):
                parameter.add_(by)
