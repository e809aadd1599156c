"""A GGUF file (llama.cpp's format) as a Hugging Face directory in bf16, for what was downloaded."""

from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.checkpoint import write_checkpoint
from nemo_minitron.checkpoints.file_bytes import whole
from nemo_minitron.checkpoints.formats.gguf import header
from nemo_minitron.checkpoints.formats.gguf.file import read
from nemo_minitron.checkpoints.tensors import Cast
from nemo_minitron.errors import CheckpointError
from nemo_minitron.packages import extras as packages

DTYPE = "bfloat16"


def check_packages(who: str) -> None:
    """Raises MissingPackageError where what dequantises a GGUF is not installed."""
    packages.require("gguf", who, (packages.EVALUATE,))


def to_huggingface(source: Path, folder: Path, called: str) -> dict[str, Any]:
    """Writes the model in `source` into `folder`: config.json, safetensors in bf16, tokenizer, generation settings.

    Args:
        called: what messages call it.

    Returns:
        `stored`: tensors by their precision in the file ({"Q4_1": 210}), and `name`, what it calls itself.

    Raises:
        CheckpointError: it is no GGUF, is damaged, or holds what cannot be converted.
    """
    try:
        contents = read(source)
        name = header.read(whole(source)).metadata.get("general.name")
        tensors = {name: Cast(tensor, DTYPE) for name, tensor in contents.tensors.items()}
        write_checkpoint(folder, "hf", contents.architecture, tensors, contents.tokenizer_files, contents.generation)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(source), called)) from error
    return {"stored": dict(contents.stored_precisions or {}), "name": name if isinstance(name, str) else ""}
