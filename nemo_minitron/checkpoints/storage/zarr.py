"""Weights in zarr, Megatron's distributed format before NeMo 2: one folder a key, `.zarray` and one file a chunk.

Chunks are raw bytes (no compressor, no filter), so they are read in place, bfloat16, which zarr refuses, included.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from nemo_minitron.checkpoints.chunked import Chunk, Chunked
from nemo_minitron.checkpoints.file_bytes import Bytes
from nemo_minitron.checkpoints.files import Files
from nemo_minitron.checkpoints.names import NOT_WEIGHTS, extra_states
from nemo_minitron.checkpoints.precision import ITEM_SIZES
from nemo_minitron.checkpoints.storage import torch_writer
from nemo_minitron.checkpoints.tensors import BLOCK, Lazy
from nemo_minitron.errors import CheckpointError

ARRAY = ".zarray"
BACKEND = {
    "sharded_backend": "zarr", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip
DTYPES = {
    "bfloat16": "bfloat16", "<f2": "float16", "<f4": "float32", "<f8": "float64", "|u1": "uint8", "|i1": "int8",
    "<i2": "int16", "<i4": "int32", "<i8": "int64", "|b1": "bool",
}  # fmt: skip
NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
CHUNK_LIMIT = 1_000_000


def tensors(files: Files) -> dict[str, Chunked]:
    """Key -> tensor for every array that is a weight.

    Raises:
        CheckpointError: an array's description is damaged, or a chunk is missing or of another length.
    """
    arrays = {}
    for name in files.names():
        key = name.removesuffix(f"/{ARRAY}")
        if key != name and "/" not in key and not NOT_WEIGHTS.search(key):
            arrays[key] = _array(key, files)
    return arrays


def _array(key: str, files: Files) -> Chunked:
    source = f"{files.where}/{key}/{ARRAY}"
    try:
        described = json.loads(files.text(f"{key}/{ARRAY}"))
        shape, boxes = tuple(described["shape"]), tuple(described["chunks"])
        dtype, separator = DTYPES[described["dtype"]], described.get("dimension_separator", ".")
        plain = described["order"] == "C" and described["compressor"] is None and not described["filters"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged or of an unknown kind ({type(error).__name__}: {error})") from None
    if not plain or separator != ".":
        raise CheckpointError(f"{source}: only uncompressed, row-major arrays are read, as Megatron writes them")
    if len(shape) != len(boxes) or not all(type(n) is int and n > 0 for n in (*shape, *boxes)):
        raise CheckpointError(f"{source}: shape {shape} in chunks of {boxes} is not possible")
    grid = [math.ceil(size / box) for size, box in zip(shape, boxes)]
    if math.prod(grid) > CHUNK_LIMIT:
        raise CheckpointError(f"{source}: {math.prod(grid)} chunks are too many")
    chunks = tuple(_chunk(files, key, index, shape, boxes, dtype) for index in itertools.product(*map(range, grid)))
    return Chunked(shape, dtype, chunks, key)


def _chunk(
    files: Files, key: str, index: tuple[int, ...], shape: tuple[int, ...], boxes: tuple[int, ...], dtype: str
) -> Chunk:
    name = f"{key}/{'.'.join(map(str, index))}"
    start = tuple(number * box for number, box in zip(index, boxes))
    inside = tuple(min(box, size - first) for box, size, first in zip(boxes, shape, start))
    if inside[1:] != boxes[1:]:
        raise CheckpointError(f"{files.where}/{name}: a chunk reaches beyond {shape}, which Megatron does not write")
    if name not in files:
        raise CheckpointError(f"{files.where}/{name} is missing: the checkpoint was not copied whole")
    data, needed = files[name], math.prod(boxes) * ITEM_SIZES[dtype]
    if data.length != needed:
        raise CheckpointError(f"{files.where}/{name} has {data.length} bytes where a chunk has {needed}; copy it again")
    return Chunk(start, inside, _locator(data.part(0, math.prod(inside) * ITEM_SIZES[dtype])))


def _locator(data: Bytes) -> Callable[[], tuple[Bytes, int | None]]:
    return lambda: (data, None)


def write(
    create: Callable[[str], Any], prefix: str, weights: Iterable[tuple[str, int, int, Lazy]], num_layers: int
) -> None:
    """Writes the arrays as Megatron's zarr strategy does, one chunk a layer, and extra states that are None.

    Args:
        create: `create(name)` is a context manager that gives a binary file.
        weights: (key without prefix, layer or -1, layers of the stack, tensor), the layers of a key in order.
    """
    described: dict[str, Any] = {}
    buffer = memoryview(bytearray(BLOCK))
    for key, layer, stack, tensor in weights:
        name = f"{prefix}{key}"
        shape = [stack, *tensor.shape] if layer >= 0 else list(tensor.shape)
        array = {
            "chunks": [1, *tensor.shape] if layer >= 0 else list(tensor.shape),
            "compressor": None,
            "dtype": NAMES[tensor.dtype],
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": shape,
            "zarr_format": 2,
        }
        if described.setdefault(name, array) != array:
            raise CheckpointError(f"{key}: layer {layer} has another dtype or shape than those before it")
        index = [layer if layer >= 0 else 0, *(0,) * (len(shape) - 1)]
        with create(f"{name}/{'.'.join(map(str, index))}") as file:
            for block in tensor.blocks(buffer):
                file.write(block)
    for name, array in described.items():
        with create(f"{name}/{ARRAY}") as file:
            file.write(json.dumps(array, indent=4).encode())
    for key in extra_states(num_layers, [name.removeprefix(prefix) for name in described]):
        with create(f"{prefix}{key}.pt") as file:
            torch_writer.write_object(file, None)
    with create("common.pt") as file:
        torch_writer.write_object(file, {})
    with create("metadata.json") as file:
        file.write(json.dumps(BACKEND).encode())
