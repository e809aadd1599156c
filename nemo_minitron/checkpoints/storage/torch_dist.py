"""Megatron's distributed checkpoints in torch_dist: read without loading, written without Megatron.

Files: `.metadata`, a pickle that says which piece of which tensor lies where; `__R_N.distcp`, pieces one after another,
each a file of torch.save; `common.pt` and `metadata.json`.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from nemo_minitron.checkpoints.chunked import Chunk, Chunked
from nemo_minitron.checkpoints.file_bytes import Bytes
from nemo_minitron.checkpoints.files import Files
from nemo_minitron.checkpoints.names import NOT_WEIGHTS, extra_states
from nemo_minitron.checkpoints.precision import ITEM_SIZES, item_size
from nemo_minitron.checkpoints.storage import pickle_writer, torch_writer
from nemo_minitron.checkpoints.storage.pickle_writer import Call, Global, Instance, Pairs
from nemo_minitron.checkpoints.storage.pickles import read_pickle
from nemo_minitron.checkpoints.storage.torch_zip import StoredTensor, read_torch_file
from nemo_minitron.checkpoints.tensors import BLOCK, Lazy
from nemo_minitron.errors import CheckpointError

METADATA, PIECES, COMMON = ".metadata", "__0_0.distcp", "common.pt"
#: What Megatron core from 0.19 on has in place of common.pt: an object among the pieces.
COMMON_OBJECT = "common_state/shard_0_1"
BACKEND = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1,
    "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip
DCP = "torch.distributed.checkpoint"
MODULES = (f"{DCP}.metadata", f"{DCP}.planner", f"{DCP}.filesystem", "megatron.")
METADATA_LIMIT = 1 << 30


def read_metadata(files: Files) -> Any:
    """The `.metadata` of a distributed checkpoint, as inert objects with the attributes of torch's classes.

    Raises:
        CheckpointError: it is missing, truncated, or names classes that have no place in it.
    """
    source = f"{files.where}/{METADATA}"
    if METADATA not in files:
        raise CheckpointError(
            f"{source} is missing: {files.where} is not a Megatron distributed checkpoint, or was not copied whole"
        )
    if files[METADATA].length > METADATA_LIMIT:
        raise CheckpointError(f"{source} has {files[METADATA].length} bytes, too many for what it is")
    functions = {
        ("torch.serialization", "_get_layout"): lambda name: name,
        ("torch", "device"): lambda *_: None,
    }
    metadata = read_pickle(files[METADATA].read(), source, functions=functions, modules=MODULES)
    entries, places = (getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data"))
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise CheckpointError(f"{source} is not the metadata of a distributed checkpoint")
    return metadata


def tensors(files: Files) -> dict[str, Chunked]:
    """Key -> tensor for everything in the folder that is a weight; every piece is known to lie inside its file.

    Raises:
        CheckpointError: the metadata is damaged, or a file is missing, too short, or outside the folder.
    """
    metadata = read_metadata(files)
    try:
        places = _places(metadata, files)
        weights = {}
        for name, entry in metadata.state_dict_metadata.items():
            if hasattr(entry, "size") and not NOT_WEIGHTS.search(name):
                weights[name] = _tensor(name, entry, places, files)
        return weights
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{files.where}/{METADATA} is not a distributed checkpoint's metadata ({type(error).__name__}: {error})"
        ) from None


def common_state(files: Files) -> dict[str, Any]:
    """What a checkpoint holds beside tensors that lie in pieces (arguments, iteration...), as inert values; what is
    not there is empty.

    Raises:
        CheckpointError: it is damaged, or names what has no place in it.
    """
    if COMMON in files:
        return _mapping(read_torch_file(files[COMMON], f"{files.where}/{COMMON}"))
    place = _places(read_metadata(files), files).get((COMMON_OBJECT, None))
    if place is None:
        return {}
    stored = read_torch_file(place, f"{files.where}: {COMMON_OBJECT}")
    return _mapping(stored[0] if isinstance(stored, list) and stored else None)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _places(metadata: Any, files: Files) -> dict[tuple[str, tuple[int, ...] | None], Bytes]:
    """(key, start of the piece) -> its bytes."""
    places = {}
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        if name not in files:
            outside = name.startswith("/") or ".." in name.split("/")
            reason = "outside the checkpoint" if outside else "missing: the checkpoint was not copied whole"
            raise CheckpointError(f"{files.where}/{METADATA} names the file {name}, which is {reason}")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{files.where}/{name} holds compressed pieces, which are not read here")
        if info.offset < 0 or info.length < 0:
            raise CheckpointError(f"{files.where}/{METADATA} has a piece at {info.offset} of length {info.length}")
        data = files[name]
        if info.offset + info.length > data.length:
            raise CheckpointError(
                f"{files.where}/{name} is truncated: {data.length} bytes, the metadata needs "
                f"{info.offset + info.length}; copy the checkpoint again"
            )
        start = tuple(index.offset) if getattr(index, "offset", None) is not None else None
        places[index.fqn, start] = data.part(info.offset, info.length)
    return places


def _tensor(name: str, entry: Any, places: dict[tuple[str, tuple[int, ...] | None], Bytes], files: Files) -> Chunked:
    dtype, source = entry.properties.state[0], f"{files.where}: {name}"
    item_size(dtype, source)
    chunks = []
    for chunk in entry.chunks:
        start, shape = _sizes(chunk.offsets), _sizes(chunk.sizes)
        place = places.get((name, start))
        if place is None:
            raise CheckpointError(f"{source}: the piece at {start} is nowhere; the checkpoint was not copied whole")
        if math.prod(shape) * ITEM_SIZES[dtype] > place.length:
            raise CheckpointError(f"{source}: a piece of shape {shape} does not fit in {place.length} bytes")
        chunks.append(Chunk(start, shape, _locator(place, shape, dtype, source)))
    return Chunked(_sizes(entry.size), dtype, tuple(chunks), name)


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(values)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise CheckpointError(f"{sizes} is not a shape")
    return sizes


def _locator(place: Bytes, shape: tuple[int, ...], dtype: str, source: str) -> Callable[[], tuple[Bytes, int | None]]:
    def locate() -> tuple[Bytes, int | None]:
        stored = read_torch_file(place, source)
        if not isinstance(stored, StoredTensor) or (stored.shape, stored.dtype) != (shape, dtype):
            raise CheckpointError(f"{source}: {place.path} holds something else where a piece of it is said to be")
        return stored.data, stored.checksum

    return locate


def write(
    create: Callable[[str], Any],
    prefix: str,
    weights: Iterable[tuple[str, int, int, Lazy]],
    num_layers: int,
    common: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes a checkpoint that Megatron loads with Transformer Engine, whose extra states are None, and without.

    Args:
        create: `create(name)` is a context manager that gives a seekable binary file.
        prefix: before every key, ``module.`` or ``model.``.
        weights: (key without prefix, layer or -1, layers of the stack, tensor), the layers of a key in order.
        common: plain values that are kept beside them.
    """
    catalogue, buffer, keys = _Catalogue(), memoryview(bytearray(BLOCK)), set()
    with create(PIECES) as file:
        for key, layer, stack, tensor in weights:
            position, shape = file.tell(), tensor.shape if layer < 0 else (1, *tensor.shape)
            checksum = torch_writer.write_tensor(file, shape, tensor.dtype, tensor.blocks(buffer, check=False))
            tensor.check(checksum)
            keys.add(key)
            catalogue.add_tensor(f"{prefix}{key}", layer, stack, tensor, (position, file.tell() - position))
        for key in extra_states(num_layers, keys):
            position = file.tell()
            torch_writer.write_object(file, [None])
            catalogue.add_object(f"{prefix}{key}", (position, file.tell() - position))
    with create(METADATA) as file:
        file.write(pickle_writer.dumps(catalogue.metadata()))
    with create(COMMON) as file:
        torch_writer.write_object(file, dict(common))
    with create("metadata.json") as file:
        file.write(json.dumps(BACKEND).encode())


