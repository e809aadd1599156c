"""Weights between Megatron models and NeMo-2 checkpoints."""

from pathlib import Path
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.nemo2 import WEIGHTS, write_context
from nemo_minitron.errors import CheckpointError

PREFIX = "module."
NORM_WEIGHTS = ("layernorm.weight", "layer_norm_weight")


def bare(module: Any) -> Any:
    """The Megatron model inside its wrappers (Lightning module, DDP, half-precision)."""
    from megatron.core.models.gpt import GPTModel

    while not isinstance(module, GPTModel):
        module = module.module
    return module


def load_weights(model: Any, architecture: Architecture, path: str | Path, strictness: str) -> None:
    """Loads the NeMo-2 checkpoint at `path` into a Megatron GPTModel; every rank calls it.

    Args:
        strictness: Megatron's name of how strictly the checkpoint must match (``assume_ok_unexpected``...).

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    weights = Path(path) / WEIGHTS
    sharded = model.sharded_state_dict(prefix=PREFIX)
    try:
        loaded = dist_checkpointing.load({"state_dict": sharded}, str(weights), strict=strictness)["state_dict"]
    except (CheckpointingException, KeyError, ValueError) as error:
        raise CheckpointError(f"{weights} does not hold the weights that its context describes: {error}") from error
    state = {name.removeprefix(PREFIX): value for name, value in loaded.items()}
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if "_extra_state" not in name]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{weights} does not fit the model: missing {missing}, left over {result.unexpected_keys}"
        )
    _shift_gamma(model, architecture, 1.0)


def save_weights(model: Any, architecture: Architecture, path: Path) -> None:
    """Saves a Megatron GPTModel into `path`/weights; every rank calls it. No modelopt_state: a pruned student is an
    ordinary smaller model."""
    from megatron.core import dist_checkpointing

    check_shapes(model, architecture)
    weights = path / WEIGHTS
    weights.mkdir(parents=True, exist_ok=True)
    _shift_gamma(model, architecture, -1.0)
    try:
        dist_checkpointing.save(model.sharded_state_dict(prefix=PREFIX), str(weights))
    finally:
        _shift_gamma(model, architecture, 1.0)


def save_checkpoint(model: Any, architecture: Architecture, path: Path, tokenizer: str | None) -> None:
    """Saves weights and context; every rank calls it."""
    import torch

    save_weights(model, architecture, path)
    if torch.distributed.get_rank() == 0:
        write_context(path, architecture, tokenizer)
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
        "layernorm.weight": (a.hidden_size,),
    }


def check_shapes(model: Any, architecture: Architecture) -> None:
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


def _shift_gamma(model: Any, architecture: Architecture, by: float) -> None:
    """Checkpoints of zero-centred LayerNorms hold gamma - 1; Megatron's local norm wants gamma itself."""
    import torch

    if not architecture.layernorm_zero_centered_gamma or model.config.layernorm_zero_centered_gamma:
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(NORM_WEIGHTS):
                parameter.add_(by)
