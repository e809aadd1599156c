"""A checkpoint of any format as transformers' model.

transformers reads no file of a checkpoint here: its configuration is built from the checkpoint's own description, and
its weights are the checkpoint's. A raw config.json means one thing to transformers 4 and another to transformers 5
(the base of the rotary embedding, the share of a head that it rotates, the size of a head), and neither says so.
"""

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.checkpoint import Checkpoint
from nemo_minitron.checkpoints.formats.huggingface.config import write_config
from nemo_minitron.checkpoints.formats.huggingface.families import FAMILIES
from nemo_minitron.checkpoints.formats.huggingface.mapping import export_tensors
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


def model_class(family: str) -> "type[PreTrainedModel]":
    """transformers' class of a family's models (``LlamaForCausalLM``)."""
    import transformers

    return getattr(transformers, FAMILIES[family].architecture)


def model_config(
    architecture: Architecture, dtype: str, generation: Mapping[str, Any] = MappingProxyType({})
) -> "PretrainedConfig":
    """transformers' configuration of a model, with the sizes that it has.

    transformers 5.12 refuses to describe a Llama whose hidden size is no multiple of its heads, but runs it, as the
    size of a head is stated: there the hidden size is set afterwards.

    Args:
        dtype, generation: as `write_config` takes them.

    Raises:
        CheckpointError: transformers has no class for it, or its version does not take these sizes.
    """
    a = architecture
    described = write_config(a, dtype, generation)
    if a.hidden_size % a.num_attention_heads:
        config = _configuration(a, {**described, "hidden_size": a.num_attention_heads * a.kv_channels})
        config.hidden_size = a.hidden_size
        return config
    return _configuration(a, described)


def check_describable(architecture: Architecture, dtype: str) -> None:
    """Raises CheckpointError where transformers' version would not write, or read, the config.json of these sizes."""
    _configuration(architecture, write_config(architecture, dtype))


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """In the body transformers says nothing below an error, and draws no bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _configuration(architecture: Architecture, described: dict[str, Any]) -> "PretrainedConfig":
    import transformers

    try:
        return model_class(architecture.family).config_class(**described)
    except Exception as error:  # transformers 5 has errors of its own, of no common kind
        raise CheckpointError(
            f"transformers {transformers.__version__} does not take {architecture.describe()}: {last_line(error)}"
        ) from error


def load_model(checkpoint: Checkpoint, dtype: "torch.dtype") -> "PreTrainedModel":
    """transformers' model of a checkpoint, on the CPU and in evaluation mode.

    Args:
        dtype: torch.dtype to compute in.

    Raises:
        CheckpointError: transformers has no class for it, its weights do not fit its sizes, or transformers does not
            take its settings of generation.
    """
    config = model_config(checkpoint.architecture, checkpoint.dtype, checkpoint.generation)
    kind = model_class(checkpoint.architecture.family)
    model, report = kind.from_pretrained(
        None, config=config, state_dict=_state(checkpoint), torch_dtype=dtype, output_loading_info=True
    )
    problems = [f"{what.replace('_', ' ')}: {', '.join(sorted(map(str, report[what])))}" for what in report
                if report[what] and what != "error_msgs"]  # fmt: skip
    if problems:
        raise CheckpointError(f"{checkpoint.path} does not fit transformers' {kind.__name__}: {'; '.join(problems)}")
    if checkpoint.generation:
        model.generation_config = _generation(checkpoint)
    return model.eval()


def _state(checkpoint: Checkpoint) -> "dict[str, torch.Tensor]":
    """Weights by transformers' names; those of a plain Hugging Face directory stay in their files until they are
    used."""
    mapped = (
        checkpoint.kind.mapped(checkpoint.path, checkpoint.architecture) if checkpoint.quantization is None else None
    )
    if mapped is not None:
        return mapped
    exported = export_tensors(checkpoint.tensors, checkpoint.architecture)
    return {name: tensor.read() for name, tensor in exported.items()}


def _generation(checkpoint: Checkpoint) -> "GenerationConfig":
    """Settings of generation, without what transformers notes of itself there (`_from_model_config`): it would look for
    more of that."""
    from transformers import GenerationConfig

    said = {name: value for name, value in checkpoint.generation.items() if not name.startswith("_")}
    try:
        return GenerationConfig(**said)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: transformers does not take its settings of generation: {last_line(error)}; mend "
            "generation_config.json"
        ) from None


def last_line(error: Exception) -> str:
    """What an error of several lines comes to."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