class _Catalogue:
    """What `.metadata` says: torch's Metadata, by the names of its classes."""

    def __init__(self) -> None:
        self.entries: dict[str, Instance] = {}
        self.places: list[tuple[Instance, Instance]] = []

    def add_tensor(self, name: str, layer: int, stack: int, tensor: Lazy, place: tuple[int, int]) -> None:
        shape = tensor.shape
        start, piece, size = (0,) * len(shape), shape, shape
        if layer >= 0:
            start, piece, size = (layer, *start), (1, *shape), (stack, *shape)
        if name not in self.entries:
            state = {"properties": _properties(tensor.dtype), "size": _size(size), "chunks": []}
            self.entries[name] = _instance("TensorStorageMetadata", state)
        known = self.entries[name].state
        if (known["properties"], known["size"]) != (_properties(tensor.dtype), _size(size)):
            raise CheckpointError(f"{name}: layer {layer} has another dtype or shape than those before it")
        known["chunks"].append(_instance("ChunkStorageMetadata", {"offsets": _size(start), "sizes": _size(piece)}))
        self._place(name, _size(start), place)

    def add_object(self, name: str, place: tuple[int, int]) -> None:
        self.entries[name] = _instance("BytesStorageMetadata", {})
        self._place(name, None, place)

    def _place(self, name: str, offset: Any, place: tuple[int, int]) -> None:
        index = _instance("MetadataIndex", {"fqn": name, "offset": offset, "index": None})
        info = {"relative_path": PIECES, "offset": place[0], "length": place[1]}
        self.places.append((index, Instance(Global(f"{DCP}.filesystem", "_StorageInfo"), info)))

    def metadata(self) -> Instance:
        state = {"state_dict_metadata": self.entries, "planner_data": None, "storage_data": Pairs(self.places)}
        return _instance("Metadata", {**state, "storage_meta": None})


def _instance(name: str, state: dict[str, Any]) -> Instance:
    return Instance(Global(f"{DCP}.metadata", name), state)


def _size(sizes: tuple[int, ...]) -> Call:
    return Call(Global("torch", "Size"), (tuple(sizes),))


def _properties(dtype: str) -> Instance:
    """TensorProperties of a plain tensor: dtype, layout, requires_grad, memory format, pin_memory."""
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Call(Global(f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"), (0,))
    kind = Global(f"{DCP}.metadata", "TensorProperties")
    return Instance(kind, (Global("torch", dtype), layout, False, memory_format, False))
