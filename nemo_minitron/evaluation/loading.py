"""A checkpoint of any format as a transformers model, straight from its tensors: no copy on disk."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.checkpoints.checkpoint import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.formats.huggingface.config import write_config
from nemo_minitron.checkpoints.transformers_model import load_model, quiet_loading
from nemo_minitron.config import InferenceSettings
from nemo_minitron.errors import CheckpointError, DataError, EngineError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that is ready to run, in evaluation mode.

    Attributes:
        model: transformers' model.
        tokenizer: its tokenizer.
        checkpoint: where it came from.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    checkpoint: Checkpoint


def open_all(paths: list[str], settings: InferenceSettings, *, tokenizers: bool = True) -> list[Checkpoint]:
    """Opens checkpoints, and checks what can be checked before any is loaded.

    Raises:
        CheckpointError: one is missing or damaged, has no tokenizer, or transformers has no class for it.
        EngineError: the device is not there.
    """
    checkpoints = [open_checkpoint(path, quantized=True) for path in paths]
    for path, checkpoint in zip(paths, checkpoints):
        write_config(checkpoint.architecture, checkpoint.dtype)
        if tokenizers and settings.tokenizer is None and checkpoint.tokenizer_files is None:
            raise CheckpointError(f"the checkpoint {path} has no tokenizer: give one, tokenizer=DIR")
    resolve_device(settings.device)
    return checkpoints


def resolve_device(name: str) -> str:
    """The device that `name` stands for on this machine; raises EngineError where it is not there."""
    if name == "cpu":
        return name
    import torch

    if name == "auto" and not torch.cuda.is_available():
        return "cpu"
    wanted = "cuda:0" if name in ("auto", "cuda") else name
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(wanted.removeprefix("cuda:")) >= count:
        raise EngineError(f"device={name}: this machine has {count} GPUs that torch can use; device=cpu runs here")
    return wanted


def load(checkpoint: Checkpoint, settings: InferenceSettings) -> Loaded:
    """Loads a checkpoint for inference.

    Raises:
        CheckpointError: its weights do not fit its sizes, or it has no tokenizer.
        DataError: the tokenizer cannot be loaded.
    """
    resolve_device(settings.device)
    tokenizer = load_tokenizer_of(checkpoint, settings)
    return Loaded(model=load_model_alone(checkpoint, settings), tokenizer=tokenizer, checkpoint=checkpoint)


def load_model_alone(checkpoint: Checkpoint, settings: InferenceSettings) -> "PreTrainedModel":
    """Loads a checkpoint's model for inference, without a tokenizer.

    Raises:
        CheckpointError: its weights do not fit its sizes.
    """
    device = resolve_device(settings.device)
    with quiet_transformers():
        model = load_model(checkpoint, _dtype(checkpoint, settings, device))
    return model.to(device).eval()


def load_tokenizer_of(checkpoint: Checkpoint, settings: InferenceSettings) -> "PreTrainedTokenizerBase":
    """The tokenizer that the settings name, or else the checkpoint's own."""
    from nemo_minitron.data.tokenizer import load_tokenizer

    name = settings.tokenizer or checkpoint.tokenizer
    if name is None:
        raise CheckpointError(f"the checkpoint {checkpoint.path} has no tokenizer: give one, tokenizer=DIR")
    return load_tokenizer(name)


def check_tokens(ids: Iterable[int], loaded: Loaded) -> None:
    """Raises DataError where one of the tokens has no row in the model's embedding."""
    architecture = loaded.checkpoint.architecture
    rows, largest = architecture.vocab_size - architecture.vocab_padding, max(ids, default=0)
    if largest >= rows:
        raise DataError(
            f"the tokenizer makes the token {largest}, and the embedding of {loaded.checkpoint.path} has {rows} rows: "
            "it is another model's; give tokenizer=DIR with the model's own"
        )


def _dtype(checkpoint: Checkpoint, settings: InferenceSettings, device: str) -> "torch.dtype":
    import torch

    if settings.dtype != "auto":
        return getattr(torch, DTYPES[str(settings.dtype)])
    return torch.float32 if device == "cpu" else getattr(torch, checkpoint.dtype)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """In the body, transformers, datasets and lm-evaluation-harness say nothing below an error, and draw no bars."""
    import logging

    others = [logging.getLogger(name) for name in ("lm_eval", "datasets", "rouge_score", "absl")]
    levels = [logger.level for logger in others]
    for logger in others:
        logger.setLevel(logging.ERROR)
    try:
        with quiet_loading():
            yield
    finally:
        for logger, before in zip(others, levels):
            logger.setLevel(before)


def display_names(paths: list[str], names: list[str]) -> list[str]:
    """What tables call checkpoints: `names`, or as much of the end of each path as tells them apart."""
    if names:
        return list(names)
    parts = [Path(path).absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        endings = ["/".join(part[-count:]) for part in parts]
        if len(set(endings)) == len(endings):
            return endings
    return list(paths)
