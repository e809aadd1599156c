"""Megatron-Bridge checkpoints: a folder with one for each iteration, or one of these; Megatron-LM's are read as well.

An iteration's folder has weights in torch_dist, run_config.yaml and tokenizer/. Megatron-LM's has its arguments in the
common state instead. The folder above says which iteration is the latest.
"""

import json
import struct
from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import generation
from nemo_minitron.checkpoints import tokenizer as tokenizers
from nemo_minitron.checkpoints.files import Files, folder_files
from nemo_minitron.checkpoints.formats.base import Contents, Format, Model, WriteOptions
from nemo_minitron.checkpoints.formats.bridge import arguments, fields, iterations, run_config
from nemo_minitron.checkpoints.formats.bridge.classes import (
    LATEST_STATE,
    LEGACY,
    RUN_CONFIG,
    TOKENIZER_FOLDER,
    TRACKER,
    TRAIN_STATE,
)
from nemo_minitron.checkpoints.names import EMBEDDING, by_canonical_name, checked, stacked
from nemo_minitron.checkpoints.storage import torch_dist, torch_writer
from nemo_minitron.errors import CheckpointError

#: What Bridge keeps of itself beside the weights: which keys they have.
COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}
#: Of a training that has not begun: name -> dtype and number.
STATE = {
    "step": ("int64", struct.pack("<q", 0)),
    "consumed_train_samples": ("int64", struct.pack("<q", 0)),
    "skipped_train_samples": ("int64", struct.pack("<q", 0)),
    "consumed_valid_samples": ("int64", struct.pack("<q", 0)),
    "floating_point_operations_so_far": ("float64", struct.pack("<d", 0)),
    "do_train": ("bool", b"\0"),
    "do_valid": ("bool", b"\0"),
    "do_test": ("bool", b"\0"),
}  # fmt: skip


class Bridge(Format):
    """Folders that Megatron-Bridge saves and loads, and those of Megatron-LM, which it loads too."""

    name = "bridge"
    title = "Megatron-Bridge checkpoint"
    folder_mark = f"{RUN_CONFIG} (Megatron-Bridge)"

    def detect(self, path: Path) -> bool:
        return iterations.is_iteration(path) or (path / TRACKER).is_file() or bool(iterations.iterations_in(path))

    def read(self, path: Path) -> Contents:
        return read(folder_files(iterations.folder_of(path)), path)

    def check(self, architecture: Architecture, dtype: str) -> None:
        fields.check(architecture, dtype)

    def write(self, path: Path, model: Model, options: WriteOptions) -> None:
        del options
        write(path, model)


def read(files: Files, where: Path) -> Contents:
    """What the files of an iteration hold; reads no weights.

    Args:
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: nothing says what model it is, it is of a kind that is not known here, or the weights are
            missing, damaged or of another model.
    """
    if torch_dist.METADATA not in files and any(name.endswith(LEGACY) for name in files.names()):
        raise CheckpointError(
            f"{files.where} holds a file of weights for each rank ({LEGACY}); read are distributed checkpoints: let "
            "Megatron-LM save it with --ckpt-convert-format torch_dist first"
        )
    remarks: tuple[str, ...] = ()
    if RUN_CONFIG in files:
        family, values, named = run_config.read(files)
        source = f"{files.where}/{RUN_CONFIG}"
    else:
        common = torch_dist.common_state(files)
        if arguments.ARGUMENTS not in common:
            raise CheckpointError(
                f"{files.where} has weights and nothing that says of which model: neither {RUN_CONFIG} (Megatron-"
                "Bridge) nor arguments in its common state (Megatron-LM); copy it whole, or name the folder above "
                "where this is one inside a NeMo checkpoint"
            )
        source, family = f"{files.where}: the arguments of Megatron-LM", None
        values = arguments.read(common[arguments.ARGUMENTS], source)
        named = arguments.tokenizer_name(common[arguments.ARGUMENTS])
        remarks = ("it is Megatron-LM's: its arguments say what model it is",)
    tokenizer = tokenizers.in_folder(files.below(TOKENIZER_FOLDER), named)
    tensors = by_canonical_name(torch_dist.tensors(files), files.where)
    if len(tensors[EMBEDDING].shape) != 2:
        raise CheckpointError(f"{files.where} has no embedding matrix")
    architecture = fields.read_architecture(family, values, tensors[EMBEDDING].shape[0], tokenizer, source)
    return Contents(
        architecture=architecture,
        tensors=checked(tensors, architecture, where),
        tokenizer_files=tokenizer,
        generation=generation.read(files),
        size=files.size(),
        layout="torch_dist",
        remarks=(*_other_iterations(files, where), *remarks),
    )


def _other_iterations(files: Files, where: Path) -> tuple[str, ...]:
    """A remark, where the checkpoint holds more iterations than the one that is read."""
    there = iterations.iterations_in(where)
    if len(there) < 2:
        return ()
    return (f"it holds {len(there)} iterations; this is {files.where.name}, name the folder of another to read that",)


def write(path: Path, model: Model) -> None:
    """Writes a checkpoint of iteration 0, as Bridge makes one of a model that it imports.

    Bridge passes over the file that keeps the settings of generation.
    """
    architecture, tokenizer = model.architecture, model.tokenizer_files
    described = run_config.write(architecture, model.dtype, tokenizer)
    folder = path / iterations.FIRST
    folder.mkdir(parents=True, exist_ok=True)
    num_layers = architecture.num_layers
    layers = stacked(model.tensors, num_layers)
    torch_dist.write(lambda name: (folder / name).open("wb"), "", layers, num_layers, COMMON)
    if tokenizer is not None and tokenizer.files:
        _write_tokenizer(folder / TOKENIZER_FOLDER, tokenizer)
    if model.generation:
        text = json.dumps(dict(model.generation), indent=2) + "\n"
        (folder / generation.FILE).write_text(text, encoding="utf-8")
    (folder / RUN_CONFIG).write_text(described, encoding="utf-8")
    for place in (folder / TRAIN_STATE, path / LATEST_STATE):
        with place.open("wb") as file:
            torch_writer.write_numbers(file, STATE)
    (path / TRACKER).write_text("0", encoding="ascii")


def _write_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """The tokenizer's files; a SentencePiece model alone, as Bridge keeps one."""
    if tokenizer.kind == tokenizers.SENTENCEPIECE:
        folder.mkdir(exist_ok=True)
        (folder / tokenizers.MODEL).write_bytes(tokenizer.files[tokenizers.MODEL].read())
        return
    tokenizer.copy_to(folder)
