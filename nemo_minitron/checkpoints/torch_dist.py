"""Megatron's distributed checkpoints (torch_dist): reading what they hold without loading them or running pickles.

`.metadata` is a pickle. It is read through an allow-list: torch's own plain classes come through, classes of Megatron
become inert stand-ins, and anything else raises.
"""

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.errors import CheckpointError

ALLOWED_CLASSES = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
}
ALLOWED_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
DTYPES = {
    "bfloat16", "float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool",
    "float8_e4m3fn", "float8_e5m2", "strided", "contiguous_format", "preserve_format",
}  # fmt: skip


class StandIn:
    """Takes the place of a class of Megatron in a pickle: keeps plain attributes and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES or (module, name) in ALLOWED_CLASSES:
            return super().find_class(module, name)
        if module in ALLOWED_MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module.startswith("megatron."):
            return StandIn
        raise CheckpointError(f"names {module}.{name}, which has no place in a checkpoint's metadata; it was not run")


class TensorInfo(NamedTuple):
    """A tensor of a checkpoint: global shape and dtype's name (``bfloat16``, ``float32``)."""

    shape: tuple[int, ...]
    dtype: str


def read_metadata(weights: Path) -> Any:
    """The torch.distributed.checkpoint Metadata of the folder `weights`.

    Raises:
        CheckpointError: it is missing, truncated, or names classes that have no place in it.
    """
    path = Path(weights) / ".metadata"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: {weights} is not a Megatron distributed checkpoint, or was not copied whole"
        ) from None
    try:
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or truncated ({type(error).__name__}); copy it again") from None
    if not hasattr(metadata, "state_dict_metadata"):
        raise CheckpointError(f"{path} is not the metadata of a distributed checkpoint")
    return metadata


def tensors(weights: Path) -> dict[str, TensorInfo]:
    """Name -> shape and dtype of every tensor; extra states and other objects are passed over."""
    found = {}
    for name, entry in read_metadata(weights).state_dict_metadata.items():
        size = getattr(entry, "size", None)
        if size is not None:
            found[name] = TensorInfo(tuple(size), str(entry.properties.dtype).removeprefix("torch."))
    return found


def check_complete(weights: Path) -> None:
    """Checks that every piece named by the metadata lies inside its file.

    Raises:
        CheckpointError: a file is missing, too short, or outside the folder.
    """
    weights = Path(weights)
    metadata = read_metadata(weights)
    needed: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        if info.offset < 0 or info.length < 0:
            raise CheckpointError(f"{weights}/.metadata has a piece at offset {info.offset} of length {info.length}")
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(needed.items()):
        path = weights / name
        if not path.resolve().is_relative_to(weights.resolve()):
            raise CheckpointError(f"{weights}/.metadata names the file {name}, which is outside the checkpoint")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint was not copied whole")
        if path.stat().st_size < end:
            raise CheckpointError(
                f"{path} is truncated: {path.stat().st_size} bytes, the metadata needs {end}; copy the checkpoint again"
            )
